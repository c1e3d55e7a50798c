/* What the files of csrc share with each other: the packed layout, the table an instruction set fills in, and the pool. */
#ifndef KT_INTERNAL_H
#define KT_INTERNAL_H
#include <string.h>

#include "kt.h"

enum {
    KT_ROWS = 16,          /* rows of a group */
    KT_SPAN = 32,          /* columns of a span: activations are prepared, and codes stored, 32 at a time */
    KT_TOKENS = 256,       /* tokens of one kt_dot at most */
    KT_ALIGN = 64,
    KT_TILE_ROWS = 512,    /* rows of one kt_dot by tiles at most, of all its matrices, and rounded up to 32 of each */
};

#define KT_INLINE static inline __attribute__((always_inline))
#define KT_UNROLL _Pragma("GCC unroll 16")

/* THE PACKED LAYOUT. A weight of a quantised type is  scale * (code - bias)  or  scale * code - minimum, with an unsigned
 * code; scale and minimum are of a run of columns of one row. A group of 16 rows is
 *     codes    spans of 32 columns, kt_span_bytes each; all of them multiples of 64
 *     scales   filled up to a multiple of 64
 *     bounds   float [16]: no weight of the row is larger
 *   (f32 and bf16 have codes only.)
 * A span has planes: 4, 2, or 1 bits of each code, the lower bits first; 8, 16 and 32 bits are one plane. A plane is
 * rows of 16 little-endian 32-bit words, one for each matrix row. "Quad" q of a span is columns 4 q to 4 q + 3:
 *      8 bits   word q:     byte b is column 4 q + b
 *      4 bits   word q / 2: nibble q % 2 of byte b
 *      2 bits   word q / 4: bits 2 (q % 4) and up of byte b
 *      1 bit    word 0:     bit q of byte b
 *     16 bits   (bf16) word p: two columns of 8: (0,2) (4,6) (1,3) (5,7), then the next 8. Masking a word of nibbles, or of
 *               bytes, leaves two such columns, so activations in bf16 have this order too: kt_bf16_column
 *     32 bits   (f32) word c: column c
 */
KT_INLINE size_t kt_bf16_column(size_t place) {  /* column of an activation at this place of 8: 0 2 4 6 1 3 5 7 */
    return place / 8 * 8 + place % 4 * 2 + place % 8 / 4;
}

/* Bits of a code. */
KT_INLINE int kt_code_bits(const int type) {
    switch (type) {
    case KT_F32: return 32;
    case KT_BF16: return 16;
    case KT_Q8_0: case KT_INT8: case KT_FP8_BLOCK128: return 8;
    case KT_Q6_K: return 6;
    case KT_Q5_0: case KT_Q5_K: return 5;
    case KT_Q3_K: return 3;
    case KT_Q2_K: return 2;
    default: return 4;
    }
}
KT_INLINE size_t kt_span_bytes(const int type) { return (size_t)kt_code_bits(type) * (KT_SPAN * KT_ROWS / 8); }

/* What a code stands for: itself less the bias, or an entry of a table less the bias. IQ4_NL's and e2m1's values are
 * made unsigned by the bias; e2m1's are doubled, so that they are whole. */
