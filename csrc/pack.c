/* Packing: the layout of internal.h, made of row-major sources. pack.h has what is particular to a type.
 *
 * HOW IT PACKS: the codes of a group of 16 rows are the transpose of 16 rows of 32-bit words. So each row is read and
 * its words made, 256 columns at a time (fold_row); then the 16 are transposed. Words of two bf16 are made after, from columns
 * of floats (pair_columns). Scales are put straight into place, and bounds found when all are.
 * The loops are plain, and inlined where the type is a constant, so that the compiler makes vectors of them.
 */
#include "pack.h"

#include <math.h>

enum { STRIP = 256 };  /* columns converted at a time */

/* Words of a row, `bits` for a span: of each code of 32, the bits from `shift` on, in the order of a plane. */
KT_INLINE void fold(const uint8_t *code, const int shift, const int bits, uint32_t *words) {
    const uint32_t mask = 0x01010101u * ((1u << bits) - 1);
    uint32_t quads[KT_SPAN / 4];
    memcpy(quads, code, sizeof quads);
    for (int w = 0; w < bits; w++) {
        words[w] = 0;
        for (int i = 0; i < 8 / bits; i++) words[w] |= (quads[w * (8 / bits) + i] >> shift & mask) << i * bits;
    }
}

/* The words of n columns of codes, a multiple of 32. */
KT_INLINE void fold_row(const int type, const uint8_t *code, size_t n, uint32_t *words) {
    const int bits = kt_code_bits(type), low = bits >= 8 ? 8 : bits >= 4 ? 4 : 2;
    for (size_t c = 0; c < n; c += KT_SPAN, words += bits) {
        fold(code + c, 0, low, words);
        if (bits - low == 2) fold(code + c, low, 2, words + low);
        if (bits - low == 1) fold(code + c, low, 1, words + low);
    }
}

/* Word w of row r becomes word 16 w + r. */
static void transpose(uint32_t words[KT_ROWS][STRIP], size_t n, uint8_t *to) {
    for (size_t w = 0; w < n; w++)
        for (size_t r = 0; r < KT_ROWS; r++) memcpy(to + (w * KT_ROWS + r) * 4, &words[r][w], 4);
}

/* The bounds at the end of a group whose scales are written. */
KT_INLINE void write_bounds(const int type, size_t cols, uint8_t *group) {
    const uint8_t *scales = group + kt_codes_bytes(type, cols);
    const size_t per = type == KT_INT8 ? cols : kt_scale_columns(type), runs = kt_is_k(type) ? per / kt_run(type) : 1;
    float d[KT_ROWS], dmin[KT_ROWS], most[KT_ROWS] = {0}, least[KT_ROWS] = {0};
    for (size_t c = 0; c < cols; c += per, scales += kt_scale_unit_bytes(type)) {
        for (size_t r = 0; r < KT_ROWS; r++) unit_factors(type, scales, r, &d[r], &dmin[r]);
        for (size_t run = 0; run < runs; run++)
            for (size_t r = 0; r < KT_ROWS; r++) {
                float scale, minimum;
                unit_scale(type, scales, run, r, d[r], dmin[r], &scale, &minimum);
                /* NaN stays: the row's results are then NaN, whatever the tiles make of its codes. */
                most[r] = fabsf(scale) > most[r] || scale != scale ? fabsf(scale) : most[r];
                least[r] = fabsf(minimum) > least[r] || minimum != minimum ? fabsf(minimum) : least[r];
            }
    }
    float codes = type == KT_FP8_BLOCK128 ? 448 : (float)(1 << kt_value_bits(type));
    for (size_t r = 0; r < KT_ROWS; r++) most[r] = most[r] * codes + least[r];
    memcpy(group + kt_group_bytes(type, cols) - sizeof most, most, sizeof most);
}

/* A matrix that ends within a group is filled up with zeros. */
static void zero_rows(uint32_t words[KT_ROWS][STRIP], size_t first) {
    if (first < KT_ROWS) memset(words[first], 0, (KT_ROWS - first) * sizeof *words);
}

