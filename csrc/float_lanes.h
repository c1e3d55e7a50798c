/* Products in float, for dot.h: activations and sums float, weights exact.
 *
 * A code of b bits in the top of a float's mantissa, under the exponent of 2^b, is 2^b + code: no conversion. */
#include "lanes.h"

#define OFFSET(type) ((type) == KT_FP8_BLOCK128 ? 0.0f : (float)(1 << kt_value_bits(type)))

typedef struct { const float *x, *sums; } act;
typedef floats partial;

KT_INLINE act act_open(const uint8_t *row, size_t cols) {
    return (act){(const float *)(const void *)row, (const float *)(const void *)row + kt_spans(cols) * KT_SPAN};
}
KT_INLINE float run_sum(act a, size_t column, size_t run) {
    return run == 16 ? a.sums[column / 16] : a.sums[column / 16] + a.sums[column / 16 + 1];
}
KT_INLINE floats partial_zero(void) { return (floats){0}; }
KT_INLINE floats partial_total(floats even, floats odd, act a, size_t column) { return even + odd; }

/* Byte b of each word. */
KT_INLINE floats code_floats(const int type, words codes, const int b) {
    if (type == KT_FP8_BLOCK128) {   /* below 2^120 exponents are those of e4m3, subnormal ones included */
        words c = b == 3 ? codes : codes << (24 - 8 * b);
        return (floats)((c & 0x80000000u) | (c >> 4 & 0x07f00000u)) * 0x1p120f;
    }
    const int bits = kt_value_bits(type), place = 23 - bits, shift = place - 8 * b;
    words mask = (words){0} + (((1u << bits) - 1) << place), exponent = (words){0} + ((uint32_t)(127 + bits) << 23);
    words moved = shift >= 0 ? codes << (shift >= 0 ? shift : 0) : codes >> (shift < 0 ? -shift : 0);
    return (floats)((moved & mask) | exponent);
}

KT_INLINE void span_products(const int type, const uint8_t *span, const int run, const int tokens, const act *acts, size_t column,
                             floats *even, floats *odd) {
    const int per = (int)kt_run(type) / 4;
    KT_UNROLL for (int q = run * per; q < (run + 1) * per; q++) {
        words codes = {0};
        if (!kt_is_float(type)) codes = quad(type, span, q);
        KT_UNROLL for (int b = 0; b < 4; b++) {
            floats w;
            const int in8 = q % 2 * 4 + b, place = in8 % 2 * 4 + in8 / 2;   /* in bf16 order; see kt_bf16_column */
            if (type == KT_F32) w = load_floats(span + (q * 4 + b) * WORD_ROW);
            else if (type == KT_BF16) {
                words pair = load_words(span + (q / 2 * 4 + place / 2) * WORD_ROW);
                if (place % 2) w = (floats)(pair & 0xffff0000u);
                else w = (floats)(pair << 16);
            } else w = code_floats(type, codes, b);
            KT_UNROLL for (int t = 0; t < tokens; t++) {
                float x = acts[t].x[column + (size_t)(4 * q + b)];
                if (b % 2) odd[t] += w * x;
                else even[t] += w * x;
            }
        }
    }
}
#include "dot.h"
