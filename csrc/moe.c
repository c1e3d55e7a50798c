/* The routed experts, whatever the instruction set: sorts tokens by expert, splits the work, and calls the table.
 *
 * PHASES, with a barrier between them; tasks of a phase are taken from an atomic counter
 *     0  prepare x                  a task = one token (for a few tokens the caller does it while sorting)
 *     1  h = act(gate x) * up x     a task = (expert, block of rows of I), experts with most tokens first
 *     2  y = sum of score * down h  a task = block of rows of H, over all experts in ascending order
 * A slot is one (token, expert) pair; slots are sorted by expert, then token, then place in the row. Every element of h
 * and y is computed within one task in a fixed order, so the number of threads cannot change a bit.
 */
#include <stdatomic.h>

#include "internal.h"

enum {
    PHASES = 3,
    ROWS_FEW = 32,       /* rows a task while tokens are few: many tasks, each a long stream of weights */
    ROWS_WIDTH = 64,     /* rows a task of phase 1, where two matrices share KT_OUT */
    ROWS_HIDDEN = KT_OUT,
    FEW_TOKENS = 8,      /* an expert; also: x is prepared by the caller up to here */
};

typedef struct {
    const kt_moe *moe;
    const kt_kernels *kernels;
    kt_pool *pool;
    size_t n_tokens, top_k;
    const float *x, *scores;
    const int64_t *ids;
    float *y;
    size_t n_active, rows_width, rows_hidden;
    int x_is_prepared;
    /* in scratch */
    int32_t *first_slot;   /* [E + 1] */
    int32_t *order;        /* [n_active] experts, most tokens first */
    int32_t *slot_token;   /* [T k] */
    float *slot_score;     /* [T k] */
    uint8_t *x_rows, *h_rows, *threads;
    size_t x_stride_bytes, h_stride_bytes, thread_bytes;
    size_t total_bytes;
    atomic_size_t next[PHASES];
} run;

/* Reserves count * unit bytes after *at, aligned; *at becomes SIZE_MAX if that overflows. */
static size_t reserve(size_t *at, size_t count, size_t unit) {
    size_t start = *at, bytes;
    if (start > SIZE_MAX - KT_ALIGN || __builtin_mul_overflow(count, unit, &bytes) || bytes > SIZE_MAX / 2 - start) {
        *at = SIZE_MAX;
        return 0;
    }
    *at = kt_round_up(start + bytes, KT_ALIGN);
    return start;
}

static const kt_kernels *table(int isa) {
    switch (isa) {
    case KT_SCALAR: return &kt_kernels_scalar;
#if defined(__x86_64__)
    case KT_AVX2: return &kt_kernels_avx2;
    case KT_AVX512: return &kt_kernels_avx512;
    case KT_AVX512_BF16: return &kt_kernels_avx512_bf16;
    case KT_AVX512_VNNI: return &kt_kernels_avx512_vnni;
    case KT_AMX: return &kt_kernels_amx;
#endif
    default: return NULL;
    }
}

int kt_isa_takes(int isa, int type) {
    const kt_kernels *kernels = table(isa);
    return kernels && type >= 0 && type < KT_TYPE_COUNT && (kernels->types >> type & 1);
}

const char *kt_error(int status) {
    switch (status) {
    case KT_OK: return "no error";
    case KT_BAD_ARGUMENT: return "a null pointer, a size of zero, or an unknown type, activation or instruction set";
    case KT_BAD_COLUMNS: return "the last axis is not a multiple of the block of its storage type";
    case KT_REFUSED: return "the instruction set does not take this weight type";
    case KT_BAD_EXPERT: return "an expert id is outside [0, experts)";
    case KT_SMALL_SCRATCH: return "scratch is smaller than kt_moe_scratch_bytes says";
    case KT_TOO_LARGE: return "too many (token, expert) pairs, or a size overflows";
    case KT_FORKED: return "the pool was made before fork(): make a new one in the child";
    case KT_NOT_BUILT: return "the instruction set is not part of this build";
    case KT_NO_PACKING: return "there is no conversion between these storage types";
    default: return "unknown status";
    }
}

/* Bytes of the three matrices' rows are only known after this: types and columns are valid. */
static int check(const kt_moe *moe, int isa) {
    if (!moe || isa < 0 || isa >= KT_ISA_COUNT) return KT_BAD_ARGUMENT;
    if (!moe->experts || !moe->hidden || !moe->width || !moe->gate || !moe->up || !moe->down) return KT_BAD_ARGUMENT;
    if (moe->activation < 0 || moe->activation >= KT_ACTIVATION_COUNT) return KT_BAD_ARGUMENT;
    if (!table(isa)) return KT_NOT_BUILT;
    const int types[] = {moe->gate_type, moe->up_type, moe->down_type};
    const size_t cols[] = {moe->hidden, moe->hidden, moe->width};
    for (int i = 0; i < 3; i++) {
        if (types[i] < 0 || types[i] >= KT_TYPE_COUNT) return KT_BAD_ARGUMENT;
        if (!kt_isa_takes(isa, types[i])) return KT_REFUSED;
        if (!kt_is_dense(types[i]) && cols[i] % kt_block_weights(types[i])) return KT_BAD_COLUMNS;
    }
    return KT_OK;
}

