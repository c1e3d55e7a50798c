/* Storage types: reading ggml's blocks, and the packed layout of internal.h from them and back.
 *
 * HOW IT PACKS: the codes of a group of 16 rows are the transpose of 16 rows of 32-bit words. So each row is read and
 * its words made, 256 columns at a time (fold_row); then the 16 are transposed. Words of two bf16 are made after, from columns
 * of floats (pair_columns). Scales are put straight into place, and bounds found when all are.
 * The loops are plain, and inlined where the type is a constant, so that the compiler makes vectors of them.
 */
/* No one asks which operations raised a floating-point exception: both sides of a condition may be computed. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif
#include <math.h>

#include "internal.h"

/* One block of a row, or 32 columns of a type without blocks: codes, and the numbers its scales are made of. */
typedef struct {
    uint8_t code[256];
    uint16_t d, dmin;       /* float16; d is e8m0 for mxfp4 */
    uint8_t scale[16], minimum[16];
} block;

KT_INLINE size_t block_bytes(const int type) {
    switch (type) {
    case KT_F32: return 4;
    case KT_BF16: case KT_F16: return 2;
    case KT_Q8_0: return 34;
    case KT_Q5_0: return 22;
    case KT_Q4_0: case KT_IQ4_NL: return 18;
    case KT_Q6_K: return 210;
    case KT_Q5_K: return 176;
    case KT_Q4_K: return 144;
    case KT_Q3_K: return 110;
    case KT_Q2_K: return 84;
    case KT_IQ4_XS: return 136;
    case KT_MXFP4: return 17;
    default: return 1;
    }
}

/* The lossy types are no source: nothing stores them. */
static int is_source(int type) {
    return type >= 0 && type < KT_TYPE_COUNT && type != KT_INT8 && type != KT_INT4_64 && type != KT_INT4_128;
}

KT_INLINE void nibbles(const uint8_t *from, const size_t n, uint8_t *code) {  /* n bytes: n low nibbles, then n high ones */
    for (size_t i = 0; i < n; i++) code[i] = from[i] & 15;
    for (size_t i = 0; i < n; i++) code[n + i] = from[i] >> 4;
}

/* Eight 6-bit scales and eight 6-bit minima of q4_k and q5_k: four of each whole in bytes 0-3 and 4-7, the others' low
 * nibbles in bytes 8-11 and their two high bits on top of bytes 0-7. */
static void k_scales(const uint8_t *from, block *b) {
    for (int i = 0; i < 4; i++) {
        b->scale[i] = from[i] & 63;
        b->minimum[i] = from[i + 4] & 63;
        b->scale[i + 4] = (uint8_t)((from[i + 8] & 15) | (from[i] >> 6) << 4);
        b->minimum[i + 4] = (uint8_t)((from[i + 8] >> 4) | (from[i + 4] >> 6) << 4);
    }
}

KT_INLINE void read_block(const int type, const uint8_t *from, block *b) {
    switch (type) {
    case KT_Q8_0:
        b->d = kt_read_u16(from);
        for (int i = 0; i < 32; i++) b->code[i] = from[2 + i] ^ 0x80;
        return;
    case KT_Q4_0: case KT_IQ4_NL:
        b->d = kt_read_u16(from);
        nibbles(from + 2, 16, b->code);
        return;
    case KT_MXFP4:
        b->d = from[0];
        nibbles(from + 1, 16, b->code);
        return;
    case KT_Q5_0:
        b->d = kt_read_u16(from);
        nibbles(from + 6, 16, b->code);
        for (int i = 0; i < 32; i += 8)
            for (int bit = 0; bit < 8; bit++) b->code[i + bit] |= from[2 + i / 8] & 1 << bit ? 16 : 0;
        return;
    case KT_Q4_K:
        b->d = kt_read_u16(from), b->dmin = kt_read_u16(from + 2);
        k_scales(from + 4, b);
        for (int s = 0; s < 4; s++) nibbles(from + 16 + 32 * s, 32, b->code + 64 * s);
        return;
    case KT_Q5_K:
        b->d = kt_read_u16(from), b->dmin = kt_read_u16(from + 2);
        k_scales(from + 4, b);
        for (int s = 0; s < 4; s++) nibbles(from + 48 + 32 * s, 32, b->code + 64 * s);
        for (int s = 0; s < 8; s++)
            for (int i = 0; i < 32; i++) b->code[32 * s + i] |= (uint8_t)((from[16 + i] >> s & 1) << 4);
        return;
    case KT_Q6_K:
        b->d = kt_read_u16(from + 208);
        memcpy(b->scale, from + 192, 16);
        for (int half = 0; half < 2; half++) {
            nibbles(from + 64 * half, 64, b->code + 128 * half);
            for (int s = 0; s < 4; s++)
                for (int i = 0; i < 32; i++)
                    b->code[128 * half + 32 * s + i] |= (uint8_t)((from[128 + 32 * half + i] >> 2 * s & 3) << 4);
        }
        return;
    case KT_Q3_K: {
        b->d = kt_read_u16(from + 108);
        for (int i = 0; i < 16; i++)  /* low nibbles of 12 bytes, two high bits of each in the last four */
            b->scale[i] = (uint8_t)((from[96 + i % 8] >> i / 8 * 4 & 15) | (from[104 + i % 4] >> i / 4 * 2 & 3) << 4);
        for (int s = 0; s < 8; s++)
            for (int i = 0; i < 32; i++)
                b->code[32 * s + i] = (uint8_t)((from[32 + s / 4 * 32 + i] >> s % 4 * 2 & 3) | (from[i] >> s & 1) << 2);
        return;
    }
    case KT_Q2_K:
        b->d = kt_read_u16(from + 80), b->dmin = kt_read_u16(from + 82);
        for (int i = 0; i < 16; i++) b->scale[i] = from[i] & 15, b->minimum[i] = from[i] >> 4;
        for (int s = 0; s < 8; s++)
            for (int i = 0; i < 32; i++) b->code[32 * s + i] = from[16 + s / 4 * 32 + i] >> s % 4 * 2 & 3;
        return;
    case KT_IQ4_XS: {
        uint16_t high = kt_read_u16(from + 2);
        b->d = kt_read_u16(from);
        for (int i = 0; i < 8; i++) b->scale[i] = (uint8_t)((from[4 + i / 2] >> i % 2 * 4 & 15) | (high >> 2 * i & 3) << 4);
        for (int s = 0; s < 8; s++) nibbles(from + 8 + 16 * s, 16, b->code + 32 * s);
        return;
    }
    }
}

