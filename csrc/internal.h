/* What the files of csrc share with each other: storage blocks, the table an instruction set fills in, and the pool. */
#ifndef KT_INTERNAL_H
#define KT_INTERNAL_H
#include <string.h>

#include "kt.h"

#define KT_CHUNK 32          /* activations are prepared, and weights decoded, 32 at a time */
#define KT_TOKENS 256        /* tokens of one kt_dot at most */
#define KT_OUT 128           /* results a token of one kt_dot at most, over both matrices */
#define KT_ALIGN 64

/* Not a storage type: what avx512_vnni decodes all its types into, 32 numbers with a scale and a minimum. */
enum { KT_UNPACKED = KT_TYPE_COUNT };

#define KT_INLINE static inline __attribute__((always_inline))

/* Keeps an array of scales in memory, where broadcasting one is a plain load. Left alone, gcc 12 puts it in one wide
 * vector and shuffles; loading that right after its narrower stores stalls. */
#define KT_IN_MEMORY(object) __asm__("" : "+m"(object))

/* Blocks of ggml. Multi-byte fields are bytes: a row may start at any address. */
typedef struct { uint8_t d[2]; int8_t q[32]; } kt_block_q8_0;
typedef struct { uint8_t d[2]; uint8_t high[4]; uint8_t low[16]; } kt_block_q5_0;
typedef struct { uint8_t d[2]; uint8_t dmin[2]; uint8_t scales[12]; uint8_t q[128]; } kt_block_q4_k;
typedef struct { uint8_t low[128]; uint8_t high[64]; int8_t scales[16]; uint8_t d[2]; } kt_block_q6_k;
typedef struct { uint8_t q[32]; float scale, minimum; } kt_block_unpacked;
_Static_assert(sizeof(kt_block_q8_0) == 34 && sizeof(kt_block_q5_0) == 22, "no padding");
_Static_assert(sizeof(kt_block_q4_k) == 144 && sizeof(kt_block_q6_k) == 210, "no padding");

/* Weights of a block, and its bytes. For dense types a "block" is a chunk. */
KT_INLINE size_t kt_block_weights(int type) { return type == KT_Q4_K || type == KT_Q6_K ? 256 : KT_CHUNK; }
KT_INLINE size_t kt_block_bytes(int type) {
    switch (type) {
    case KT_F32: return 4 * KT_CHUNK;
    case KT_BF16: case KT_F16: return 2 * KT_CHUNK;
    case KT_Q8_0: return sizeof(kt_block_q8_0);
    case KT_Q5_0: return sizeof(kt_block_q5_0);
    case KT_Q4_K: return sizeof(kt_block_q4_k);
    case KT_Q6_K: return sizeof(kt_block_q6_k);
    case KT_UNPACKED: return sizeof(kt_block_unpacked);
    default: return KT_CHUNK;
    }
}
KT_INLINE int kt_is_dense(int type) { return type == KT_F32 || type == KT_BF16 || type == KT_F16 || type == KT_FP8_BLOCK128; }
/* Bytes of a row; cols is a multiple of the block for block types. */
KT_INLINE size_t kt_row_bytes(int type, size_t cols) {
    return kt_is_dense(type) ? kt_block_bytes(type) / KT_CHUNK * cols : cols / kt_block_weights(type) * kt_block_bytes(type);
}
KT_INLINE size_t kt_round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
KT_INLINE size_t kt_chunks(size_t cols) { return (cols + KT_CHUNK - 1) / KT_CHUNK; }

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

/* Scale and minimum of sub-block s of a q4_k block, 6 bits each, out of 12 bytes. */
KT_INLINE void kt_q4_k_scale(const uint8_t *scales, int s, uint8_t *scale, uint8_t *minimum) {
    if (s < 4) {
        *scale = scales[s] & 63;
        *minimum = scales[s + 4] & 63;
        return;
    }
    *scale = (uint8_t)((scales[s + 4] & 15) | (scales[s - 4] >> 6) << 4);
    *minimum = (uint8_t)((scales[s + 4] >> 4) | (scales[s] >> 6) << 4);
}

/* Exact value of n weights of a row starting at column col (a multiple of KT_CHUNK; n <= KT_CHUNK). In pack.c. */
void kt_decode_chunk(int type, const uint8_t *row, size_t col, size_t n, float *out);

/* The work of one call of an instruction set: products of a few rows of one or two matrices with the activations of
 * one expert's tokens.
 *     out[m][t * out_stride + r] = w[m][r, :] . acts[index ? index[t] : t, :]
 * out has room for kt_round_up(n_tokens, 32) x kt_round_up(rows, 32), which tiles may fill with anything. */
typedef struct kt_dot {
    size_t n_matrices, rows, cols, n_tokens;
    int type[2];
    const uint8_t *w[2];
    size_t row_bytes[2];
    float *out[2];
    size_t out_stride;
    const uint8_t *acts;       /* prepared rows, cols rounded up to KT_CHUNK with zeros */
    size_t act_stride_bytes;
    const int32_t *index;
    uint8_t *panel;            /* panel_bytes(cols), aligned to KT_ALIGN, this thread's own */
} kt_dot;

KT_INLINE const uint8_t *kt_act_row(const kt_dot *dot, size_t token) {
    return dot->acts + (dot->index ? (size_t)dot->index[token] : token) * dot->act_stride_bytes;
}

/* What an instruction set is. */
typedef struct kt_kernels {
    unsigned types;                                            /* bit kt_type: it takes these weights */
    size_t act_chunk_bytes;                                    /* of KT_CHUNK prepared activations */
    size_t (*panel_bytes)(size_t cols);
    void (*prepare)(const float *src, size_t n, uint8_t *dst); /* fills whole chunks, zeros past n */
    void (*activate)(int activation, float *gate, const float *up, size_t n);  /* gate = act(gate) * up */
    void (*dot)(const kt_dot *dot);
    void (*begin)(void);                                       /* once a thread and run; may be null */
    void (*end)(void);
} kt_kernels;

#define KT_ALL_TYPES (1u << KT_F32 | 1u << KT_BF16 | 1u << KT_Q8_0 | 1u << KT_Q5_0 | 1u << KT_Q4_K | 1u << KT_Q6_K)

extern const kt_kernels kt_kernels_scalar;
void kt_prepare_f32(const float *src, size_t n, uint8_t *dst);
#if defined(__x86_64__)
extern const kt_kernels kt_kernels_avx2, kt_kernels_avx512, kt_kernels_avx512_bf16, kt_kernels_avx512_vnni, kt_kernels_amx;
void kt_dot_avx512_bf16(const kt_dot *dot);   /* for amx: few tokens */
void kt_prepare_bf16(const float *src, size_t n, uint8_t *dst);
void kt_activate_avx512(int activation, float *gate, const float *up, size_t n);
#endif

/* Pool, for moe.c: runs work(argument, thread) on every thread, thread 0 being the caller. */
int kt_pool_run(kt_pool *pool, void (*work)(void *argument, size_t thread), void *argument);
void kt_pool_barrier(kt_pool *pool);   /* inside work: waits for all threads of the pool */
#endif
