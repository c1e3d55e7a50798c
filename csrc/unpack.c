/* The packed layout read back, one weight at a time: the definition that packing and every kernel agree with. */
#include "pack.h"

static void run_scale(int type, const uint8_t *scales, size_t run, size_t r, float *scale, float *minimum) {
    size_t column = run * kt_run(type), per = kt_scale_columns(type);
    const uint8_t *unit = scales + column / per * kt_scale_unit_bytes(type);
    float d, dmin;
    unit_factors(type, unit, r, &d, &dmin);
    unit_scale(type, unit, column % per / kt_run(type), r, d, dmin, scale, minimum);
}

void kt_expand_scales(int type, const uint8_t *scales, size_t first, size_t cols, float *scale, float *minimum) {
    size_t from = first / kt_run(type), to = (first + cols + kt_run(type) - 1) / kt_run(type);
    for (size_t run = from; run < to; run++)
        for (size_t r = 0; r < KT_ROWS; r++, scale++, minimum++) {
            run_scale(type, scales, run, r, scale, minimum);
            *minimum += (float)kt_bias(type) * *scale;
        }
}

/* THE DEFINITION OF PACKED CODES: of column c of row r, in a span. */
static uint32_t plane(const uint8_t *from, int bits, size_t r, size_t c) {
    size_t q = c / 4, b = c % 4, per_word = 8 / (size_t)bits;
    return from[(q / per_word * KT_ROWS + r) * 4 + b] >> q % per_word * (size_t)bits & ((1u << bits) - 1);
}

static uint32_t code_of(int type, const uint8_t *span, size_t r, size_t c) {
    const uint8_t *second = span + 4 * (KT_SPAN * KT_ROWS / 8);
    switch (kt_code_bits(type)) {
    case 8: return plane(span, 8, r, c);
    case 6: return plane(span, 4, r, c) | plane(second, 2, r, c) << 4;
    case 5: return plane(span, 4, r, c) | plane(second, 1, r, c) << 4;
    case 4: return plane(span, 4, r, c);
    case 3: return plane(span, 2, r, c) | plane(span + 2 * (KT_SPAN * KT_ROWS / 8), 1, r, c) << 2;
    default: return plane(span, 2, r, c);
    }
}

static float weight(int type, const uint8_t *group, size_t cols, size_t r, size_t c) {
    const uint8_t *span = group + c / KT_SPAN * kt_span_bytes(type);
    size_t in = c % KT_SPAN;
    if (type == KT_F32) {
        float value;
        memcpy(&value, span + (in * KT_ROWS + r) * 4, 4);
        return value;
    }
    if (type == KT_BF16) {
        size_t place = in / 8 * 8 + in % 2 * 4 + in % 8 / 2;   /* the inverse of kt_bf16_column */
        /* places 0 to 7 of columns 0 2 4 6 1 3 5 7: word p has the columns at places 2 p and 2 p + 1 */
        return kt_from_bits((uint32_t)kt_read_u16(span + (place / 2 * KT_ROWS + r) * 4 + place % 2 * 2) << 16);
    }
    float scale, minimum;
    run_scale(type, group + kt_codes_bytes(type, cols), c / kt_run(type), r, &scale, &minimum);
    uint32_t code = code_of(type, span, r, in);
    if (type == KT_FP8_BLOCK128) return kt_e4m3((uint8_t)code) * scale;
    if (kt_has_table(type)) code = kt_table(type)[code];
    return scale * (float)((int)code - kt_bias(type)) - minimum;
}

void kt_unpack_strip(int type, const uint8_t *group, size_t cols, size_t first, size_t n, float *strip) {
    for (size_t r = 0; r < KT_ROWS; r++)
        for (size_t c = 0; c < n; c++) strip[r * 256 + c] = weight(type, group, cols, r, first + c);
}

int kt_unpack(int type, size_t rows, size_t cols, const void *packed, float *dst) {
    if (!packed || !dst || !rows || !cols || type < 0 || type >= KT_F16) return KT_BAD_ARGUMENT;
    if (cols % kt_block(type)) return KT_BAD_COLUMNS;
    for (size_t r = 0; r < rows; r++) {
        const uint8_t *group = (const uint8_t *)packed + r / KT_ROWS * kt_group_bytes(type, cols);
        for (size_t c = 0; c < cols; c++) dst[r * cols + c] = weight(type, group, cols, r % KT_ROWS, c);
    }
    return KT_OK;
}
