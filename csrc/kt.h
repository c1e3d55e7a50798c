/* ktcompile native kernels: the whole ABI. No Python, no torch; C11, pthreads.
 *
 * WHAT IS COMPUTED (the routed experts of one mixture-of-experts layer)
 *     y[t,:] = sum over j of scores[t,j] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])),  e = ids[t,j]
 *     x [T, H] float, ids [T, k] int64, scores [T, k] float, y [T, H] float
 *     gate, up [E, I, H], down [E, H, I], each in its own storage type
 * An id of -1 is no expert: what belongs there is computed elsewhere. The sum, to the bit, is that of a row without this
 * place: its score is not read, and a row of nothing else gives zeros.
 *
 * LAYOUT "tiles": a packed matrix is groups of 16 rows (the last one filled up with zeros), back to back. In a group
 * the 16 rows are interleaved, so that a vector register holds one column, or a few neighbours, of all of them: a
 * dot product needs no sum across a register, and scales are read 16 at a time. It is the same for every instruction
 * set and every token count, so one copy of the weights serves prefill and decode. internal.h has the bytes.
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

/* Storage types. Blocks are those of ggml and lie along the last axis; a packed matrix has their bits, in another
 * order. The last one is a source of kt_pack only. */
typedef enum kt_type {
    KT_F32,
    KT_BF16,
    KT_Q8_0,          /* 32 weights in 34 bytes   */
    KT_Q5_0,          /* 32 weights in 22 bytes   */
    KT_Q4_0,          /* 32 weights in 18 bytes   */
    KT_Q6_K,          /* 256 weights in 210 bytes */
    KT_Q5_K,          /* 256 weights in 176 bytes */
    KT_Q4_K,          /* 256 weights in 144 bytes */
    KT_Q3_K,          /* 256 weights in 110 bytes */
    KT_Q2_K,          /* 256 weights in 84 bytes  */
    KT_IQ4_NL,        /* 32 weights in 18 bytes   */
    KT_IQ4_XS,        /* 256 weights in 136 bytes */
    KT_MXFP4,         /* 32 weights in 17 bytes   */
    KT_FP8_BLOCK128,  /* e4m3, with a float scale for each 128 x 128 block: scales [ceil(rows/128), ceil(cols/128)] */
    KT_INT8,          /* lossy: a float scale a row */
    KT_INT4_64,       /* lossy: a float16 scale for 64 weights; KT_Q4_0 is the same for 32 */
    KT_INT4_128,
    KT_F16,
    KT_TYPE_COUNT
} kt_type;

/* Instruction sets. The precision of a result depends on the family only:
 *   f32    scalar, avx2, avx512     activations and weights in float, every type
 *   int16  avx512_vnni              activations in 16 bits with a scale for 32; takes weights whose codes are integers
 *   bf16   avx512_bf16, amx         activations in bf16, in 16 bits as above for few tokens; refuses f32 weights. amx rounds
 *                                   weights to bf16 too where it uses tiles
 *   int8   amx_int8                 takes KT_INT8: activations in 8 bits with a scale for 256 where it uses tiles, else 16 */
typedef enum kt_isa {
    KT_SCALAR,
    KT_AVX2,
    KT_AVX512,
    KT_AVX512_BF16,
    KT_AVX512_VNNI,
    KT_AMX,
    KT_AMX_INT8,
    KT_ISA_COUNT
} kt_isa;

typedef enum kt_activation {
    KT_SILU,
    KT_GELU,      /* with erf */
    KT_GELU_TANH,
    KT_SWIGLU_OAI,  /* gpt-oss: g = min(gate, limit), u = clamp(up, -limit, limit): g * sigmoid(alpha g) * (u + 1) */
    KT_ACTIVATION_COUNT
} kt_activation;

