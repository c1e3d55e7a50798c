/* AMX with bf16 tiles: weights and activations rounded to bf16, sums of pairs in float.
 *
 * SHAPES      w [rows, cols] in any type but f32, acts [n_tokens, cols] bf16, out [n_tokens, rows] float
 * DEFINITION  moe_scalar.c
 * LAYOUT      A tile  [16 tokens][32 columns] bf16, in the order of kt_bf16_column
 *             B tile  [16 column pairs][16 rows][2] bf16: a span of a packed group, so bf16 weights are tiles as they lie
 *             C tile  [16 tokens][16 rows] float, read from and written to out
 * TILES       for each panel of columns: the tokens' columns as A; 32 rows at a time, their weights as B tiles, filled once for
 *             all tokens, an item at a time; then blocks of 2 x 2 C tiles, 32 tokens x 32 rows. While an item is multiplied the
 *             next one is filled (fill.h): some rows of it after each product, so few that the vector units keep up. Items are
 *             short, so that their tiles never leave the first-level cache, except where there are many tokens: C would come and
 *             go too often. With one block C stays in its tiles from item to item.
 *             Experts with few tokens, which would leave tiles empty, go to the loops of avx512_bf16.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx512fp16,amx-tile,amx-bf16,prefer-vector-width=512")
#include "fill.h"

enum {
    ITEM_COLUMN_BYTES = 2 * BLOCK,
    SHORT_BLOCKS = 4,   /* with fewer blocks than these, items are short */
};

static size_t column_bytes(size_t n_tokens) { return 2 * kt_round_up(n_tokens, BLOCK) + (n_tokens > BLOCK ? 2 * ITEM_COLUMN_BYTES : 0); }
static size_t panel_bytes(void) { return C_BYTES + PANEL_BYTES + 2 * STRIP * ITEM_COLUMN_BYTES + (KT_TOKENS + BLOCK) * KT_ALIGN; }

/* All tokens' blocks with one item. */
typedef struct {
    const kt_dot *dot;
    const uint8_t *a, *b0, *b1;
    size_t a_stride_bytes, b_step_bytes, steps;
    float *c;          /* [blocks][C_BLOCK] */
    int fresh, stream; /* the first columns of all; B does not fit into the first-level cache */
} item;

/* B tiles that stay in the first-level cache are loaded so that they do. */
#define LOAD_B(tile, from, stream) do { if (stream) _tile_stream_loadd(tile, from, 64); else _tile_loadd(tile, from, 64); } while (0)

/* One block's products with an item, and after each of them `n` rows of the next item, of 32 a span: a span takes 8 / n steps.
 * Products and filling overlap only if they alternate this finely. A product's operands are loaded while the one before runs. */
KT_INLINE void multiply_block(const int type, const int two, const int n, const int stream, const item *it, const uint8_t *a, filling *f) {
    const size_t a_stride = it->a_stride_bytes, b_step = it->b_step_bytes, period = (size_t)(8 / n);
    const uint8_t *b0 = it->b0, *b1 = it->b1;
    LOAD_B(6, b0, stream);
    _tile_stream_loadd(4, a, a_stride);
    LOAD_B(7, b1, stream);
    for (size_t step = 0; step < it->steps;) {
        const int fill = f->at < f->spans && it->steps - step >= period;
        span_filling s = {.tiles = NULL};
        if (fill) s = begin_span(type, f);
        KT_UNROLL for (int part = 0; part < 8 / n; part++) {
            const uint8_t *below = a + TILE * a_stride;
            if (++step < it->steps) a += 64, b0 += b_step, b1 += b_step;
            _tile_dpbf16ps(0, 4, 6);
            if (two) _tile_stream_loadd(5, below, a_stride);
            if (fill) fill_rows(type, &s, part * 4 * n, n);
            _tile_dpbf16ps(1, 4, 7);
            _tile_stream_loadd(4, a, a_stride);
            if (fill) fill_rows(type, &s, (part * 4 + 1) * n, n);
            if (two) _tile_dpbf16ps(2, 5, 6);
            LOAD_B(6, b0, stream);
            if (fill) fill_rows(type, &s, (part * 4 + 2) * n, n);
            if (two) _tile_dpbf16ps(3, 5, 7);
            LOAD_B(7, b1, stream);
            if (fill) fill_rows(type, &s, (part * 4 + 3) * n, n);
            if (step == it->steps) return;
        }
    }
}