/* Blocks, stored as they are. */
KT_INLINE int pack_blocks(const int type, const source *from, uint8_t *group) {
    const size_t per = kt_block(type), bytes = block_bytes(type), cols = from->cols;
    uint32_t words[KT_ROWS][STRIP];
    uint8_t *scales = group + kt_codes_bytes(type, cols);
    block b;
    zero_rows(words, from->rows);
    memset(scales, 0, kt_scales_bytes(type, cols));
    for (size_t c = 0; c < cols; c += STRIP) {
        size_t n = cols - c < STRIP ? cols - c : STRIP;
        for (size_t r = 0; r < from->rows; r++) {
            for (size_t i = 0; i < n; i += per) {
                size_t at = (c + i) / per;
                read_block(type, from->row + r * from->row_bytes + at * bytes, &b);
                fold_row(type, b.code, per, words[r] + i / KT_SPAN * kt_code_bits(type));
                write_scales(type, &b, r, scales + at * kt_scale_unit_bytes(type));
            }
        }
        transpose(words, n / KT_SPAN * kt_code_bits(type), group + c / KT_SPAN * kt_span_bytes(type));
    }
    write_bounds(type, cols, group);
    return KT_OK;
}

/* Bytes of e4m3, stored as they are. Refuses NaN (0x7f and 0xff): kernels with vectors would take it for 480. */
static int pack_fp8(const source *from, uint8_t *group) {
    const size_t cols = from->cols;
    uint32_t words[KT_ROWS][STRIP], found = 0;
    uint8_t *scales = group + kt_codes_bytes(KT_FP8_BLOCK128, cols);
    memset(scales, 0, kt_scales_bytes(KT_FP8_BLOCK128, cols));
    memcpy(scales, from->scales, (cols + 127) / 128 * sizeof(float));
    zero_rows(words, from->rows);
    for (size_t c = 0; c < cols; c += STRIP) {
        size_t n = cols - c < STRIP ? cols - c : STRIP;
        for (size_t r = 0; r < from->rows; r++) {
            if (n < STRIP) memset((uint8_t *)words[r] + n, 0, STRIP - n);
            memcpy(words[r], from->row + r * from->row_bytes + c, n);
            for (size_t w = 0; w < STRIP / 4; w++) found |= (words[r][w] & 0x7f7f7f7f) + 0x01010101;  /* bit 7: was 0x7f */
        }
        transpose(words, kt_spans(n) * 8, group + c / KT_SPAN * kt_span_bytes(KT_FP8_BLOCK128));
    }
    write_bounds(KT_FP8_BLOCK128, cols, group);
    return found & 0x80808080 ? KT_NOT_FINITE : KT_OK;
}

/* kt_bf16 of the bits of a float, in the high half. */
KT_INLINE uint32_t high_half(uint32_t bits) {
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1), quiet = bits | 0x400000;
    return ((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded) & 0xffff0000;
}

/* n columns of 16 floats, as bits, to words of two bf16. */
static void pair_columns(uint32_t columns[STRIP][KT_ROWS], size_t n, uint8_t *to) {
    for (size_t place = 0; place < n; place += 2) {
        const uint32_t *low = columns[kt_bf16_column(place)], *high = columns[kt_bf16_column(place + 1)];
        uint32_t words[KT_ROWS];
        for (size_t r = 0; r < KT_ROWS; r++) words[r] = high_half(low[r]) >> 16 | high_half(high[r]);
        memcpy(to + place / 2 * sizeof words, words, sizeof words);
    }
}