/* Divides scratch; with a null base it only counts. */
static int lay_out(run *r, uint8_t *base) {
    const kt_moe *moe = r->moe;
    size_t slots, at = 0, panel = 0;
    if (__builtin_mul_overflow(r->n_tokens, r->top_k, &slots) || slots > INT32_MAX) return KT_TOO_LARGE;
    if (moe->experts > INT32_MAX || moe->hidden > SIZE_MAX / 64 || moe->width > SIZE_MAX / 64) return KT_TOO_LARGE;
    r->x_stride_bytes = kt_chunks(moe->hidden) * r->kernels->act_chunk_bytes;
    r->h_stride_bytes = kt_chunks(moe->width) * r->kernels->act_chunk_bytes;
    panel = r->kernels->panel_bytes(moe->hidden > moe->width ? moe->hidden : moe->width);
    r->thread_bytes = kt_round_up(KT_TOKENS * KT_OUT * sizeof(float) + panel, KT_ALIGN);
    r->first_slot = (int32_t *)(base + reserve(&at, moe->experts + 1, sizeof(int32_t)));
    r->order = (int32_t *)(base + reserve(&at, moe->experts, sizeof(int32_t)));
    r->slot_token = (int32_t *)(base + reserve(&at, slots, sizeof(int32_t)));
    r->slot_score = (float *)(base + reserve(&at, slots, sizeof(float)));
    r->x_rows = base + reserve(&at, r->n_tokens, r->x_stride_bytes);
    r->h_rows = base + reserve(&at, slots, r->h_stride_bytes);
    r->threads = base + reserve(&at, kt_pool_threads(r->pool), r->thread_bytes);
    r->total_bytes = at;
    return at > SIZE_MAX - KT_ALIGN ? KT_TOO_LARGE : KT_OK;
}

size_t kt_moe_scratch_bytes(const kt_pool *pool, const kt_moe *moe, int isa, size_t n_tokens, size_t top_k) {
    if (!pool || check(moe, isa)) return 0;
    run r = {.moe = moe, .kernels = table(isa), .pool = (kt_pool *)pool, .n_tokens = n_tokens, .top_k = top_k};
    return lay_out(&r, NULL) ? 0 : r.total_bytes + KT_ALIGN;
}

/* Counting sort of slots by expert, and of the experts in use by their number of tokens. */
static void sort_slots(run *r) {
    size_t experts = r->moe->experts, slots = r->n_tokens * r->top_k;
    memset(r->first_slot, 0, (experts + 1) * sizeof(int32_t));
    for (size_t i = 0; i < slots; i++) r->first_slot[r->ids[i]]++;
    r->n_active = 0;
    for (size_t e = 0; e < experts; e++) {
        int32_t count = r->first_slot[e];
        if (!count) continue;
        size_t at = r->n_active++;
        for (; at > 0 && r->first_slot[r->order[at - 1]] < count; at--) r->order[at] = r->order[at - 1];
        r->order[at] = (int32_t)e;
    }
    int32_t end = 0;
    for (size_t e = 0; e < experts; e++) {
        end += r->first_slot[e];
        r->first_slot[e] = end;
    }
    r->first_slot[experts] = end;
    for (size_t i = slots; i-- > 0;) {  /* backwards: ends become starts, and slots of an expert stay in token order */
        int32_t slot = --r->first_slot[r->ids[i]];
        r->slot_token[slot] = (int32_t)(i / r->top_k);
        r->slot_score[slot] = r->scores[i];
    }
}

static void prepare_token(run *r, size_t token) {
    r->kernels->prepare(r->x + token * r->moe->hidden, r->moe->hidden, r->x_rows + token * r->x_stride_bytes);
}

/* h[slots of expert e, rows] */
static void gate_up_task(run *r, size_t task, float *out, uint8_t *panel) {
    const kt_moe *moe = r->moe;
    size_t blocks = (moe->width + r->rows_width - 1) / r->rows_width;
    size_t e = (size_t)r->order[task / blocks], row = task % blocks * r->rows_width;
    size_t rows = moe->width - row < r->rows_width ? moe->width - row : r->rows_width;
    size_t gate_row = kt_row_bytes(moe->gate_type, moe->hidden), up_row = kt_row_bytes(moe->up_type, moe->hidden);
    kt_dot dot = {
        .n_matrices = 2, .rows = rows, .cols = moe->hidden,
        .type = {moe->gate_type, moe->up_type},
        .w = {(const uint8_t *)moe->gate + e * moe->gate_stride_bytes + row * gate_row,
              (const uint8_t *)moe->up + e * moe->up_stride_bytes + row * up_row},
        .row_bytes = {gate_row, up_row}, .out = {out, out + ROWS_WIDTH}, .out_stride = KT_OUT,
        .acts = r->x_rows, .act_stride_bytes = r->x_stride_bytes, .panel = panel,
    };
    size_t end = (size_t)r->first_slot[e + 1];
    for (size_t slot = (size_t)r->first_slot[e]; slot < end; slot += KT_TOKENS) {
        dot.n_tokens = end - slot < KT_TOKENS ? end - slot : KT_TOKENS;
        dot.index = r->slot_token + slot;
        r->kernels->dot(&dot);
        for (size_t t = 0; t < dot.n_tokens; t++) {
            float *gate = out + t * KT_OUT;
            r->kernels->activate(moe->activation, gate, gate + ROWS_WIDTH, rows);
            r->kernels->prepare(gate, rows, r->h_rows + (slot + t) * r->h_stride_bytes + row / KT_CHUNK * r->kernels->act_chunk_bytes);
        }
    }
}

