/* Runs csrc/kt.h without Python, every buffer of exactly the size it must have: packs random matrices of every type,
 * runs the experts with every instruction set that runs here, and compares with KT_SCALAR. Prints what ran and exits with
 * 1 at the first failure. tests/test_native_sanitizers.py compiles it, with and without sanitizers.
 *
 *     test_moe MEMORY BOUND...      a bound for each kt_isa: how far it may be from KT_SCALAR, as relative L2 error
 *
 * MEMORY  "malloc": for AddressSanitizer, which knows what lies around a buffer
 *         "pages": a buffer ends where a page begins that cannot be touched. This also catches instructions that no
 *         sanitizer sees, as those of tiles. Bytes before it are canaries.
 */
#define _GNU_SOURCE
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../csrc/kt.h"

enum { ALIGN = 64, CANARY = 0xA5, EXPERTS = 4, TOP_K = 3, MOST_BUFFERS = 64, THREADS = 3 };

static void require_at(int line, const char *text, int holds) {
    if (holds) return;
    printf("FAILED line %d: %s\n", line, text);
    exit(1);
}
#define require(condition) require_at(__LINE__, #condition, (condition) != 0)

/* ---- buffers */

typedef struct { uint8_t *area, *start; size_t area_bytes, bytes; } buffer;
static buffer buffers[MOST_BUFFERS];
static size_t n_buffers;

static int in_pages;

