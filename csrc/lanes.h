/* One vector of rows of a packed group, LANES of its 16: codes and scales, for every instruction set with vectors.
 *
 * The including file defines, before: LANES (8 or 16), half_floats(p): LANES float16 as floats,
 * byte_words(p), signed_byte_words(p): LANES bytes as 32-bit words; look_up(table, codes): for each byte of codes, a nibble,
 * that byte of a table of 16. The rest is written with the compiler's vectors.
 */
#include "internal.h"

typedef uint32_t words __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * LANES), may_alias));
typedef float floats __attribute__((vector_size(4 * LANES), may_alias));

enum { VECTOR = 4 * LANES, WORD_ROW = 4 * KT_ROWS, SPAN_PLANE = KT_SPAN * KT_ROWS / 8 };

KT_INLINE words load_words(const uint8_t *p) { words w; memcpy(&w, p, sizeof w); return w; }
KT_INLINE floats load_floats(const void *p) { floats w; memcpy(&w, p, sizeof w); return w; }
KT_INLINE void store_floats(void *p, floats w) { memcpy(p, &w, sizeof w); }
KT_INLINE floats to_floats(words w) { return __builtin_convertvector((integers)w, floats); }
KT_INLINE floats all_lanes(float value) { return (floats){0} + value; }

/* Codes of quad q (columns 4 q to 4 q + 3), a byte each; `span` is that of the first of the LANES rows. */
KT_INLINE words quad(const int type, const uint8_t *span, const int q) {
    const int bits = kt_code_bits(type);
    if (bits == 8) return load_words(span + q * WORD_ROW);
    if (bits == 2 || bits == 3) {
        words code = load_words(span + q / 4 * WORD_ROW) >> q % 4 * 2 & 0x03030303u;
        if (bits == 2) return code;
        words high = load_words(span + 2 * SPAN_PLANE);
        return code | ((q < 2 ? high << (2 - q) : high >> (q - 2)) & 0x04040404u);
    }
    words code = load_words(span + q / 2 * WORD_ROW) >> q % 2 * 4 & 0x0f0f0f0fu;
    if (bits == 5) {
        words high = load_words(span + 4 * SPAN_PLANE);
        code |= (q < 4 ? high << (4 - q) : high >> (q - 4)) & 0x10101010u;
    }
    if (bits == 6) {
        words high = load_words(span + 4 * SPAN_PLANE + q / 4 * WORD_ROW);
        const int place = q % 4 * 2;
        code |= (place < 4 ? high << (4 - place) : high >> (place - 4)) & 0x30303030u;
    }
    return kt_has_table(type) ? look_up(kt_table(type), code) : code;
}

/* Four fields of 6 bits in three vectors `unit` bytes apart. */
KT_INLINE floats six_bits(const uint8_t *from, const size_t unit, const int v) {
    if (v < 3) return to_floats(byte_words(from + (size_t)v * unit) & 63);
    return to_floats(byte_words(from) >> 6 | (byte_words(from + unit) >> 4 & 12) | (byte_words(from + 2 * unit) >> 2 & 48));
}

/* Scale and minimum (with bias * scale) of run `run` of the columns that share a unit of scales, which is that of the
 * first of the LANES rows for fields of a byte: `row` is that row. For types whose unit is 256 columns. */
KT_INLINE void unit_scale(const int type, const uint8_t *unit, const size_t row, const int run, floats d, floats dmin, floats *scale,
                          floats *minimum) {
    switch (type) {
    case KT_Q5_K: case KT_Q4_K:
        *scale = d * six_bits(unit + 64 + run % 4 * 16 + row, 64, run / 4);
        *minimum = dmin * six_bits(unit + 64 + run % 4 * 16 + row, 64, 2 + run / 4);
        return;
    case KT_Q6_K:
        *scale = d * to_floats(signed_byte_words(unit + 32 + run * 16 + row));
        break;
    case KT_Q3_K: *scale = d * (six_bits(unit + 32 + run % 4 * 16 + row, 64, run / 4) - 32.0f); break;
    case KT_Q2_K: {
        words both = byte_words(unit + 64 + run * 16 + row);
        *scale = d * to_floats(both & 15);
        *minimum = dmin * to_floats(both >> 4);
        return;
    }
    default: *scale = d * (six_bits(unit + 32 + run / 4 * 48 + row, 16, run % 4) - 32.0f); break;
    }
    *minimum = *scale * (float)kt_bias(type);
}

/* As kt_expand_scales for LANES rows from `row`: [runs] vectors, `stride` floats apart. */
KT_INLINE void expand_scales(const int type, const uint8_t *scales, const size_t row, size_t first, size_t cols, const size_t stride,
                             float *scale, float *minimum) {
    const size_t per = kt_scale_columns(type), run = kt_run(type), unit_bytes = kt_scale_unit_bytes(type);
    if (type == KT_INT8) {
        floats s = load_floats(scales + 4 * row);
        for (size_t c = 0; c < cols; c += run, scale += stride, minimum += stride) {
            store_floats(scale, s);
            store_floats(minimum, s * (float)kt_bias(type));
        }
        return;
    }
    for (size_t c = 0; c < cols; c += per) {
        const uint8_t *unit = scales + (first + c) / per * unit_bytes;
        const size_t runs = ((cols - c < per ? cols - c : per) + run - 1) / run;
        if (per == 256) {
            floats d = half_floats(unit + 2 * row), dmin = {0};
            if (type == KT_Q5_K || type == KT_Q4_K || type == KT_Q2_K) dmin = half_floats(unit + 32 + 2 * row);
            KT_UNROLL for (int i = 0; i < 256 / (int)run; i++, scale += stride, minimum += stride) {
                floats s, m;
                unit_scale(type, unit, row, i, d, dmin, &s, &m);
                store_floats(scale, s);
                store_floats(minimum, m);
            }
            continue;
        }
        floats s;
        if (type == KT_FP8_BLOCK128) {
            float value;
            memcpy(&value, unit, 4);
            s = all_lanes(value);
        } else if (type == KT_MXFP4) {
            words e = byte_words(unit + row), subnormal = (words)(e < 2);
            s = (floats)((subnormal & (0x200000u << (e & 1))) | (~subnormal & ((e - 1) << 23)));
        } else {
            s = half_floats(unit + 2 * row);
        }
        for (size_t i = 0; i < runs; i++, scale += stride, minimum += stride) {
            store_floats(scale, s);
            store_floats(minimum, s * (float)kt_bias(type));
        }
    }
}
