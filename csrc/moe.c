/* The routed experts, whatever the instruction set: sorts tokens by expert, splits the work, and calls the table.
 *
 * PHASES, with a barrier between them; tasks of a phase are taken from an atomic counter
 *     0  prepare x                  a task = one token (for a few tokens the caller does it while sorting)
 *     1  h = act(gate x) * up x     a task = (expert, block of rows of I), experts with most tokens first
 *     2  y = sum of score * down h  a task = (run of experts, block of rows of H); runs one after the other
 * A slot is one (token, expert) pair; slots are sorted by expert, then token, then place in the row; a place without an
 * expert has none. Every element of h is computed within one task, and every element of y by one task a run of experts,
 * in the order of the runs: the number of threads cannot change a bit.
 *
 * An expert with tile_tokens tokens or more is computed by tiles, where the instruction set has them, in wide blocks that
 * keep its tokens in the second-level cache; the others stream their weights past a few tokens.
 */
#include <sched.h>
#include <stdatomic.h>

#include "internal.h"
#include "pool.h"

enum {
    PHASES = 3,
    NO_EXPERT = -1,      /* the id of a place that is computed elsewhere */
    ROWS_FEW = 64,       /* rows a task where weights are streamed: many tasks, each a long stream */
    ENDING = 2,          /* so many of those tasks a thread are taken in parts, the last ones: then threads end together */
    PARTS = ROWS_FEW / KT_SPAN,
    ROWS_TILES = 256,    /* where tiles are filled: a task's tokens are gathered once */
    RUN = 16,            /* experts a task of phase 2, where tiles are filled: their h stays in the third-level cache */
    ALONE_TOKENS = 8,    /* a call of so few tokens streams: a token's result is then the same to the bit alone and with others */
    OUT_STRIDE = 2 * ROWS_TILES + 16,   /* an odd number of cache lines: a column of a tile does not fall into one set */
};

typedef struct {
    const kt_moe *moe;
    const kt_kernels *kernels;
    kt_pool *pool;
    size_t n_tokens, top_k;
    const float *x, *scores;
    const int64_t *ids;
    float *y;
    size_t n_active, n_tiles;   /* experts in use; the first ones of `order` that are computed by tiles */
    size_t run;
    int x_is_prepared;
    /* in scratch */
    int32_t *first_slot;   /* [E + 1] */
    int32_t *order;        /* [n_active] experts, most tokens first */
    int32_t *active;       /* [n_active] experts, ascending */
    int32_t *slot_token;   /* [T k] */
    float *slot_score;     /* [T k] */
    atomic_size_t *done;   /* [blocks of H] runs of experts that are in y */
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
    case KT_AMX_INT8: return &kt_kernels_amx_int8;
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
    case KT_BAD_EXPERT: return "an expert id is outside [0, experts) and not -1";
    case KT_REPEATED_EXPERT: return "an expert appears twice among the experts of a token";
    case KT_SMALL_SCRATCH: return "scratch is smaller than kt_moe_scratch_bytes says";
    case KT_TOO_LARGE: return "too many (token, expert) pairs, or a size overflows";
    case KT_FORKED: return "the pool was made before fork(): make a new one in the child";
    case KT_NOT_BUILT: return "the instruction set is not part of this build";
    case KT_NOT_FINITE: return "a weight is NaN or infinite, and the packed type has neither";
    case KT_NO_THREAD: return "a thread cannot be made";
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
        if (cols[i] % kt_block(types[i])) return KT_BAD_COLUMNS;
    }
    return KT_OK;
}

/* A row's bytes, made an odd number of cache lines, so that tiles of 16 rows do not fall into one set. */
static size_t odd_lines(size_t bytes) { return (kt_round_up(bytes, KT_ALIGN) / KT_ALIGN | 1) * KT_ALIGN; }

