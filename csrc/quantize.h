/* What the quantisers share: blocks, arithmetic that is the same on every CPU, and fp16.
 *
 * ORDER OF SUMS: float arithmetic exactly as written, so that every CPU and every thread count gives the same bytes.
 *     Sums over a block have four lanes that are added at its end, ((0 + 1) + (2 + 3)); products are never fused with
 *     sums, which the lines below ask of the compiler. Include this file first.
 */
#ifndef KT_QUANTIZE_H
#define KT_QUANTIZE_H
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#else
#pragma STDC FP_CONTRACT OFF
#endif
#include "internal.h"

/* Blocks of ggml. Multi-byte fields are bytes: a row may start at any address. */
typedef struct { uint8_t d[2]; int8_t q[32]; } kt_block_q8_0;
typedef struct { uint8_t d[2]; uint8_t high[4]; uint8_t low[16]; } kt_block_q5_0;
typedef struct { uint8_t d[2]; uint8_t dmin[2]; uint8_t scales[12]; uint8_t q[128]; } kt_block_q4_k;
typedef struct { uint8_t low[128]; uint8_t high[64]; int8_t scales[16]; uint8_t d[2]; } kt_block_q6_k;
typedef struct { uint8_t d[2]; uint8_t q[16]; } kt_block_q4_0;
typedef struct { uint8_t d[2]; uint8_t dmin[2]; uint8_t scales[12]; uint8_t high[32]; uint8_t low[128]; } kt_block_q5_k;
_Static_assert(sizeof(kt_block_q8_0) == 34 && sizeof(kt_block_q5_0) == 22, "no padding");
_Static_assert(sizeof(kt_block_q4_k) == 144 && sizeof(kt_block_q6_k) == 210, "no padding");
_Static_assert(sizeof(kt_block_q4_0) == 18 && sizeof(kt_block_q5_k) == 176, "no padding");

typedef float f32x4 __attribute__((vector_size(16), may_alias));
typedef int32_t i32x4 __attribute__((vector_size(16), may_alias));

enum { LANES = 4 };
#define HALF_MAX 65504.0f
#define HALF_TINY 0x1p-24f    /* the least positive fp16 */

KT_INLINE f32x4 all(float x) { return (f32x4){x, x, x, x}; }
KT_INLINE f32x4 pick(i32x4 mask, f32x4 a, f32x4 b) { return (f32x4)((mask & (i32x4)a) | (~mask & (i32x4)b)); }
KT_INLINE f32x4 lesser(f32x4 a, f32x4 b) { return pick(a < b, a, b); }
KT_INLINE f32x4 greater(f32x4 a, f32x4 b) { return pick(a > b, a, b); }
KT_INLINE float sum(f32x4 v) { return (v[0] + v[1]) + (v[2] + v[3]); }
KT_INLINE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

/* Nearest even, |x| < 2^22: where the unit of a float is 1, adding rounds. */
KT_INLINE f32x4 nearest4(f32x4 x) { return (x + all(0x1.8p23f)) - all(0x1.8p23f); }
KT_INLINE float nearest(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

/* Largest magnitude as bits, whose order is that of the magnitudes, with infinities and NaN on top. */
KT_INLINE uint32_t peak_bits(const float *x, size_t n) {
    i32x4 peaks = {0};
    for (size_t i = 0; i < n / LANES * LANES; i += LANES) {
        i32x4 bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        i32x4 more = bits > peaks;
        peaks = (more & bits) | (~more & peaks);
    }
    int32_t peak = 0;
    for (int l = 0; l < LANES; l++) peak = peaks[l] > peak ? peaks[l] : peak;
    for (size_t left = n % LANES; left; left--) {
        int32_t bits = (int32_t)(kt_to_bits(x[n - left]) & 0x7fffffffu);
        peak = bits > peak ? bits : peak;
    }
    return (uint32_t)peak;
}
KT_INLINE int is_finite(uint32_t peak) { return peak < 0x7f800000u; }

KT_INLINE void put_half(uint8_t *to, float x) {
    uint16_t half = kt_to_half(x);
    to[0] = (uint8_t)half;
    to[1] = (uint8_t)(half >> 8);
}

/* One row, cols a multiple of 256; KT_BAD_ARGUMENT at a value that is not finite. In quantize_k.c. */
int kt_quantize_q4_k(const float *x, size_t cols, kt_block_q4_k *block);
int kt_quantize_q5_k(const float *x, size_t cols, kt_block_q5_k *block);
int kt_quantize_q6_k(const float *x, size_t cols, kt_block_q6_k *block);
#endif