/* `follows`: C is still in its tiles; `keep`: leave it there. */
KT_INLINE void multiply_and_fill(const int type, const item *it, filling *f, int follows, int keep) {
    const kt_dot *dot = it->dot;
    const size_t blocks = (dot->n_tokens + BLOCK - 1) / BLOCK;
    const uint8_t *a = it->a;
    float *c = it->c;
    for (size_t token = 0; token < dot->n_tokens; token += BLOCK, a += BLOCK * it->a_stride_bytes, c += C_BLOCK) {
        const int two = dot->n_tokens - token > TILE;
        stores_before_tiles();
        if (!follows && it->fresh) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else if (!follows) {
            _tile_loadd(0, c, 64);
            _tile_loadd(1, c + C_TILE, 64);
            _tile_loadd(2, c + 2 * C_TILE, 64);
            _tile_loadd(3, c + 3 * C_TILE, 64);
        }
        if (blocks == 1 && !two) multiply_block(type, 0, 8, 0, it, a, f);
        else if (blocks == 1) multiply_block(type, 1, 8, 0, it, a, f);
        else if (blocks < 4) multiply_block(type, two, 4, it->stream, it, a, f);
        else if (blocks < 8) multiply_block(type, two, 2, it->stream, it, a, f);
        else multiply_block(type, two, 1, it->stream, it, a, f);
        if (keep) break;
        _tile_stored(0, c, 64);
        _tile_stored(1, c + C_TILE, 64);
        _tile_stored(2, c + 2 * C_TILE, 64);
        _tile_stored(3, c + 3 * C_TILE, 64);
    }
    while (f->at < f->spans) fill_span(type, f);
}

#define FILL_TYPES(X) X(KT_BF16) X(KT_Q8_0) X(KT_Q5_0) X(KT_Q4_0) X(KT_Q6_K) X(KT_Q5_K) X(KT_Q4_K) X(KT_Q3_K) X(KT_Q2_K) X(KT_IQ4_NL) \
    X(KT_IQ4_XS) X(KT_MXFP4) X(KT_FP8_BLOCK128) X(KT_INT8) X(KT_INT4_64) X(KT_INT4_128)
#define DEFINE(TYPE) \
    static void multiply_##TYPE(const item *it, filling *f, int follows, int keep) { \
        if (!it) while (f->at < f->spans) fill_span(TYPE, f); \
        else multiply_and_fill(TYPE, it, f, follows, keep); \
    }
FILL_TYPES(DEFINE)
#define ENTRY(TYPE) [TYPE] = multiply_##TYPE,
/* By the type that is filled. Without an item it is filled at once. */
static void (*const multiply[KT_TYPE_COUNT])(const item *, filling *, int, int) = {FILL_TYPES(ENTRY)};

/* Out from C: rows back from what filling scaled them to, and activations from what kt_prepare_bf16 did. */
static void scale_back(const kt_dot *dot, size_t m, const float *c) {
    const size_t blocks = (dot->n_tokens + BLOCK - 1) / BLOCK;
    for (size_t g = 0; g < dot->n_groups; g++) {
        __m512 factor = _mm512_set1_ps(KT_BF16_UNSCALE);
        if (dot->type[m] != KT_BF16) factor = row_unfactor(dot->w[m] + (g + 1) * dot->group_bytes[m] - 64);
        float *out = dot->out[m] + g * KT_ROWS;
        const float *from = c + g / 2 * blocks * C_BLOCK + g % 2 * C_TILE;
        for (size_t t = 0; t < dot->n_tokens; t++, out += dot->out_stride)
            _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_load_ps(from + t / TILE * 2 * C_TILE + t % TILE * TILE), factor));
    }
}

