/* What this machine can do at most: the rulers that benchmarks and `ktrans tune` hold the kernels against.
 *
 * read    all threads read memory once, in pieces taken from a counter, as the kernels take their tasks
 * tiles   all threads multiply tiles that lie in the second-level cache, in several orders of loads and products:
 *           0  four loads, then four products; A (the tokens) from the first-level cache, B (the weights) from the second
 *           1  loads between products, as are all that follow
 *           2  A and B both from the second-level cache
 *           3  as 2, with loads that do not keep what they load (tileloaddt1)
 *           4  B stays in the first-level cache, A comes from the second with such loads
 *           5  registers only: what no kernel can reach
 */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <time.h>

#include "internal.h"
#include "pool.h"

enum { PIECE = 1 << 18, STEPS = 16, BLOCKS = 14, ORDERS_COUNT = 6, TURN = 32, THREAD_BYTES = 2 * BLOCKS * 2 * STEPS * 1024 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct {
    kt_pool *pool;
    const uint8_t *data;
    size_t bytes, ahead, repeats;
    int isa, order;
    atomic_size_t next;
    _Atomic uint64_t sink;
    double seconds;
} job;

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16,amx-int8")
#include "tiles.h"

static uint64_t read_512(const uint8_t *from, size_t bytes, size_t ahead) {
    __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (size_t i = 0; i < bytes; i += 256)
        for (int j = 0; j < 4; j++) {
            if (ahead) _mm_prefetch((const char *)from + i + ahead + 64 * j, _MM_HINT_T0);
            sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(from + i + 64 * j));
        }
    return (uint64_t)_mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3])));
}

#define ORDER(PRODUCT, order) \
    for (size_t step = 0; step < STEPS; step++, a += TILE_BYTES, b += TILE_BYTES) { \
        if (order == 0) { \
            _tile_loadd(4, a, 64); \
            _tile_loadd(5, a + STEPS * TILE_BYTES, 64); \
            _tile_loadd(6, b, 64); \
            _tile_loadd(7, b + STEPS * TILE_BYTES, 64); \
        } \
        if (order == 1 || order == 2 || order == 4) _tile_loadd(6, b, 64); \
        if (order == 3) _tile_stream_loadd(6, b, 64); \
        if (order == 1 || order == 2) _tile_loadd(4, a, 64); \
        if (order == 3 || order == 4) _tile_stream_loadd(4, a, 64); \
        PRODUCT(0, 4, 6); \
        if (order == 1 || order == 2 || order == 4) _tile_loadd(7, b + STEPS * TILE_BYTES, 64); \
        if (order == 3) _tile_stream_loadd(7, b + STEPS * TILE_BYTES, 64); \
        PRODUCT(1, 4, 7); \
        if (order == 1 || order == 2) _tile_loadd(5, a + STEPS * TILE_BYTES, 64); \
        if (order == 3 || order == 4) _tile_stream_loadd(5, a + STEPS * TILE_BYTES, 64); \
        PRODUCT(2, 5, 6); \
        PRODUCT(3, 5, 7); \
    }

#define CASE(PRODUCT, order) case order: ORDER(PRODUCT, order) break;
#define ORDERS(PRODUCT) \
    switch (order) { CASE(PRODUCT, 0) CASE(PRODUCT, 1) CASE(PRODUCT, 2) CASE(PRODUCT, 3) CASE(PRODUCT, 4) CASE(PRODUCT, 5) }

static void multiply(int isa, int order, const uint8_t *operands, size_t repeats) {
    for (size_t i = 0; i < repeats; i++) {
        const uint8_t *b = operands + (order == 4 ? 0 : i % BLOCKS) * 2 * STEPS * TILE_BYTES;
        const uint8_t *a = operands + (BLOCKS + (order < 2 ? 0 : i % BLOCKS)) * 2 * STEPS * TILE_BYTES;
        stores_before_tiles();
        if (isa == KT_AMX_INT8) ORDERS(_tile_dpbsud)
        else ORDERS(_tile_dpbf16ps)
    }
}

static void zero_tiles(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
}
#pragma GCC pop_options
#endif

static uint64_t read_plain(const uint8_t *from, size_t bytes) {
    uint64_t sum = 0, word;
    for (size_t i = 0; i < bytes; i += 8) {
        memcpy(&word, from + i, 8);
        sum ^= word;
    }
    return sum;
}

static void read_work(void *argument, size_t thread) {
    job *j = argument;
    size_t piece;
    uint64_t sum = 0;
    kt_pool_barrier(j->pool);
    double start = now();
    while ((piece = atomic_fetch_add(&j->next, 1)) < j->bytes / PIECE) {
#if defined(__x86_64__)
        if (j->isa) {
            sum ^= read_512(j->data + piece * PIECE, PIECE, j->ahead);
            continue;
        }
#endif
        sum ^= read_plain(j->data + piece * PIECE, PIECE);
    }
    kt_pool_barrier(j->pool);
    atomic_fetch_xor(&j->sink, sum);
    if (thread == 0) j->seconds = now() - start;
}

double kt_ceiling_read(kt_pool *pool, const void *data, size_t bytes, size_t ahead) {
    job j = {.pool = pool, .data = data, .bytes = bytes, .ahead = ahead, .isa = kt_isa_supported(KT_AVX512)};
    if (bytes < PIECE || kt_pool_run(pool, read_work, &j)) return 0;
    return (double)(bytes / PIECE * PIECE) / j.seconds;
}

static void tiles_work(void *argument, size_t thread) {
    job *j = argument;
#if defined(__x86_64__)
    const uint8_t *operands = j->data + thread * THREAD_BYTES;
    size_t turns = j->repeats / TURN * kt_pool_threads(j->pool);
    begin();
    zero_tiles();
    multiply(j->isa, j->order, operands, 4 * TURN);   /* warms up: caches, clock */
    kt_pool_barrier(j->pool);
    double start = now();
    while (atomic_fetch_add(&j->next, 1) < turns) multiply(j->isa, j->order, operands, TURN);   /* a slow core does less */
    kt_pool_barrier(j->pool);
    if (thread == 0) j->seconds = now() - start;
    end();
#endif
}

size_t kt_ceiling_tiles_bytes(const kt_pool *pool) { return kt_pool_threads(pool) * THREAD_BYTES; }

double kt_ceiling_tiles(kt_pool *pool, int isa, int order, size_t repeats, const void *operands) {
    if ((isa != KT_AMX && isa != KT_AMX_INT8) || kt_isa_missing(isa) || repeats < TURN || order < 0 || order >= ORDERS_COUNT) return 0;
    job j = {.pool = pool, .data = operands, .isa = isa, .order = order, .repeats = repeats};
    if (kt_pool_run(pool, tiles_work, &j)) return 0;
    double per_product = isa == KT_AMX ? 16384 : 32768;   /* operations */
    return (double)(kt_pool_threads(pool) * (repeats / TURN) * TURN * STEPS * 4) * per_product / j.seconds;
}