/* THE DEFINITION OF PACKED SCALES: of run `run` (kt_run columns) of row r. */
KT_INLINE uint8_t six_bits(const uint8_t *from, size_t unit, size_t v, size_t i) {
    if (v < 3) return from[v * unit + i] & 63;
    return (uint8_t)(from[i] >> 6 | from[unit + i] >> 6 << 2 | from[2 * unit + i] >> 6 << 4);
}

/* The numbers of row r that all runs of a unit share. */
KT_INLINE void unit_factors(const int type, const uint8_t *unit, size_t r, float *d, float *dmin) {
    *dmin = 0;
    switch (type) {
    case KT_INT8: memcpy(d, unit + 4 * r, 4); return;
    case KT_FP8_BLOCK128: memcpy(d, unit, 4); return;
    case KT_MXFP4: *d = kt_half_e8m0(unit[r]); return;
    case KT_Q5_K: case KT_Q4_K: case KT_Q2_K: *dmin = kt_f16(unit + 32 + 2 * r);  /* fall through */
    default: *d = kt_f16(unit + 2 * r); return;
    }
}

/* Run `in` of a unit. */
KT_INLINE void unit_scale(const int type, const uint8_t *unit, size_t in, size_t r, float d, float dmin, float *scale, float *minimum) {
    *minimum = 0;
    switch (type) {
    case KT_Q5_K: case KT_Q4_K:
        *scale = d * six_bits(unit + 64, 64, in / 4, in % 4 * 16 + r);
        *minimum = dmin * six_bits(unit + 64, 64, 2 + in / 4, in % 4 * 16 + r);
        return;
    case KT_Q6_K: *scale = d * (float)(int8_t)unit[32 + in * 16 + r]; return;
    case KT_Q3_K: *scale = d * (float)(six_bits(unit + 32, 64, in / 4, in % 4 * 16 + r) - 32); return;
    case KT_Q2_K:
        *scale = d * (float)(unit[64 + in * 16 + r] & 15);
        *minimum = dmin * (float)(unit[64 + in * 16 + r] >> 4);
        return;
    case KT_IQ4_XS: *scale = d * (float)(six_bits(unit + 32 + in / 4 * 48, 16, in % 4, r) - 32); return;
    default: *scale = d; return;
    }
}

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

