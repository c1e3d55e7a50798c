/* What a storage type is to pack.c, blocks.c and unpack.c: ggml's block as it is read, and packed scales. Include this
 * file first.
 */
#ifndef KT_PACK_H
#define KT_PACK_H
/* No one asks which operations raised a floating-point exception: both sides of a condition may be computed. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif
#include "internal.h"

/* ---- blocks of the source */

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
KT_INLINE int is_source(int type) {
    return type >= 0 && type < KT_TYPE_COUNT && type != KT_INT8 && type != KT_INT4_64 && type != KT_INT4_128;
}

KT_INLINE void nibbles(const uint8_t *from, const size_t n, uint8_t *code) {  /* n bytes: n low nibbles, then n high ones */
    for (size_t i = 0; i < n; i++) code[i] = from[i] & 15;
    for (size_t i = 0; i < n; i++) code[n + i] = from[i] >> 4;
}

/* Eight 6-bit scales and eight 6-bit minima of q4_k and q5_k: four of each whole in bytes 0-3 and 4-7, the others' low
 * nibbles in bytes 8-11 and their two high bits on top of bytes 0-7. */
KT_INLINE void k_scales(const uint8_t *from, block *b) {
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

/* 16 rows of the source, fewer at the end of a matrix. */
typedef struct {
    size_t rows, cols, row_bytes;
    const uint8_t *row;
    const float *scales;    /* of these rows, one for 128 columns; KT_FP8_BLOCK128 only */
    float e4m3[256];        /* values of bytes; KT_FP8_BLOCK128 only */
} source;

/* Columns [c, c + n) of row r; c is a multiple of the block, n of it too unless it is the last. In blocks.c. */
void kt_read_floats(int type, const source *from, size_t r, size_t c, size_t n, float *out);

/* ---- packed scales */

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

KT_INLINE void put_six_bits(uint8_t *to, size_t unit, size_t v, size_t i, uint8_t value) {
    if (v < 3) {
        to[v * unit + i] |= value & 63;
        return;
    }
    for (size_t part = 0; part < 3; part++) to[part * unit + i] |= (uint8_t)((value >> 2 * part & 3) << 6);
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
#endif