/* Pages: as far to the right as the alignment allows. A size is a multiple of it, so nothing is left. */
static void take(buffer *b, size_t align) {
    void *memory = NULL;
    size_t page = (size_t)sysconf(_SC_PAGESIZE), inside = (b->bytes + page - 1) / page * page;
    if (!in_pages) {
        require(!posix_memalign(&memory, align < sizeof(void *) ? sizeof(void *) : align, b->bytes ? b->bytes : 1));
        b->start = memory;
        return;
    }
    require(b->bytes % align == 0);
    b->area_bytes = inside + 2 * page;
    b->area = mmap(NULL, b->area_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(b->area != MAP_FAILED);
    memset(b->area, CANARY, b->area_bytes);
    require(!mprotect(b->area, page, PROT_NONE) && !mprotect(b->area + page + inside, page, PROT_NONE));
    b->start = b->area + page + inside - b->bytes;
}

static void give_back(buffer *b) {
    if (!in_pages) {
        free(b->start);
        return;
    }
    for (const uint8_t *p = b->area + sysconf(_SC_PAGESIZE); p < b->start; p++) require(*p == CANARY);
    require(!munmap(b->area, b->area_bytes));
}

static void *make(size_t bytes, size_t align) {
    require(n_buffers < MOST_BUFFERS);
    buffer *b = &buffers[n_buffers++];
    b->bytes = bytes;
    take(b, align);
    return b->start;
}

/* Gives back all buffers but the first `kept`. */
static void release(size_t kept) {
    while (n_buffers > kept) give_back(&buffers[--n_buffers]);
}

/* ---- random matrices */

static uint64_t state = 88172645463325252u;
static uint32_t random_bits(void) {  /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (uint32_t)(state * 2685821657736338717u >> 32);
}
static float uniform(void) { return (float)(random_bits() >> 8) * 0x1p-23f - 1; }  /* [-1, 1) */

static size_t block_columns(int type) {
    switch (type) {
    case KT_Q6_K: case KT_Q5_K: case KT_Q4_K: case KT_Q3_K: case KT_Q2_K: case KT_IQ4_XS: return 256;
    case KT_INT4_128: return 128;
    case KT_INT4_64: return 64;
    case KT_Q8_0: case KT_Q5_0: case KT_Q4_0: case KT_IQ4_NL: case KT_MXFP4: return 32;
    default: return 1;
    }
}

/* Where the float16 of a block are, -1 being nowhere, and the high byte of the second: what is subtracted is about what
 * codes are on average, else nothing but the mean is left of a matrix. */
static uint8_t half_fields(int type, int field[2]) {
    field[0] = 0, field[1] = -1;
    switch (type) {
    case KT_Q6_K: field[0] = 208; return 0;
    case KT_Q3_K: field[0] = 108; return 0;
    case KT_Q2_K: field[0] = 80, field[1] = 82; return 0x0c;
    case KT_Q4_K: field[1] = 2; return 0x18;
    case KT_Q5_K: field[1] = 2; return 0x1c;
    case KT_MXFP4: case KT_FP8_BLOCK128: field[0] = -1; return 0;
    default: return 0;
    }
}

static int is_lossy(int type) { return type == KT_INT8 || type == KT_INT4_64 || type == KT_INT4_128; }

/* Random bytes, but floats where floats are: no infinity, no NaN, and weights below 2 or so. */
static void fill_source(int type, uint8_t *raw, size_t bytes, size_t block_bytes) {
    if (type == KT_F32) {
        for (size_t i = 0; i < bytes / 4; i++) ((float *)(void *)raw)[i] = uniform();
        return;
    }
    for (size_t i = 0; i < bytes; i++) raw[i] = (uint8_t)random_bits();
    if (type == KT_BF16 || type == KT_F16) {   /* exponents of 2^-3 to 2^-1, or of all below that */
        for (size_t i = 1; i < bytes; i += 2) raw[i] = type == KT_BF16 ? (raw[i] & 0x81) | 0x3e : raw[i] & 0xbb;
        return;
    }
    int field[2];
    uint8_t second = half_fields(type, field);
    for (size_t i = 0; i < bytes; i += block_bytes) {
        if (type == KT_FP8_BLOCK128) raw[i] = (uint8_t)((raw[i] & 0x8f) | 0x30);  /* tiles: below 2^-14 of 448 float16 has no digits */
        if (type == KT_MXFP4) raw[i] = (uint8_t)(122 + raw[i] % 3);
        for (int f = 0; f < 2; f++)
            if (field[f] >= 0) raw[i + (size_t)field[f] + 1] = (uint8_t)((f ? second : 0x0c) | (raw[i] & 3));  /* 0x0c: 2^-12 to 2^-11 */
    }
}

/* Packs a random [rows, cols] matrix at `packed`, its rows in two spans if it has more than 128, and unpacks it. */
static void pack_random(int type, size_t rows, size_t cols, uint8_t *packed) {
    size_t kept = n_buffers, blocks = (cols + 127) / 128;
    int src_type = is_lossy(type) ? KT_F32 : type;
    for (size_t first = 0; first < rows; first += 128) {
        size_t n = rows - first < 128 ? rows - first : 128, bytes = kt_source_bytes(src_type, n, cols);
        uint8_t *raw = make(bytes, src_type == KT_F32 ? 4 : 1);
        fill_source(src_type, raw, bytes, kt_source_bytes(src_type, 1, block_columns(src_type)));
        float *scales = type == KT_FP8_BLOCK128 ? make(blocks * sizeof(float), sizeof(float)) : NULL;
        for (size_t i = 0; scales && i < blocks; i++) scales[i] = 0.5f + 0.4f * uniform();
        require(kt_pack(src_type, type, rows, cols, first, n, raw, scales, packed) == KT_OK);
        release(kept);
    }
    float *values = make(rows * cols * sizeof(float), sizeof(float));
    require(kt_unpack(type, rows, cols, packed, values) == KT_OK);
    for (size_t i = 0; i < rows * cols; i++) require(isfinite(values[i]));
    release(kept);
}

static void *pack_experts(int type, size_t rows, size_t cols, size_t *stride) {
    *stride = kt_packed_bytes(KT_SCALAR, type, rows, cols);
    require(*stride && *stride % ALIGN == 0);
    uint8_t *packed = make(EXPERTS * *stride, ALIGN);
    for (size_t e = 0; e < EXPERTS; e++) pack_random(type, rows, cols, packed + e * *stride);
    return packed;
}

static float *random_floats(size_t n) {
    float *values = make(n * sizeof(float), sizeof(float));
    for (size_t i = 0; i < n; i++) values[i] = uniform();
    return values;
}

/* Different experts in a row; `used` of them in all. Where a row has several, some are -1. */
static int64_t *random_ids(size_t tokens, size_t top_k, size_t used) {
    int64_t *ids = make(tokens * top_k * sizeof(int64_t), sizeof(int64_t));
    for (size_t t = 0; t < tokens; t++) {
        size_t first = random_bits() % used;
        for (size_t j = 0; j < top_k; j++) ids[t * top_k + j] = top_k > 1 && random_bits() % 4 == 0 ? -1 : (int64_t)((first + j) % used);
    }
    return ids;
}

/* ---- the experts */

static const char *const isa_names[KT_ISA_COUNT] = {"scalar", "avx2", "avx512", "avx512_bf16", "avx512_vnni", "amx", "amx_int8"};
static kt_pool *pools[2];
static double bounds[KT_ISA_COUNT];
static size_t runs[KT_ISA_COUNT];

static float *run(kt_pool *pool, const kt_moe *moe, int isa, size_t tokens, size_t top_k, const float *x, const int64_t *ids,
                  const float *scores) {
    float *y = make(tokens * moe->hidden * sizeof(float), sizeof(float));
    size_t kept = n_buffers, scratch_bytes = kt_moe_scratch_bytes(pool, moe, isa, tokens, top_k);
    require(scratch_bytes % ALIGN == 0);
    uint8_t *scratch = (uint8_t *)make(scratch_bytes, ALIGN) + 1;   /* so that what is used ends where the buffer ends */
    require(kt_moe_run(pool, moe, isa, tokens, top_k, x, ids, scores, y, scratch, scratch_bytes - 1) == KT_SMALL_SCRATCH);
    require(kt_moe_run(pool, moe, isa, tokens, top_k, x, ids, scores, y, scratch, scratch_bytes) == KT_OK);
    release(kept);
    runs[isa]++;
    return y;
}

static double distance(const float *got, const float *wanted, size_t n) {
    double off = 0, size = 1e-60;
    for (size_t i = 0; i < n; i++) {
        off += ((double)got[i] - wanted[i]) * ((double)got[i] - wanted[i]);
        size += (double)wanted[i] * wanted[i];
    }
    return sqrt(off / size);
}

/* One layer with tokens of each number, by every instruction set that takes it: near scalar, and with 1 and THREADS
 * threads the same to the bit. */
static void check(const int type[3], size_t hidden, size_t width, int activation, size_t tile_tokens) {
    static const size_t token_counts[] = {1, 8, 9, 33};
    kt_moe moe = {.experts = EXPERTS, .hidden = hidden, .width = width, .activation = activation, .gate_type = type[0],
                  .up_type = type[1], .down_type = type[2], .tile_tokens = tile_tokens, .alpha = 1.702f, .limit = 7};
    moe.gate = pack_experts(type[0], width, hidden, &moe.gate_stride_bytes);
    moe.up = pack_experts(type[1], width, hidden, &moe.up_stride_bytes);
    moe.down = pack_experts(type[2], hidden, width, &moe.down_stride_bytes);
    if (activation == KT_SWIGLU_OAI) {
        moe.gate_bias = random_floats(EXPERTS * width);
        moe.up_bias = random_floats(EXPERTS * width);
        moe.down_bias = random_floats(EXPERTS * hidden);
    }
    size_t layer = n_buffers;
    for (size_t i = 0; i < sizeof token_counts / sizeof token_counts[0]; i++) {
        size_t tokens = token_counts[i], top_k = i % 2 ? TOP_K : 1, used = i % 2 ? EXPERTS : 1;
        const float *x = random_floats(tokens * hidden), *scores = random_floats(tokens * top_k);
        const int64_t *ids = random_ids(tokens, top_k, used);
        const float *wanted = run(pools[0], &moe, KT_SCALAR, tokens, top_k, x, ids, scores);
        size_t kept = n_buffers;
        for (int isa = KT_SCALAR; isa < KT_ISA_COUNT; isa++) {
            int takes = 1;
            for (int m = 0; m < 3; m++) takes &= kt_isa_takes(isa, type[m]);
            if (!takes || !kt_isa_supported(isa)) continue;
            const float *one = isa == KT_SCALAR ? wanted : run(pools[0], &moe, isa, tokens, top_k, x, ids, scores);
            const float *more = top_k == 1 ? one : run(pools[1], &moe, isa, tokens, top_k, x, ids, scores);
            double off = distance(one, wanted, tokens * hidden);
            if (!(off <= bounds[isa]) || memcmp(one, more, tokens * hidden * sizeof(float))) {
                printf("FAILED %s: types %d %d %d, hidden %zu, width %zu, %zu tokens: off by %g; %d threads %s\n", isa_names[isa],
                       type[0], type[1], type[2], hidden, width, tokens, off, THREADS,
                       memcmp(one, more, tokens * hidden * sizeof(float)) ? "differ" : "agree");
                exit(1);
            }
            release(kept);
        }
        release(layer);
    }
    release(0);
}

int main(int n_arguments, char **arguments) {
    require(n_arguments == 2 + KT_ISA_COUNT);
    in_pages = !strcmp(arguments[1], "pages");
    require(in_pages || !strcmp(arguments[1], "malloc"));
    for (int isa = 0; isa < KT_ISA_COUNT; isa++) bounds[isa] = strtod(arguments[2 + isa], NULL);
    require(pools[0] = kt_pool_new(1));
    require(pools[1] = kt_pool_new(THREADS));
    static const size_t any[][2] = {{1, 1}, {15, 33}, {33, 15}, {17, 64}, {65, 17}, {257, 31}, {31, 300}};
    for (int type = 0; type < KT_F16; type++) {
        size_t unit = block_columns(type);
        for (size_t i = 0; i < (unit == 1 ? sizeof any / sizeof any[0] : 3); i++) {
            size_t hidden = unit == 1 ? any[i][0] : unit * (1 + i % 2), width = unit == 1 ? any[i][1] : unit * (1 + i / 2);
            check((int[]){type, type, type}, hidden, width, (int)(i % KT_ACTIVATION_COUNT), i % 2 ? 1 : 8);
        }
    }
    static const int mixes[][3] = {
        {KT_Q4_K, KT_Q4_K, KT_Q6_K}, {KT_FP8_BLOCK128, KT_Q4_0, KT_BF16}, {KT_INT8, KT_INT4_128, KT_MXFP4}, {KT_INT8, KT_INT8, KT_INT8}};
    for (size_t i = 0; i < sizeof mixes / sizeof mixes[0]; i++) check(mixes[i], 256, 512, KT_SWIGLU_OAI, 2);
    static const int wide[][3] = {{KT_BF16, KT_FP8_BLOCK128, KT_Q8_0}, {KT_Q8_0, KT_Q5_0, KT_IQ4_NL}, {KT_INT8, KT_INT8, KT_INT8}};
    for (size_t i = 0; i < sizeof wide / sizeof wide[0]; i++) check(wide[i], i < 2 ? 1056 : 4160, 32, KT_SILU, 8);
    kt_pool_free(pools[0]);
    kt_pool_free(pools[1]);
    for (int isa = 0; isa < KT_ISA_COUNT; isa++) {
        if (kt_isa_missing(isa)) printf("%s: not run: %s\n", isa_names[isa], kt_isa_missing(isa));
        else printf("%s: %zu runs\n", isa_names[isa], runs[isa]);
    }
    return 0;
}