/* y[all tokens, rows] */
static void down_task(run *r, size_t task, float *out, uint8_t *panel) {
    const kt_moe *moe = r->moe;
    size_t row = task * r->rows_hidden;
    size_t rows = moe->hidden - row < r->rows_hidden ? moe->hidden - row : r->rows_hidden;
    size_t row_bytes = kt_row_bytes(moe->down_type, moe->width);
    for (size_t t = 0; t < r->n_tokens; t++) memset(r->y + t * moe->hidden + row, 0, rows * sizeof(float));
    for (size_t e = 0; e < moe->experts; e++) {
        size_t end = (size_t)r->first_slot[e + 1];
        for (size_t slot = (size_t)r->first_slot[e]; slot < end; slot += KT_TOKENS) {
            kt_dot dot = {
                .n_matrices = 1, .rows = rows, .cols = moe->width, .n_tokens = end - slot < KT_TOKENS ? end - slot : KT_TOKENS,
                .type = {moe->down_type}, .w = {(const uint8_t *)moe->down + e * moe->down_stride_bytes + row * row_bytes},
                .row_bytes = {row_bytes}, .out = {out}, .out_stride = KT_OUT,
                .acts = r->h_rows + slot * r->h_stride_bytes, .act_stride_bytes = r->h_stride_bytes, .panel = panel,
            };
            r->kernels->dot(&dot);
            for (size_t t = 0; t < dot.n_tokens; t++) {
                float *y = r->y + (size_t)r->slot_token[slot + t] * moe->hidden + row;
                float score = r->slot_score[slot + t];
                for (size_t i = 0; i < rows; i++) y[i] += score * out[t * KT_OUT + i];
            }
        }
    }
}

static void work(void *argument, size_t thread) {
    run *r = argument;
    float *out = (float *)(r->threads + thread * r->thread_bytes);
    uint8_t *panel = (uint8_t *)(out + KT_TOKENS * KT_OUT);
    size_t task;
    if (r->kernels->begin) r->kernels->begin();
    if (!r->x_is_prepared) {
        while ((task = atomic_fetch_add(&r->next[0], 1)) < r->n_tokens) prepare_token(r, task);
        kt_pool_barrier(r->pool);
    }
    size_t gate_up_tasks = r->n_active * ((r->moe->width + r->rows_width - 1) / r->rows_width);
    while ((task = atomic_fetch_add(&r->next[1], 1)) < gate_up_tasks) gate_up_task(r, task, out, panel);
    kt_pool_barrier(r->pool);
    size_t down_tasks = (r->moe->hidden + r->rows_hidden - 1) / r->rows_hidden;
    while ((task = atomic_fetch_add(&r->next[2], 1)) < down_tasks) down_task(r, task, out, panel);
    if (r->kernels->end) r->kernels->end();
}

int kt_moe_run(kt_pool *pool, const kt_moe *moe, int isa, size_t n_tokens, size_t top_k, const float *x,
               const int64_t *ids, const float *scores, float *y, void *scratch, size_t scratch_bytes) {
    int status = check(moe, isa);
    if (status) return status;
    if (!pool) return KT_BAD_ARGUMENT;
    if (!n_tokens) return KT_OK;
    if (!x || !y || !scratch || (top_k && (!ids || !scores))) return KT_BAD_ARGUMENT;
    uint8_t *base = (uint8_t *)kt_round_up((uintptr_t)scratch, KT_ALIGN);
    run r = {.moe = moe, .kernels = table(isa), .pool = pool, .n_tokens = n_tokens, .top_k = top_k,
             .x = x, .ids = ids, .scores = scores, .y = y};
    if ((status = lay_out(&r, base))) return status;
    if (scratch_bytes < r.total_bytes + KT_ALIGN) return KT_SMALL_SCRATCH;
    for (size_t i = 0; i < n_tokens * top_k; i++)
        if (ids[i] < 0 || (uint64_t)ids[i] >= moe->experts) return KT_BAD_EXPERT;
    sort_slots(&r);
    int few = n_tokens * top_k < r.n_active * FEW_TOKENS;
    r.rows_width = few ? ROWS_FEW : ROWS_WIDTH;
    r.rows_hidden = few ? ROWS_FEW : ROWS_HIDDEN;
    r.x_is_prepared = n_tokens <= FEW_TOKENS;
    for (size_t t = 0; r.x_is_prepared && t < n_tokens; t++) prepare_token(&r, t);
    return kt_pool_run(pool, work, &r);
}