typedef enum kt_status {
    KT_OK,
    KT_BAD_ARGUMENT,  /* a null pointer, a size of zero, an unknown type, activation or instruction set */
    KT_BAD_COLUMNS,   /* the last axis is no multiple of the type's block */
    KT_REFUSED,       /* the instruction set does not take this weight type (kt_isa_takes) */
    KT_BAD_EXPERT,    /* an id outside [0, E) that is not -1 */
    KT_REPEATED_EXPERT, /* an id twice in a row of ids; -1 may be */
    KT_SMALL_SCRATCH, /* scratch_bytes is below kt_moe_scratch_bytes */
    KT_TOO_LARGE,     /* more than 2^31 - 1 (token, expert) pairs, or a size that overflows */
    KT_FORKED,        /* the pool was made before fork(): its threads are not in this process */
    KT_NOT_BUILT,     /* the instruction set is not part of this build (another architecture) */
    KT_NOT_FINITE,    /* a weight is NaN or infinite, and the packed type has neither */
    KT_NO_THREAD,     /* a thread cannot be made */
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

/* Bytes of a packed matrix, a multiple of 64; 0 if the type cannot be stored, the isa refuses it, or cols is no multiple of
 * its block. Packed matrices start at a multiple of 64. */
size_t kt_packed_bytes(int isa, int type, size_t rows, size_t cols);
/* Bytes of a row-major matrix, as kt_pack reads and kt_quantize writes it, without scales; 0 if the type is lossy, or cols is
 * no multiple of its block. */
size_t kt_source_bytes(int type, size_t rows, size_t cols);

/* Packs rows [first_row, first_row + n_rows) of a row-major matrix of `rows` into their place in dst (the whole packed
 * matrix); first_row is a multiple of 16, and n_rows too unless they are the last. src and scales start at row first_row;
 * first_row is a multiple of 128 for KT_FP8_BLOCK128. Exact from any type to f32, to bf16 (nearest even), and to
 * itself; from any type to KT_INT8 and KT_INT4_* (lossy, nearest). dst is partly written if KT_NOT_FINITE comes back. scales: only for KT_FP8_BLOCK128, else null. */
int kt_pack(int src_type, int dst_type, size_t rows, size_t cols, size_t first_row, size_t n_rows, const void *src,
            const float *scales, void *dst);

/* The values of a packed matrix, row-major [rows, cols]. */
int kt_unpack(int type, size_t rows, size_t cols, const void *packed, float *dst);

/* Persistent worker threads. n_threads includes the calling thread, which is thread 0 and is never pinned; a pool
 * serves any number of callers, who take turns. After fork() a pool is of no use to the child: calls return KT_FORKED.
 *
 * WHERE: thread i is pinned to one CPU of the calling thread's affinity mask, so of the cgroup's cpuset: distinct
 * cores first, evenly over the NUMA nodes, the threads of a node side by side; CPUs that other pools of the process
 * have taken come last. With more threads than CPUs nothing is pinned. A caller found on a worker's CPU is moved to
 * the CPU of thread 0, with its mask as it was.
 *
 * SPINNING: a thread that waits spins for 100 us and then sleeps. "Awake" are the threads of all pools of the process
 * that compute or spin, callers in kt_pool_run and kt_pool_wait included. A thread spins only while the awake, itself
 * among them, are no more than the CPUs; the driver without a task leaves one more CPU to whoever will submit the next;
 * a caller in kt_pool_wait does not spin on the driver's CPU. So at no moment do more threads spin than there are CPUs.
 * A thread that may not spin sleeps at once; in a barrier, at the end of a job and at a doorbell it yields. */
typedef struct kt_pool kt_pool;
kt_pool *kt_pool_new(size_t n_threads);   /* null if n_threads is 0 or above 4096, or a thread cannot be made */
/* The same with a CPU and a NUMA node for each thread; cpus[0] is the driver's. A CPU of -1 is not pinned; null cpus
 * pin nothing, null nodes are one node. Null too if a CPU is not in the mask. No thread spins if two share a CPU. */
kt_pool *kt_pool_new_on(size_t n_threads, const int *cpus, const int *nodes);
/* Finishes the submitted tasks, then joins the threads; in a forked child only forgets them. No other call may be in
 * progress. */
void kt_pool_free(kt_pool *pool);
size_t kt_pool_threads(const kt_pool *pool);
size_t kt_pool_nodes(const kt_pool *pool);                   /* NUMA nodes in use */
size_t kt_pool_node_of(const kt_pool *pool, size_t thread);  /* below kt_pool_nodes; that of thread 0 is 0 */

/* What a pool has done since it was made; may be asked by any thread at any time. */
typedef struct kt_counts {
    uint64_t runs;    /* of kt_moe_run, to their end */
    uint64_t bytes;   /* of packed experts that they read: of each run those that it had tokens for, once */
    uint64_t ns;      /* in which the threads had work */
} kt_counts;
kt_counts kt_pool_counts(const kt_pool *pool);

/* Work for later, by the pool's driver: a thread that stands in for the caller, so that call may use the pool. The
 * caller owns the memory, which stays until kt_pool_wait or kt_pool_unlisten returns; all fields start as zero. */
typedef struct kt_task {
    void (*call)(void *argument);
    void *argument;
    kt_pool *pool;               /* written by kt_pool_submit and kt_pool_listen */
    int status;                  /* written by kt_task_submit and kt_task_wait */
    unsigned state;              /* this and the rest: the pool's own */
    struct kt_task *next;
    volatile uint32_t *start;
    volatile uint32_t *done;
} kt_task;

/* Makes the driver, if there is none. Else the first kt_pool_submit does; after that submitting allocates nothing. */
int kt_pool_start_driver(kt_pool *pool);
/* Queues the task, first come first served. Waits for nothing and takes no lock. KT_BAD_ARGUMENT if it is queued or
 * listening already; a finished one may be submitted again. */
int kt_pool_submit(kt_pool *pool, kt_task *task);
/* Until the task is done. KT_BAD_ARGUMENT if it was never submitted here, or if called by the driver too early. */
int kt_pool_wait(kt_pool *pool, kt_task *task);
/* The two above on task->pool, as functions of one pointer for cudaLaunchHostFunc; task->status has the result. */
void kt_task_submit(void *task);
void kt_task_wait(void *task);

/* A doorbell: from now on, whenever *start is not 0, the driver writes 0 to it, runs the task, then writes 1 to *done
 * (release). Both may be in memory that a GPU writes and reads. The doorbells of a pool are polled in the order of
 * these calls, without a lock; while there is one the driver does not sleep (it yields where it may not spin), unless
 * it was told to rest. */
int kt_pool_listen(kt_pool *pool, kt_task *task, volatile uint32_t *start, volatile uint32_t *done);
/* Ends that; afterwards the driver touches neither task nor flags. Both wait for the driver's current task, and
 * return KT_BAD_ARGUMENT if called by the driver, or if the task was (not) listening. */
int kt_pool_unlisten(kt_pool *pool, kt_task *task);
/* Whoever rings doorbells says when, with 0 before and with 1 after: while nobody is between the two, the driver sleeps
 * 3 ms after the last ring although it has doorbells, and sees a ring once somebody says 0; else it polls. From the first
 * call on the workers spin 3 ms for the next job, so that one step finds them as the last one left them. Told 0 it also
 * moves the caller, who is about to wait for a GPU, away from the pool's CPUs, if there are others. Until anybody says
 * either, the driver polls. */
int kt_pool_rest(kt_pool *pool, int resting);

/* One layer's experts: where they lie and how they are stored. */
typedef struct kt_moe {
    size_t experts;                   /* E */
    size_t hidden;                    /* H */
    size_t width;                     /* I */
    int activation;                   /* kt_activation */
    int gate_type;                    /* kt_type */
    int up_type;
    int down_type;
    size_t tile_tokens;               /* experts with so many tokens are computed by tiles (amx, amx_int8); 0: none is */
    float alpha, limit;               /* of KT_SWIGLU_OAI */
    const float *gate_bias;           /* [E, I] or null */
    const float *up_bias;             /* [E, I] or null */
    const float *down_bias;           /* [E, H] or null */
    const void *gate;                 /* packed matrix of expert 0: [I, H] */
    const void *up;                   /* [I, H] */
    const void *down;                 /* [H, I] */
    size_t gate_stride_bytes;         /* from one expert's matrix to the next */
    size_t up_stride_bytes;
    size_t down_stride_bytes;
} kt_moe;

/* Bytes of scratch for kt_moe_run with the same arguments; grows with n_tokens, so ask for the largest. 0 if refused. */
size_t kt_moe_scratch_bytes(const kt_pool *pool, const kt_moe *moe, int isa, size_t n_tokens, size_t top_k);

/* Computes y. Every id is checked before anything is written. x, ids, scores, scratch
 * and y must not overlap; none needs an alignment beyond that of its element. The result does not depend on the
 * number of threads: not in one bit. */
int kt_moe_run(kt_pool *pool, const kt_moe *moe, int isa, size_t n_tokens, size_t top_k, const float *x,
               const int64_t *ids, const float *scores, float *y, void *scratch, size_t scratch_bytes);

/* A call of kt_moe_run as a kt_task: task.call = kt_moe_task, task.argument = this. So it is one pointer from then on:
 * kt_task_submit and kt_task_wait take the task, a doorbell starts it, and a CUDA host function may do any of that.
 * Allocates nothing; a scratch of its own lets it be queued while others use the pool. Between runs the caller may change
 * any field, and what it points to. */
typedef struct kt_moe_arguments {
    kt_pool *pool;               /* as kt_moe_run */
    const kt_moe *moe;
    int isa;
    int status;                  /* of the first run that failed since the caller wrote KT_OK; that run left y alone */
    size_t n_tokens, top_k;
    const float *x;
    const int64_t *ids;
    const float *scores;
    float *y;
    void *scratch;
    size_t scratch_bytes;
} kt_moe_arguments;
void kt_moe_task(void *arguments);

/* What the machine can do at most, measured: bytes/s that all threads read from `data` (prefetching `ahead` bytes; take
 * the best of a few), and operations/s of tile products with tiles from the second-level cache, isa KT_AMX or KT_AMX_INT8,
 * in an order of 0 to 5 that ceiling.c explains. `operands`: kt_ceiling_tiles_bytes, at a multiple of 64. 0 if it cannot run.
 * repeats: of 64 products a thread, at least 32. */
double kt_ceiling_read(kt_pool *pool, const void *data, size_t bytes, size_t ahead);
size_t kt_ceiling_tiles_bytes(const kt_pool *pool);
double kt_ceiling_tiles(kt_pool *pool, int isa, int order, size_t repeats, const void *operands);

/* Quantises a row-major matrix on the calling thread; the same bytes on every CPU. type: KT_Q8_0, KT_Q4_0, KT_Q5_0, KT_Q4_K,
 * KT_Q5_K, KT_Q6_K or KT_FP8_BLOCK128, else KT_BAD_ARGUMENT. dst has kt_source_bytes. src is finite, else KT_BAD_ARGUMENT,
 * and dst is partly written. scales: for KT_FP8_BLOCK128 only, written, [ceil(rows/128), ceil(cols/128)], weight =
 * byte * scale; else null. src, dst and scales must not overlap. */
int kt_quantize(int type, size_t rows, size_t cols, const float *src, void *dst, float *scales);
#endif