static int pack_floats(int src_type, int dst_type, const source *from, uint8_t *group) {
    const size_t cols = from->cols;
    uint32_t words[KT_ROWS][STRIP];
    uint32_t columns[STRIP][KT_ROWS];
    float values[STRIP];
    zero_rows(words, from->rows);
    for (size_t c = 0; c < cols; c += STRIP) {
        size_t n = cols - c < STRIP ? cols - c : STRIP;
        for (size_t r = 0; r < from->rows; r++) {
            kt_read_floats(src_type, from, r, c, n, values);
            memset(values + n, 0, (STRIP - n) * sizeof(float));
            memcpy(words[r], values, sizeof values);
        }
        uint8_t *to = group + c / KT_SPAN * kt_span_bytes(dst_type);
        if (dst_type == KT_F32) {
            transpose(words, kt_spans(n) * KT_SPAN, to);
            continue;
        }
        transpose(words, kt_spans(n) * KT_SPAN, (uint8_t *)columns);
        pair_columns(columns, kt_spans(n) * KT_SPAN, to);
    }
    return KT_OK;
}

/* Infinity or NaN if one is among them. As bits, whose order is that of the magnitudes: a maximum of integers is made
 * with vectors. */
static float largest_of(const float *values, size_t n) {
    int32_t largest = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t bits = (int32_t)(kt_to_bits(values[i]) & 0x7fffffff);
        largest = bits > largest ? bits : largest;
    }
    return kt_from_bits((uint32_t)largest);
}

/* Nearest code of a symmetric grid of `most` steps each side. */
KT_INLINE void round_codes(const float *values, size_t n, float scale, const int most, const int bias, uint8_t *code) {
    float inverse = scale > 0 ? 1 / scale : 0;
    for (size_t i = 0; i < n; i++) {
        float q = values[i] * inverse;
        q = q > (float)most ? (float)most : q;
        q = q < (float)-most ? (float)-most : q;
        q = (q + 0x1.8p23f) - 0x1.8p23f;  /* where the unit of a float is 1, adding rounds to nearest even */
        code[i] = (uint8_t)((int)q + bias);
    }
}

/* By rounding: KT_INT8, whose scale is that of a row, and KT_INT4_*, whose is that of a block. */
KT_INLINE int pack_lossy(const int dst_type, int src_type, const source *from, uint8_t *group) {
    const size_t cols = from->cols, per = dst_type == KT_INT8 ? STRIP : kt_block(dst_type);
    const int most = dst_type == KT_INT8 ? 127 : 7;
    float values[STRIP], scale[KT_ROWS] = {0};
    uint32_t words[KT_ROWS][STRIP];
    uint8_t code[STRIP], *scales = group + kt_codes_bytes(dst_type, cols);
    zero_rows(words, from->rows);
    memset(scales, 0, kt_scales_bytes(dst_type, cols));
    if (dst_type == KT_INT8) {
        for (size_t r = 0; r < from->rows; r++) {
            float largest = 0;
            for (size_t c = 0; c < cols; c += STRIP) {
                size_t n = cols - c < STRIP ? cols - c : STRIP;
                kt_read_floats(src_type, from, r, c, n, values);
                float here = largest_of(values, n);
                if (!isfinite(here)) return KT_NOT_FINITE;
                largest = here > largest ? here : largest;
            }
            scale[r] = largest / 127;
        }
        memcpy(scales, scale, sizeof scale);
        if (kt_spans(cols) % 2) memset(scales - kt_span_bytes(KT_INT8), 0, kt_span_bytes(KT_INT8));
    }
    for (size_t c = 0; c < cols; c += STRIP) {
        size_t n = cols - c < STRIP ? cols - c : STRIP;
        for (size_t r = 0; r < from->rows; r++) {
            kt_read_floats(src_type, from, r, c, n, values);
            for (size_t i = 0; i < n; i += per) {
                size_t here = n - i < per ? n - i : per;
                if (dst_type != KT_INT8) {
                    float largest = largest_of(values + i, here);
                    if (!isfinite(largest)) return KT_NOT_FINITE;
                    uint16_t d = kt_to_half(largest / 7);
                    memcpy(scales + (c + i) / per * kt_scale_unit_bytes(dst_type) + 2 * r, &d, 2);
                    scale[r] = kt_f16((const uint8_t *)&d);
                }
                round_codes(values + i, here, scale[r], most, kt_bias(dst_type), code + i);
            }
            memset(code + n, 0, STRIP - n);
            fold_row(dst_type, code, STRIP, words[r]);
        }
        transpose(words, kt_spans(n) * kt_code_bits(dst_type), group + c / KT_SPAN * kt_span_bytes(dst_type));
    }
    write_bounds(dst_type, cols, group);
    return KT_OK;
}

