/* ktcompile native kernels: the whole ABI. No Python, no torch; C11, pthreads.
 *
 * WHAT IS COMPUTED (the routed experts of one mixture-of-experts layer)
 *     y[t,:] = sum over j of scores[t,j] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])),  e = ids[t,j]
 *     x [T, H] float, ids [T, k] int64, scores [T, k] float, y [T, H] float
 *     gate, up [E, I, H], down [E, H, I], each in its own storage type
 *
 * LAYOUT "rows": a packed matrix is row-major, each row in its own encoding, rows back to back. It is the same for
 * every instruction set and every token count, so one copy of the weights serves prefill and decode.
 *
 * WHO OWNS MEMORY: the caller, always. kt_packed_bytes, kt_pack and kt_moe_scratch_bytes say how much; kt_moe_run
 * allocates nothing and keeps nothing. The only objects made here are pools.
 *
 * This file is also the cffi definition (csrc/build.py drops its preprocessor lines): keep it plain declarations.
 */
#ifndef KT_H
#define KT_H
#include <stddef.h>
#include <stdint.h>

/* Storage types. Blocks are those of ggml and lie along the last axis. The last two are sources of kt_pack only. */
typedef enum kt_type {
    KT_F32,
    KT_BF16,
    KT_Q8_0,          /* 32 weights in 34 bytes  */
    KT_Q5_0,          /* 32 weights in 22 bytes  */
    KT_Q4_K,          /* 256 weights in 144 bytes */
    KT_Q6_K,          /* 256 weights in 210 bytes */
    KT_F16,
    KT_FP8_BLOCK128,  /* e4m3, with a float scale for each 128 x 128 block: scales [ceil(rows/128), ceil(cols/128)] */
    KT_TYPE_COUNT
} kt_type;

/* Instruction sets. The precision of a result depends on the family only:
 *   f32    scalar, avx2, avx512     activations and weights in float, every type
 *   bf16   avx512_bf16, amx         both rounded to bf16 (nearest even), sums in float; refuses f32 weights
 *   int8   avx512_vnni              activations int8 with a scale each 32; takes q8_0, q5_0, q4_k */
typedef enum kt_isa {
    KT_SCALAR,
    KT_AVX2,
    KT_AVX512,
    KT_AVX512_BF16,
    KT_AVX512_VNNI,
    KT_AMX,
    KT_ISA_COUNT
} kt_isa;

typedef enum kt_activation {
    KT_SILU,
    KT_GELU,      /* with erf */
    KT_GELU_TANH,
    KT_ACTIVATION_COUNT
} kt_activation;

typedef enum kt_status {
    KT_OK,
    KT_BAD_ARGUMENT,  /* a null pointer, a size of zero, an unknown type, activation or instruction set */
    KT_BAD_COLUMNS,   /* the last axis is no multiple of the type's block */
    KT_REFUSED,       /* the instruction set does not take this weight type (kt_isa_takes) */
    KT_BAD_EXPERT,    /* an id outside [0, E) */
    KT_SMALL_SCRATCH, /* scratch_bytes is below kt_moe_scratch_bytes */
    KT_TOO_LARGE,     /* more than 2^31 - 1 (token, expert) pairs, or a size that overflows */
    KT_FORKED,        /* the pool was made before fork(): its threads are not in this process */
    KT_NOT_BUILT,     /* the instruction set is not part of this build (another architecture) */
    KT_NO_PACKING,    /* kt_pack has no such conversion */
    KT_STATUS_COUNT
} kt_status;

/* Text of a status; never null. */
const char *kt_error(int status);

/* Why this instruction set does not run here, in words; null if it runs. Asks the CPU and the operating system. For
 * amx this also requests the tile state for the process, without which the first tile instruction is fatal.
 * kt_moe_run does not ask again: the caller must have. */