static void put_six_bits(uint8_t *to, size_t unit, size_t v, size_t i, uint8_t value) {
    if (v < 3) {
        to[v * unit + i] |= value & 63;
        return;
    }
    for (size_t part = 0; part < 3; part++) to[part * unit + i] |= (uint8_t)((value >> 2 * part & 3) << 6);
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

/* The scales of one block of row r into a zeroed unit. */
KT_INLINE void write_scales(const int type, const block *b, size_t r, uint8_t *unit) {
    if (type == KT_MXFP4) {
        unit[r] = (uint8_t)b->d;
        return;
    }
    memcpy(unit + 2 * r, &b->d, 2);
    switch (type) {
    case KT_Q5_K: case KT_Q4_K:
        memcpy(unit + 32 + 2 * r, &b->dmin, 2);
        for (size_t s = 0; s < 8; s++) {
            put_six_bits(unit + 64, 64, s / 4, s % 4 * 16 + r, b->scale[s]);
            put_six_bits(unit + 64, 64, 2 + s / 4, s % 4 * 16 + r, b->minimum[s]);
        }
        return;
    case KT_Q6_K: for (size_t s = 0; s < 16; s++) unit[32 + s * 16 + r] = b->scale[s]; return;
    case KT_Q3_K: for (size_t s = 0; s < 16; s++) put_six_bits(unit + 32, 64, s / 4, s % 4 * 16 + r, b->scale[s]); return;
    case KT_Q2_K:
        memcpy(unit + 32 + 2 * r, &b->dmin, 2);
        for (size_t s = 0; s < 16; s++) unit[64 + s * 16 + r] = (uint8_t)(b->scale[s] | b->minimum[s] << 4);
        return;
    case KT_IQ4_XS: for (size_t s = 0; s < 8; s++) put_six_bits(unit + 32 + s / 4 * 48, 16, s % 4, r, b->scale[s]); return;
    }
}

/* 16 rows of the source, fewer at the end of a matrix. */
typedef struct {
    size_t rows, cols, row_bytes;
    const uint8_t *row;
    const float *scales;    /* of these rows, one for 128 columns; KT_FP8_BLOCK128 only */
    float e4m3[256];        /* values of bytes; KT_FP8_BLOCK128 only */
} source;

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

/* Columns [c, c + n) of a row of blocks, whole ones, as floats. */
KT_INLINE void read_blocks(const int type, const uint8_t *row, size_t c, size_t n, float *out) {
    const size_t per = kt_block(type), run = kt_run(type);
    const int minima = type == KT_Q5_K || type == KT_Q4_K || type == KT_Q2_K;
    block b;
    for (size_t i = 0; i < n; i += per) {
        read_block(type, row + (c + i) / per * block_bytes(type), &b);
        float d = type == KT_MXFP4 ? kt_half_e8m0((uint8_t)b.d) : kt_f16((const uint8_t *)&b.d);
        float dmin = minima ? kt_f16((const uint8_t *)&b.dmin) : 0;
        for (size_t j = 0; j < per; j += run) {
            float scale = d, minimum = minima ? dmin * b.minimum[j / run] : 0;
            if (minima) scale = d * b.scale[j / run];
            else if (type == KT_Q6_K) scale = d * (float)(int8_t)b.scale[j / run];
            else if (kt_is_k(type)) scale = d * (float)(b.scale[j / run] - 32);
            if (kt_has_table(type)) {   /* a table of 16 floats: one look-up a weight */
                float value[16];
                for (int k = 0; k < 16; k++) value[k] = scale * (float)(kt_table(type)[k] - kt_bias(type));
                for (size_t k = j; k < j + run; k++) out[i + k] = value[b.code[k]];
                continue;
            }
            for (size_t k = j; k < j + run; k++) out[i + k] = scale * (float)(b.code[k] - kt_bias(type)) - minimum;
        }
    }
}

/* Columns [c, c + n) of row r; c is a multiple of the block, n of it too unless it is the last. */
static void read_floats(int type, const source *from, size_t r, size_t c, size_t n, float *out) {
    const uint8_t *row = from->row + r * from->row_bytes;
    switch (type) {
#define CASE(TYPE) case TYPE: read_blocks(TYPE, row, c, n, out); return;
    CASE(KT_Q8_0) CASE(KT_Q5_0) CASE(KT_Q4_0) CASE(KT_Q6_K) CASE(KT_Q5_K) CASE(KT_Q4_K) CASE(KT_Q3_K) CASE(KT_Q2_K)
    CASE(KT_IQ4_NL) CASE(KT_IQ4_XS) CASE(KT_MXFP4)
#undef CASE
    case KT_F32: memcpy(out, row + 4 * c, 4 * n); return;
    case KT_BF16: for (size_t i = 0; i < n; i++) out[i] = kt_from_bits((uint32_t)kt_read_u16(row + 2 * (c + i)) << 16); return;
    case KT_F16: for (size_t i = 0; i < n; i++) out[i] = kt_f16(row + 2 * (c + i)); return;
    default:
        for (size_t i = 0, end; i < n; i = end) {  /* up to the next scale */
            float scale = from->scales[(c + i) / 128];
            end = i + 128 - (c + i) % 128;
            if (end > n) end = n;
            for (size_t k = i; k < end; k++) out[k] = from->e4m3[row[c + k]] * scale;
        }
    }
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
            read_floats(src_type, from, r, c, n, values);
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
                read_floats(src_type, from, r, c, n, values);
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
            read_floats(src_type, from, r, c, n, values);
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

size_t kt_source_bytes(int type, size_t rows, size_t cols) {
    size_t bytes;
    if (!is_source(type) || cols % kt_block(type) || cols > SIZE_MAX / 256) return 0;
    return __builtin_mul_overflow(rows, cols / kt_block(type) * block_bytes(type), &bytes) ? 0 : bytes;
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