static int pack_group(int src_type, int dst_type, const source *from, uint8_t *group) {
    switch (dst_type) {
    case KT_F32: case KT_BF16: return pack_floats(src_type, dst_type, from, group);
    case KT_INT8: return pack_lossy(KT_INT8, src_type, from, group);
    case KT_INT4_64: return pack_lossy(KT_INT4_64, src_type, from, group);
    case KT_INT4_128: return pack_lossy(KT_INT4_128, src_type, from, group);
    case KT_FP8_BLOCK128: return pack_fp8(from, group);
#define CASE(TYPE) case TYPE: return pack_blocks(TYPE, from, group);
    CASE(KT_Q8_0) CASE(KT_Q5_0) CASE(KT_Q4_0) CASE(KT_Q6_K) CASE(KT_Q5_K) CASE(KT_Q4_K) CASE(KT_Q3_K) CASE(KT_Q2_K)
    CASE(KT_IQ4_NL) CASE(KT_IQ4_XS) CASE(KT_MXFP4)
#undef CASE
    default: return KT_NO_PACKING;
    }
}

size_t kt_packed_bytes(int isa, int type, size_t rows, size_t cols) {
    size_t bytes;
    if (!kt_isa_takes(isa, type) || !cols || cols % kt_block(type)) return 0;
    if (cols > SIZE_MAX / 64 || rows > SIZE_MAX / 2 || __builtin_mul_overflow(kt_groups(rows), kt_group_bytes(type, cols), &bytes)) return 0;
    return bytes;
}

int kt_pack(int src_type, int dst_type, size_t rows, size_t cols, size_t first_row, size_t n_rows, const void *src,
            const float *scales, void *dst) {
    if (!src || !dst || !rows || !cols || !n_rows) return KT_BAD_ARGUMENT;
    if (!is_source(src_type) || dst_type < 0 || dst_type >= KT_F16) return KT_BAD_ARGUMENT;
    if ((src_type == KT_FP8_BLOCK128) != (scales != NULL)) return KT_BAD_ARGUMENT;
    if (first_row >= rows || n_rows > rows - first_row || first_row % (scales ? 128 : KT_ROWS)) return KT_BAD_ARGUMENT;
    if (n_rows % KT_ROWS && first_row + n_rows != rows) return KT_BAD_ARGUMENT;
    if (cols % kt_block(src_type) || cols % kt_block(dst_type)) return KT_BAD_COLUMNS;
    int lossy = dst_type == KT_INT8 || dst_type == KT_INT4_64 || dst_type == KT_INT4_128;
    if (src_type != dst_type && !lossy && !kt_is_float(dst_type)) return KT_NO_PACKING;
    size_t group_bytes = kt_group_bytes(dst_type, cols);
    source from = {.cols = cols, .row_bytes = cols / kt_block(src_type) * block_bytes(src_type)};
    for (int byte = 0; scales && byte < 256; byte++) from.e4m3[byte] = kt_e4m3((uint8_t)byte);
    for (size_t r = 0; r < n_rows; r += KT_ROWS) {
        from.rows = n_rows - r < KT_ROWS ? n_rows - r : KT_ROWS;
        from.row = (const uint8_t *)src + r * from.row_bytes;
        from.scales = scales ? scales + r / 128 * ((cols + 127) / 128) : NULL;
        int status = pack_group(src_type, dst_type, &from, (uint8_t *)dst + (first_row + r) / KT_ROWS * group_bytes);
        if (status != KT_OK) return status;
    }
    return KT_OK;
}