KT_INLINE int kt_has_table(const int type) { return type == KT_IQ4_NL || type == KT_IQ4_XS || type == KT_MXFP4; }
KT_INLINE int kt_bias(const int type) {
    switch (type) {
    case KT_Q8_0: case KT_INT8: case KT_IQ4_NL: case KT_IQ4_XS: return 128;
    case KT_Q6_K: return 32;
    case KT_Q5_0: return 16;
    case KT_Q4_0: case KT_INT4_64: case KT_INT4_128: return 8;
    case KT_Q3_K: return 4;
    case KT_MXFP4: return 12;
    default: return 0;
    }
}
static const uint8_t kt_table_iq4[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
static const uint8_t kt_table_e2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
KT_INLINE const uint8_t *kt_table(const int type) { return type == KT_MXFP4 ? kt_table_e2m1 : kt_table_iq4; }

/* Bits of what a code stands for before the bias is taken off. */
KT_INLINE int kt_value_bits(const int type) { return kt_has_table(type) ? type == KT_MXFP4 ? 5 : 8 : kt_code_bits(type); }

/* Floats: their codes have no scale of 32 columns to be factored out. */
KT_INLINE int kt_is_float(const int type) { return type == KT_F32 || type == KT_BF16; }
/* Columns that share a scale, within a span: 16 or 32. Longer runs are repeated when scales are expanded. */
KT_INLINE size_t kt_run(const int type) { return type == KT_Q6_K || type == KT_Q3_K || type == KT_Q2_K ? 16 : 32; }
KT_INLINE int kt_is_k(const int type) {
    return type == KT_Q6_K || type == KT_Q5_K || type == KT_Q4_K || type == KT_Q3_K || type == KT_Q2_K || type == KT_IQ4_XS;
}
/* Columns of a block: a row has a whole number of them. */
KT_INLINE size_t kt_block(const int type) {
    if (kt_is_k(type)) return 256;
    switch (type) {
    case KT_Q8_0: case KT_Q5_0: case KT_Q4_0: case KT_IQ4_NL: case KT_MXFP4: return 32;
    case KT_INT4_64: return 64;
    case KT_INT4_128: return 128;
    default: return 1;
    }
}

/* Scales of a group of rows. `d` and `dmin` are float16 [16]. Fields of 6 and 4 bits are packed 64 rows' worth at a time:
 *     6 bits  three vectors of 64 bytes hold four, v0 to v3: the low 6 bits of each, and two bits of v3 on top of each
 *     4 bits  one vector holds two: nibbles
 * per 32 columns   Q8_0 Q5_0 Q4_0 IQ4_NL  d                                                     32 bytes
 *                  MXFP4                  e8m0 [16]                                             16
 * per 64, 128      INT4                   d                                                     32
 * per 256          Q5_K Q4_K  d, dmin, 6 bits: scales of runs 0-3, 4-7, minima of 0-3, 4-7     256
 *                  Q6_K       d, int8 [16 runs][16]                                            288
 *                  Q3_K       d, 6 bits (less 32): runs 0-3, 4-7, 8-11, 12-15                  224
 *                  Q2_K       d, dmin, low nibbles: scales, high ones: minima [16 runs][16]    320
 *                  IQ4_XS     d, [2][48]: 6 bits (less 32) of runs 0-3, of runs 4-7            128
 * per 128          FP8        float                                                              4
 * per row          INT8       float [16]                                                        64
 * IQ4_XS's 6 bits are in vectors of 16 bytes. */
KT_INLINE size_t kt_scale_columns(const int type) {
    if (kt_is_k(type)) return 256;
    switch (type) {
    case KT_INT4_64: return 64;
    case KT_INT4_128: case KT_FP8_BLOCK128: return 128;
    default: return 32;
    }
}
KT_INLINE size_t kt_scale_unit_bytes(const int type) {
    switch (type) {
    case KT_F32: case KT_BF16: case KT_INT8: return 0;
    case KT_MXFP4: return 16;
    case KT_Q5_K: case KT_Q4_K: return 256;
    case KT_Q6_K: return 288;
    case KT_Q3_K: return 224;
    case KT_Q2_K: return 320;
    case KT_IQ4_XS: return 128;
    case KT_FP8_BLOCK128: return 4;
    default: return 32;
    }
}

KT_INLINE size_t kt_round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
KT_INLINE size_t kt_spans(size_t cols) { return (cols + KT_SPAN - 1) / KT_SPAN; }
KT_INLINE size_t kt_groups(size_t rows) { return (rows + KT_ROWS - 1) / KT_ROWS; }
KT_INLINE size_t kt_codes_bytes(const int type, size_t cols) {   /* two spans of int8 are a tile */
    return (type == KT_INT8 ? kt_round_up(kt_spans(cols), 2) : kt_spans(cols)) * kt_span_bytes(type);
}
KT_INLINE size_t kt_scales_bytes(const int type, size_t cols) {
    if (kt_is_float(type)) return 0;
    if (type == KT_INT8) return 2 * KT_ROWS * sizeof(float);
    size_t units = (cols + kt_scale_columns(type) - 1) / kt_scale_columns(type);
    return kt_round_up(units * kt_scale_unit_bytes(type), KT_ALIGN) + KT_ROWS * sizeof(float);
}
KT_INLINE size_t kt_group_bytes(const int type, size_t cols) { return kt_codes_bytes(type, cols) + kt_scales_bytes(type, cols); }

KT_INLINE float kt_from_bits(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
KT_INLINE uint32_t kt_to_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
KT_INLINE uint16_t kt_read_u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

/* Nearest even; a NaN stays one, even if its payload is in the low half. */
KT_INLINE uint16_t kt_bf16(float value) {
    uint32_t bits = kt_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

KT_INLINE float kt_f16(const uint8_t *p) {
    uint32_t half = kt_read_u16(p), sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return kt_from_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return kt_from_bits(sign | kt_to_bits((float)mantissa * 0x1p-24f));
    return kt_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

/* fp16, nearest even; beyond the largest finite one, that one. */
KT_INLINE uint16_t kt_to_half(float x) {
    uint32_t bits = kt_to_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffffu;
    if (size >= 0x477fe000u) return (uint16_t)(sign | 0x7bff);
    if (size < 0x38800000u)   /* below 2^-14: in units of 2^-24, that of a float at 0.5 */
        return (uint16_t)(sign | (kt_to_bits(kt_from_bits(size) + 0.5f) - kt_to_bits(0.5f)));
    return (uint16_t)(sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13);
}

KT_INLINE float kt_e4m3(uint8_t byte) {
    uint32_t sign = (uint32_t)(byte & 0x80) << 24, exponent = byte >> 3 & 15, mantissa = byte & 7;
    if (exponent == 15 && mantissa == 7) return kt_from_bits(sign | 0x7fc00000u);  /* the only NaN; no infinities */
    if (exponent == 0) return kt_from_bits(sign | kt_to_bits((float)mantissa * 0x1p-9f));
    return kt_from_bits(sign | (exponent + 120) << 23 | mantissa << 20);
}

/* Half of 2^(byte - 127): e2m1's values are doubled. 0 and 1 are subnormal. */
KT_INLINE float kt_half_e8m0(uint8_t byte) { return kt_from_bits(byte < 2 ? 0x200000u << byte : (uint32_t)(byte - 1) << 23); }

/* Scale and minimum of each run of columns [first, first + cols) of a group of rows, as float [runs][16]; the minimum
 * includes bias * scale. `scales` is the group's; first is a multiple of 256. In unpack.c: the definition. */
void kt_expand_scales(int type, const uint8_t *scales, size_t first, size_t cols, float *scale, float *minimum);

/* Weights of columns [first, first + n), n <= 256, of a group of rows: float [16][256]. In unpack.c: the definition. */
void kt_unpack_strip(int type, const uint8_t *group, size_t cols, size_t first, size_t n, float *strip);

/* The work of one call of an instruction set: products of a few groups of rows of one or two matrices with the
 * activations of one expert's tokens.
 *     out[m][t * out_stride + r] = w[m][r, :] . acts[index ? index[t] : t, :]
 * out has room for kt_round_up(n_tokens, 32) rows of out_stride; all rows of a group are written. */
typedef struct kt_dot {
    size_t n_matrices, n_groups, cols, n_tokens;
    int few;                   /* as decode does it: the result of a token is the same to the bit whatever the others are */
    int type[2];
    const uint8_t *w[2];       /* the first group */
    size_t group_bytes[2];
    float *out[2];
    size_t out_stride;
    const uint8_t *acts;       /* prepared rows */
    size_t act_stride_bytes;
    const int32_t *index;
    uint8_t *panel;            /* panel_bytes(), aligned to KT_ALIGN, this thread's own */
} kt_dot;

/* Activations in bf16 are so many times as large: moe_amx.c has the reason. They overflow from 2^64 on. */
#define KT_BF16_SCALE 0x1p64f
#define KT_BF16_UNSCALE 0x1p-64f

KT_INLINE const uint8_t *kt_act_row(const kt_dot *dot, size_t token) {
    return dot->acts + (dot->index ? (size_t)dot->index[token] : token) * dot->act_stride_bytes;
}

/* What a prepared row is for: experts whose weights stream past a few tokens, and experts by tiles. */
enum { KT_FEW = 1, KT_TILES = 2 };

/* What an instruction set is. A row of prepared activations is act_bytes(cols); it is filled in whole spans. */
typedef struct kt_kernels {
    unsigned types;                                            /* bit kt_type: it takes these weights */
    size_t (*act_bytes)(size_t cols);
    size_t (*panel_bytes)(void);
    /* Columns [first, first + n) of a row of `cols`, zeros up to a whole span; first is a multiple of KT_SPAN. `uses`: bits KT_FEW, KT_TILES. */
    void (*prepare)(const float *src, size_t first, size_t n, size_t cols, int uses, uint8_t *row);
    /* gate = act(gate) * up */
    void (*activate)(const kt_moe *moe, float *gate, const float *up, size_t n);
    /* to += score * more */
    void (*accumulate)(float *to, const float *more, float score, size_t n);
    void (*dot)(const kt_dot *dot);
    void (*end)(void);                                         /* once a thread and run, last; may be null */
} kt_kernels;

#define KT_BIT(type) (1u << (type))
#define KT_ALL_TYPES (KT_BIT(KT_F16) - 1)
#define KT_INTEGER_TYPES (KT_ALL_TYPES & ~(KT_BIT(KT_F32) | KT_BIT(KT_BF16) | KT_BIT(KT_FP8_BLOCK128)))

extern const kt_kernels kt_kernels_scalar;
#if defined(__x86_64__)
extern const kt_kernels kt_kernels_avx2, kt_kernels_avx512, kt_kernels_avx512_bf16, kt_kernels_avx512_vnni, kt_kernels_amx, kt_kernels_amx_int8;
void kt_expand_scales_avx512(int type, const uint8_t *scales, size_t first, size_t cols, float *scale, float *minimum);
void kt_dot_avx512_vnni(const kt_dot *dot);   /* for avx512_bf16 and amx_int8 */
void kt_dot_avx512_bf16(const kt_dot *dot);   /* for amx: few tokens */
/* A prepared row of int16: [cols] as moe_avx512_vnni.c says, the scale of each 32, the sum of each 16 times its scale, of each 32. */
size_t kt_act_bytes_int16(size_t cols);
void kt_prepare_int16(const float *src, size_t first, size_t n, size_t cols, int uses, uint8_t *row);
/* One of bf16: that, for few tokens only, and then bf16 [cols] in the order of kt_bf16_column. */
size_t kt_act_bytes_bf16(size_t cols);
void kt_prepare_bf16(const float *src, size_t first, size_t n, size_t cols, int uses, uint8_t *row);
void kt_activate_avx512(const kt_moe *moe, float *gate, const float *up, size_t n);
void kt_accumulate_avx512(float *to, const float *more, float score, size_t n);
#endif
/* A prepared row of floats: [cols] and then the sum of each 16; zeros past cols. */
size_t kt_act_bytes_f32(size_t cols);
void kt_prepare_f32(const float *src, size_t first, size_t n, size_t cols, int uses, uint8_t *row);

#endif