/* Divides scratch; with a null base it only counts. */
static int lay_out(run *r, uint8_t *base) {
    const kt_moe *moe = r->moe;
    size_t slots, at = 0;
    if (__builtin_mul_overflow(r->n_tokens, r->top_k, &slots) || slots > INT32_MAX) return KT_TOO_LARGE;
    if (moe->experts > INT32_MAX || moe->hidden > SIZE_MAX / 64 || moe->width > SIZE_MAX / 64) return KT_TOO_LARGE;
    r->x_stride_bytes = odd_lines(r->kernels->act_bytes(moe->hidden));
    r->h_stride_bytes = odd_lines(r->kernels->act_bytes(moe->width));
    r->thread_bytes = (KT_TOKENS + 2 * KT_ROWS) * OUT_STRIDE * sizeof(float) + kt_round_up(r->kernels->panel_bytes(), KT_ALIGN);
    r->first_slot = (int32_t *)(void *)(base + reserve(&at, moe->experts + 1, sizeof(int32_t)));
    r->order = (int32_t *)(void *)(base + reserve(&at, moe->experts, sizeof(int32_t)));
    r->active = (int32_t *)(void *)(base + reserve(&at, moe->experts, sizeof(int32_t)));
    r->slot_token = (int32_t *)(void *)(base + reserve(&at, slots, sizeof(int32_t)));
    r->slot_score = (float *)(void *)(base + reserve(&at, slots, sizeof(float)));
    r->done = (atomic_size_t *)(void *)(base + reserve(&at, moe->hidden / KT_SPAN + 1, sizeof(atomic_size_t)));
    r->x_rows = base + reserve(&at, r->n_tokens, r->x_stride_bytes);
    r->h_rows = base + reserve(&at, slots + 2 * KT_ROWS, r->h_stride_bytes);   /* tiles read rows past an expert's last */
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
    size_t experts = r->moe->experts, places = r->n_tokens * r->top_k;
    memset(r->first_slot, 0, (experts + 1) * sizeof(int32_t));
    for (size_t i = 0; i < places; i++)
        if (r->ids[i] != NO_EXPERT) r->first_slot[r->ids[i]]++;
    r->n_active = 0;
    for (size_t e = 0; e < experts; e++) {
        int32_t count = r->first_slot[e];
        if (!count) continue;
        r->active[r->n_active] = (int32_t)e;
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
    for (size_t i = places; i-- > 0;) {  /* backwards: ends become starts, and slots of an expert stay in token order */
        if (r->ids[i] == NO_EXPERT) continue;
        int32_t slot = --r->first_slot[r->ids[i]];
        r->slot_token[slot] = (int32_t)(i / r->top_k);
        r->slot_score[slot] = r->scores[i];
    }
}

static int by_tiles(const run *r, size_t e) {
    size_t tokens = (size_t)(r->first_slot[e + 1] - r->first_slot[e]);
    return r->n_tokens > ALONE_TOKENS && r->moe->tile_tokens && tokens >= r->moe->tile_tokens;
}

static void prepare_token(run *r, size_t token) {
    size_t hidden = r->moe->hidden;
    int uses = (r->n_tiles ? KT_TILES : 0) | (r->n_tiles < r->n_active ? KT_FEW : 0);
    r->kernels->prepare(r->x + token * hidden, 0, hidden, hidden, uses, r->x_rows + token * r->x_stride_bytes);
}

static size_t blocks_of(size_t rows, size_t block) { return (rows + block - 1) / block; }

/* Blocks of ROWS_FEW rows as tasks: whole ones, and the last ones in parts. */
static size_t whole_tasks(const run *r, size_t blocks) {
    size_t ending = ENDING * kt_pool_threads(r->pool);
    return blocks > ending ? blocks - ending : 0;
}
static size_t few_tasks(const run *r, size_t blocks) { return whole_tasks(r, blocks) + (blocks - whole_tasks(r, blocks)) * PARTS; }
/* The first row of a task, counted from the first block on; its rows. */
static size_t few_rows(const run *r, size_t blocks, size_t task, size_t *rows) {
    size_t whole = whole_tasks(r, blocks);
    *rows = task < whole ? ROWS_FEW : KT_SPAN;
    return task < whole ? task * ROWS_FEW : whole * ROWS_FEW + (task - whole) * KT_SPAN;
}

/* h[slots of expert e, rows] */
static void gate_up_task(run *r, size_t task, float *out, uint8_t *panel) {
    const kt_moe *moe = r->moe;
    size_t wide_blocks = blocks_of(moe->width, ROWS_TILES), few_blocks = blocks_of(moe->width, ROWS_FEW);
    size_t at = task / wide_blocks, row = task % wide_blocks * ROWS_TILES, rows = ROWS_TILES;
    int tiles = at < r->n_tiles;
    if (!tiles) {
        row = few_rows(r, (r->n_active - r->n_tiles) * few_blocks, task - r->n_tiles * wide_blocks, &rows);
        at = r->n_tiles + row / (few_blocks * ROWS_FEW), row %= few_blocks * ROWS_FEW;
    }
    if (row >= moe->width) return;
    if (rows > moe->width - row) rows = moe->width - row;
    size_t e = (size_t)r->order[at];
    size_t gate_group = kt_group_bytes(moe->gate_type, moe->hidden), up_group = kt_group_bytes(moe->up_type, moe->hidden);
    kt_dot dot = {
        .n_matrices = 2, .n_groups = kt_groups(rows), .cols = moe->hidden, .few = !tiles,
        .type = {moe->gate_type, moe->up_type},
        .w = {(const uint8_t *)moe->gate + e * moe->gate_stride_bytes + row / KT_ROWS * gate_group,
              (const uint8_t *)moe->up + e * moe->up_stride_bytes + row / KT_ROWS * up_group},
        .group_bytes = {gate_group, up_group}, .out = {out, out + ROWS_TILES}, .out_stride = OUT_STRIDE,
        .acts = r->x_rows, .act_stride_bytes = r->x_stride_bytes, .panel = panel,
    };
    const float *gate_bias = moe->gate_bias ? moe->gate_bias + e * moe->width + row : NULL;
    const float *up_bias = moe->up_bias ? moe->up_bias + e * moe->width + row : NULL;
    size_t end = (size_t)r->first_slot[e + 1];
    for (size_t slot = (size_t)r->first_slot[e]; slot < end; slot += KT_TOKENS) {
        dot.n_tokens = end - slot < KT_TOKENS ? end - slot : KT_TOKENS;
        dot.index = r->slot_token + slot;
        r->kernels->dot(&dot);
        for (size_t t = 0; t < dot.n_tokens; t++) {
            float *gate = dot.out[0] + t * OUT_STRIDE, *up = dot.out[1] + t * OUT_STRIDE;
            if (gate_bias) r->kernels->accumulate(gate, gate_bias, 1, rows);
            if (up_bias) r->kernels->accumulate(up, up_bias, 1, rows);
            r->kernels->activate(moe, gate, up, rows);
            r->kernels->prepare(gate, row, rows, moe->width, tiles ? KT_TILES : KT_FEW, r->h_rows + (slot + t) * r->h_stride_bytes);
        }
    }
}

/* y[all tokens, rows], of one run of experts; without tiles there is one */
static void down_task(run *r, size_t task, float *out, uint8_t *panel) {
    const kt_moe *moe = r->moe;
    size_t blocks = blocks_of(moe->hidden, ROWS_TILES), block = task % blocks, turn = task / blocks, row = block * ROWS_TILES, rows = ROWS_TILES;
    if (!r->n_tiles) turn = 0, row = few_rows(r, blocks_of(moe->hidden, ROWS_FEW), task, &rows), block = row / KT_SPAN;
    if (row >= moe->hidden) return;
    if (rows > moe->hidden - row) rows = moe->hidden - row;
    size_t group = kt_group_bytes(moe->down_type, moe->width);
    /* The run before was taken as many tasks ago as there are blocks: it is nearly always done. */
    while (atomic_load_explicit(&r->done[block], memory_order_acquire) != turn) sched_yield();
    if (turn == 0)
        for (size_t t = 0; t < r->n_tokens; t++) memset(r->y + t * moe->hidden + row, 0, rows * sizeof(float));
    size_t last = (turn + 1) * r->run < r->n_active ? (turn + 1) * r->run : r->n_active;
    for (size_t a = turn * r->run; a < last; a++) {
        size_t e = (size_t)r->active[a], end = (size_t)r->first_slot[e + 1];
        const float *bias = moe->down_bias ? moe->down_bias + e * moe->hidden + row : NULL;
        for (size_t slot = (size_t)r->first_slot[e]; slot < end; slot += KT_TOKENS) {
            kt_dot dot = {
                .n_matrices = 1, .n_groups = kt_groups(rows), .cols = moe->width, .few = !by_tiles(r, e),
                .n_tokens = end - slot < KT_TOKENS ? end - slot : KT_TOKENS, .type = {moe->down_type},
                .w = {(const uint8_t *)moe->down + e * moe->down_stride_bytes + row / KT_ROWS * group},
                .group_bytes = {group}, .out = {out}, .out_stride = OUT_STRIDE,
                .acts = r->h_rows + slot * r->h_stride_bytes, .act_stride_bytes = r->h_stride_bytes, .panel = panel,
            };
            r->kernels->dot(&dot);
            for (size_t t = 0; t < dot.n_tokens; t++) {
                float *y = r->y + (size_t)r->slot_token[slot + t] * moe->hidden + row;
                if (bias) r->kernels->accumulate(out + t * OUT_STRIDE, bias, 1, rows);
                r->kernels->accumulate(y, out + t * OUT_STRIDE, r->slot_score[slot + t], rows);
            }
        }
    }
    atomic_store_explicit(&r->done[block], turn + 1, memory_order_release);
}

static size_t take(run *r, int phase) { return atomic_fetch_add_explicit(&r->next[phase], 1, memory_order_relaxed); }

static void work(void *argument, size_t thread) {
    run *r = argument;
    float *out = (float *)(void *)(r->threads + thread * r->thread_bytes);
    uint8_t *panel = (uint8_t *)(out + (KT_TOKENS + 2 * KT_ROWS) * OUT_STRIDE);
    size_t task, width = r->moe->width;
    if (!r->x_is_prepared) {
        while ((task = take(r, 0)) < r->n_tokens) prepare_token(r, task);
        kt_pool_barrier(r->pool);
    }
    size_t gate_up_tasks = r->n_tiles * blocks_of(width, ROWS_TILES) + few_tasks(r, (r->n_active - r->n_tiles) * blocks_of(width, ROWS_FEW));
    while ((task = take(r, 1)) < gate_up_tasks) gate_up_task(r, task, out, panel);
    kt_pool_barrier(r->pool);
    size_t turns = r->n_active ? blocks_of(r->n_active, r->run) : 1;   /* without experts one turn sets y to zero */
    size_t hidden = r->moe->hidden, down_tasks = r->n_tiles ? turns * blocks_of(hidden, ROWS_TILES) : few_tasks(r, blocks_of(hidden, ROWS_FEW));
    while ((task = take(r, 2)) < down_tasks) down_task(r, task, out, panel);
    if (r->kernels->end) r->kernels->end();
}

static int check_ids(const kt_moe *moe, const int64_t *ids, size_t n_tokens, size_t top_k) {
    for (size_t i = 0; i < n_tokens * top_k; i++) {
        if (ids[i] == NO_EXPERT) continue;
        if (ids[i] < 0 || (uint64_t)ids[i] >= moe->experts) return KT_BAD_EXPERT;
        for (size_t j = i - i % top_k; j < i; j++)
            if (ids[j] == ids[i]) return KT_REPEATED_EXPERT;
    }
    return KT_OK;
}

static size_t expert_bytes(const kt_moe *moe) {
    size_t inner = kt_groups(moe->width), outer = kt_groups(moe->hidden);
    return inner * (kt_group_bytes(moe->gate_type, moe->hidden) + kt_group_bytes(moe->up_type, moe->hidden))
           + outer * kt_group_bytes(moe->down_type, moe->width);
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
    if ((status = check_ids(moe, ids, n_tokens, top_k))) return status;
    sort_slots(&r);
    while (r.n_tiles < r.n_active && by_tiles(&r, (size_t)r.order[r.n_tiles])) r.n_tiles++;
    r.run = r.n_tiles ? RUN : r.n_active ? r.n_active : 1;
    for (size_t b = 0; b < blocks_of(moe->hidden, KT_SPAN); b++) atomic_init(&r.done[b], 0);
    r.x_is_prepared = n_tokens <= ALONE_TOKENS;
    for (size_t t = 0; r.x_is_prepared && t < n_tokens; t++) prepare_token(&r, t);
    if ((status = kt_pool_run(pool, work, &r))) return status;
    kt_pool_count(pool, r.n_active * expert_bytes(moe));
    return KT_OK;
}