const char *kt_isa_missing(int isa);
int kt_isa_supported(int isa);         /* 1 if kt_isa_missing(isa) is null */
int kt_isa_takes(int isa, int type);   /* 1 if the instruction set takes weights of this type, whether or not it runs here */

/* Bytes of a packed matrix; 0 if the type cannot be stored, the isa refuses it, or cols is no multiple of its block. */
size_t kt_packed_bytes(int isa, int type, size_t rows, size_t cols);

/* Converts a row-major matrix. From any type to f32 or bf16 (nearest even); from a block type also to itself (a copy).
 * scales: only for KT_FP8_BLOCK128, else null. dst: kt_packed_bytes(KT_SCALAR, dst_type, rows, cols) bytes. */
int kt_pack(int src_type, int dst_type, size_t rows, size_t cols, const void *src, const float *scales, void *dst);

/* Persistent worker threads. n_threads includes the calling thread. Calls from several threads take turns. */
typedef struct kt_pool kt_pool;
kt_pool *kt_pool_new(size_t n_threads);   /* null if n_threads is 0 or a thread cannot be made */
void kt_pool_free(kt_pool *pool);         /* joins the workers; in a forked child only forgets them */
size_t kt_pool_threads(const kt_pool *pool);

/* One layer's experts: where they lie and how they are stored. */
typedef struct kt_moe {
    size_t experts;                   /* E */
    size_t hidden;                    /* H */
    size_t width;                     /* I */
    int activation;                   /* kt_activation */
    int gate_type;                    /* kt_type */
    int up_type;
    int down_type;
    const void *gate;                 /* matrix of expert 0: [I, H] */
    const void *up;                   /* [I, H] */
    const void *down;                 /* [H, I] */
    size_t gate_stride_bytes;         /* from one expert's matrix to the next */
    size_t up_stride_bytes;
    size_t down_stride_bytes;
} kt_moe;

/* Bytes of scratch for kt_moe_run with the same arguments; grows with n_tokens, so ask for the largest. 0 if refused. */
size_t kt_moe_scratch_bytes(const kt_pool *pool, const kt_moe *moe, int isa, size_t n_tokens, size_t top_k);

/* Computes y. Every id is checked before anything is written. Repeated ids in a row add up. x, ids, scores, scratch
 * and y must not overlap; none needs an alignment beyond that of its element. The result does not depend on the
 * number of threads: not in one bit. */
int kt_moe_run(kt_pool *pool, const kt_moe *moe, int isa, size_t n_tokens, size_t top_k, const float *x,
               const int64_t *ids, const float *scores, float *y, void *scratch, size_t scratch_bytes);

/* What kt_quantize writes: ggml's blocks along the last axis, or e4m3 as in KT_FP8_BLOCK128. */
typedef enum kt_quant {
    KT_QUANT_Q8_0,    /* 32 weights in 34 bytes  */
    KT_QUANT_Q4_0,    /* 32 weights in 18 bytes  */
    KT_QUANT_Q5_0,    /* 32 weights in 22 bytes  */
    KT_QUANT_Q4_K,    /* 256 weights in 144 bytes */
    KT_QUANT_Q5_K,    /* 256 weights in 176 bytes */
    KT_QUANT_Q6_K,    /* 256 weights in 210 bytes */
    KT_QUANT_FP8,
    KT_QUANT_COUNT
} kt_quant;

/* Bytes that kt_quantize writes; 0 if there is no such type, or cols is no multiple of its block. */
size_t kt_quant_bytes(int type, size_t rows, size_t cols);

/* Quantises a row-major matrix on the calling thread; the same bytes on every CPU. src is finite, else
 * KT_BAD_ARGUMENT, and dst is partly written. scales: for KT_QUANT_FP8 only, written, [ceil(rows/128), ceil(cols/128)],
 * weight = byte * scale; else null. src, dst and scales must not overlap. */
int kt_quantize(int type, size_t rows, size_t cols, const float *src, void *dst, float *scales);
#endif