static void open_item(filling *f, const kt_dot *dot, const place *p, size_t width, size_t item_cols, uint8_t *tiles) {
    place after = *p;
    f->type = dot->type[p->m], f->at = 0, f->all_cols = dot->cols, f->first = p->first, f->tiles = tiles;
    f->last = p->panel + width < dot->cols ? p->panel + width : dot->cols;
    f->spans = kt_spans(f->last - p->first < item_cols ? f->last - p->first : item_cols);
    f->last = kt_spans(f->last) * KT_SPAN;
    if (!following(dot, width, width, &after)) after = *p;
    for (int second = 0; second < 2; second++) {
        f->group[second] = group_of(dot, p, second);
        const int type = dot->type[after.m];
        const uint8_t *group = group_of(dot, &after, second);
        f->after[second].codes = group + after.panel / KT_SPAN * kt_span_bytes(type);
        f->after[second].scales = group + kt_codes_bytes(type, dot->cols) + after.panel / kt_scale_columns(type) * kt_scale_unit_bytes(type);
        f->after[second].bound = group + dot->group_bytes[after.m] - 64;
    }
}

static void dot(const kt_dot *dot) {
    if (dot->few) {
        kt_dot_avx512_bf16(dot);
        return;
    }
    begin();
    const int alone = dot->n_tokens <= BLOCK;
    const size_t blocks = (dot->n_tokens + BLOCK - 1) / BLOCK, width = panel_cols(column_bytes(dot->n_tokens), STRIP, dot->cols), item_cols = blocks < SHORT_BLOCKS ? STRIP : width;
    const size_t b_bytes = item_cols * ITEM_COLUMN_BYTES, first_byte = kt_act_bytes_int16(dot->cols);
    uint8_t *b_tiles = dot->panel + C_BYTES, *a_rows = b_tiles + 2 * b_bytes;
    float *c = (float *)(void *)dot->panel;
    const size_t c_matrix = (dot->n_groups + 1) / 2 * blocks * C_BLOCK;
    const uint8_t *a = NULL;
    item it = {.dot = dot, .stream = item_cols > STRIP};
    place here = {0}, there = {0};
    filling fillings[2];
    open_item(&fillings[0], dot, &here, width, item_cols, b_tiles);
    multiply[fillings[0].type](NULL, &fillings[0], 0, 0);
    for (size_t number = 0, more = 1; more; number++, here = there) {
        const filling *now = &fillings[number % 2];
        filling *next = &fillings[(number + 1) % 2];
        if (here.m == 0 && here.g == 0 && here.first == here.panel) {
            it.a_stride_bytes = width * 2 + KT_ALIGN;
            a = gather(dot, first_byte + here.panel * 2, (now->last - here.panel) * 2, a_rows, &it.a_stride_bytes);
        }
        it.a = a + (here.first - here.panel) * 2, it.steps = now->spans;
        it.c = c + here.m * c_matrix + here.g / 2 * blocks * C_BLOCK;
        it.fresh = here.panel == 0 && here.first == here.panel;
        it.b0 = now->tiles, it.b1 = now->tiles + TILE_BYTES, it.b_step_bytes = 2 * TILE_BYTES;
        if (now->type == KT_BF16) {
            it.b0 = now->group[0] + now->first / KT_SPAN * TILE_BYTES;
            it.b1 = now->group[1] + now->first / KT_SPAN * TILE_BYTES;
            it.b_step_bytes = TILE_BYTES;
        }
        more = (size_t)following(dot, width, item_cols, &there);
        if (more) open_item(next, dot, &there, width, item_cols, b_tiles + (number + 1) % 2 * b_bytes);
        else next->type = now->type, next->at = next->spans = 0;
        multiply[next->type](&it, next, alone && here.first > here.panel, alone && more && there.first > there.panel);
    }
    for (size_t m = 0; m < dot->n_matrices; m++) scale_back(dot, m, c + m * c_matrix);
}

const kt_kernels kt_kernels_amx = {
    .types = KT_ALL_TYPES & ~KT_BIT(KT_F32), .act_bytes = kt_act_bytes_bf16, .panel_bytes = panel_bytes,
    .prepare = kt_prepare_bf16, .activate = kt_activate_avx512, .accumulate = kt_accumulate_avx512, .dot = dot, .end = end,
};
#endif
