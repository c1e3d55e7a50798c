/* AMX with bf16 tiles: weights and activations rounded to bf16, sums of pairs in float.
 *
 * SHAPES      w [rows, cols] in any type but f32, acts [n_tokens, cols] bf16, out [n_tokens, rows] float
 * DEFINITION  moe_scalar.c
 * LAYOUT      A tile  [16 tokens][32 columns] bf16, in the order of kt_bf16_column
 *             B tile  [16 column pairs][16 rows][2] bf16: a span of a packed group, so bf16 weights are tiles as they lie
 *             C tile  [16 tokens][16 rows] float, read from and written to out
 * TILES       for each panel of columns: the tokens' columns as A; 32 rows at a time, their weights as B tiles, filled once for
 *             all tokens, an item at a time; then blocks of 2 x 2 C tiles, 32 tokens x 32 rows. While an item is multiplied the
 *             next one is filled, half a tile after each product, which leave the vector units idle. With one block an item
 *             is short, so that its tiles never leave the first-level cache, and C stays in its tiles from item to item.
 *             Experts with few tokens, which would leave tiles empty, go to the loops of avx512_bf16.
 * FILLING     in float16, 32 weights at a time: an integer in the low bits of a float16 is that many 2^-24, so one
 *             multiply-add makes a weight of a code; two integer instructions make a bf16 of that, 2^-112 times as large.
 *             Activations are 2^64 times as large, so nothing underflows. Rows are scaled by a power of two, from the bound that
 *             is packed with them, so that float16 reaches. Out is scaled back.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx512fp16,amx-tile,amx-bf16,prefer-vector-width=512")
#include "avx512.h"
#include "lanes.h"
#include "tiles.h"

enum { STRIP = 256, STRIP_SPANS = STRIP / KT_SPAN, PANEL_BYTES = 640 << 10, SPANS_AHEAD = 32, ITEM_COLUMN_BYTES = 2 * BLOCK };

/* Columns of a panel: so many that the tokens' and two items' weights fill a third of a second-level cache of 2 MiB, which two
 * threads may share. */
static size_t panel_cols(size_t n_tokens, size_t cols) {
    size_t weight_bytes = n_tokens > BLOCK ? 2 * ITEM_COLUMN_BYTES : 0, column_bytes = 2 * kt_round_up(n_tokens, BLOCK) + weight_bytes;
    size_t most = PANEL_BYTES / column_bytes / STRIP * STRIP;
    size_t panels = (cols + most - 1) / most;
    return kt_round_up((cols + panels - 1) / panels, STRIP);
}
static size_t panel_bytes(void) { return PANEL_BYTES + 2 * STRIP * ITEM_COLUMN_BYTES + (KT_TOKENS + BLOCK) * KT_ALIGN; }

/* 2^-exponent of the bound: rows times this are below 2. */
KT_INLINE __m512 row_factor(const uint8_t *bound) {
    __m512i exponent = _mm512_and_si512(_mm512_loadu_si512(bound), _mm512_set1_epi32(0x7f800000));
    return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(254 << 23), exponent));
}
/* What out has to be multiplied by: the inverse, 2^112 for bf16_of_half, and KT_BF16_UNSCALE. */
KT_INLINE __m512 row_unfactor(const uint8_t *bound) {
    __m512i exponent = _mm512_and_si512(_mm512_loadu_si512(bound), _mm512_set1_epi32(0x7f800000));
    return _mm512_mul_ps(_mm512_castsi512_ps(exponent), _mm512_set1_ps(0x1p112f * KT_BF16_UNSCALE));
}

/* 2^-112 times each float16, as bf16: rounded to three bits less, with the exponent as it is and none of the sign's copies.
 * What has no exponent, below 2^-15 of the row's bound, has none in bf16 either, where tiles take it for 0. */
KT_INLINE __m512i bf16_of_half(__m512h half) {
    __m512i moved = _mm512_mulhrs_epi16((__m512i)half, _mm512_set1_epi16(1 << 12));
    return _mm512_and_si512(moved, _mm512_set1_epi16((short)0x8fff));
}

/* 16 floats as pairs of float16. */
KT_INLINE __m512h pairs_of(__m512 value) {
    const __m512i twice = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return (__m512h)_mm512_permutexvar_epi16(twice, _mm512_castsi256_si512(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)));
}

/* `bits` bits from bit `from` of each 16 to the top of a float16's mantissa. */
KT_INLINE __m512h placed(__m512i w, const int from, const int bits) {
    const int by = 10 - bits - from;
    const int mask = ((1 << bits) - 1) << (10 - bits);
    if (by > 0) w = _mm512_slli_epi16(w, by > 0 ? by : 0);
    if (by < 0) w = _mm512_srli_epi16(w, by < 0 ? -by : 0);
    return (__m512h)_mm512_and_si512(w, _mm512_set1_epi16((short)mask));
}

/* Half of the tile of a span: 16 columns, whose scale and minimum are given. */
KT_INLINE void fill_half_span(const int type, const int half, const uint8_t *span, __m512h scale, __m512h minimum, uint8_t *tile) {
    const int bits = kt_value_bits(type);
    KT_UNROLL for (int e = 2 * half; e < 2 * half + 2; e++) {
        KT_UNROLL for (int p = 0; p < 4; p++) {
            const int second = p % 2, upper = p / 2;
            __m512h value;
            if (type == KT_FP8_BLOCK128) {   /* in float16, exponents of e4m3 mean 2^-8 of what they mean there */
                __m512i w = _mm512_loadu_si512(span + (2 * e + second) * WORD_ROW);
                if (!upper) w = _mm512_slli_epi16(w, 8);
                w = _mm512_and_si512(_mm512_srai_epi16(w, 1), _mm512_set1_epi16((short)0xbf80));
                value = _mm512_mul_ph((__m512h)w, scale);
            } else if (bits == 4) {
                value = placed(_mm512_loadu_si512(span + e * WORD_ROW), 4 * second + 8 * upper, bits);
                value = _mm512_fmsub_ph(value, scale, minimum);
            } else {
                value = placed((__m512i)quad(type, span, 2 * e + second), 8 * upper, bits);
                value = _mm512_fmsub_ph(value, scale, minimum);
            }
            _mm512_store_si512(tile + (e * 4 + p) * 64, bf16_of_half(value));
        }
    }
}

/* The filling of an item, as far as it is: tiles of columns [first, first + 32 spans) of two groups of 16 rows. */
typedef struct filling {
    size_t at, spans;                              /* spans: filled, and all */
    int type;
    const uint8_t *group[2], *after[2];            /* after: the groups that follow, for what is asked for in time */
    size_t all_cols, first, last;                  /* last: the end of the panel */
    uint8_t *tiles;                                /* [spans][2] */
    __m512h scales[2][STRIP / 16], minima[2][STRIP / 16];   /* of 256 columns, in pairs */
} filling;

/* Twice each number of 0 to 15, in bytes. */
KT_INLINE __m512i pair_bytes(void) {
    return _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909, 0x08080808,
                            0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
}

/* 16 float16 times a power of two, as pairs. */
KT_INLINE __m512h scaled_pairs(const uint8_t *halves, __m512 factor) {
    return pairs_of(_mm512_mul_ps((__m512)half_floats(halves), factor));
}

/* Bytes 16 `run` and up of four runs, as pairs of float16. */
KT_INLINE __m512h byte_pairs(__m512i bytes, const int run) {
    const __m512i low = _mm512_add_epi8(pair_bytes(), _mm512_set1_epi8((char)(16 * run)));
    return _mm512_cvtepu16_ph(_mm512_maskz_permutexvar_epi8(0x5555555555555555u, low, bytes));
}

/* open_strip for the types whose scales and minima are 6 bits: in float16 from the start, with the same roundings. */
KT_INLINE void open_six_bits(filling *f, const int second, const uint8_t *unit, __m512 scale_factor, __m512 factor) {
    const __m512h d = scaled_pairs(unit, scale_factor), dmin = scaled_pairs(unit + 32, factor);
    const __m512i v0 = _mm512_loadu_si512(unit + 64), v1 = _mm512_loadu_si512(unit + 128), v2 = _mm512_loadu_si512(unit + 192);
    const __m512i six = _mm512_set1_epi8(63), two = _mm512_set1_epi8(3), four = _mm512_set1_epi8(12), top = _mm512_set1_epi8(48);
    const __m512i scales[2] = {_mm512_and_si512(v0, six), _mm512_and_si512(v1, six)};
    const __m512i last = _mm512_or_si512(_mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(v0, 6), two), _mm512_and_si512(_mm512_srli_epi16(v1, 4), four)),
                                         _mm512_and_si512(_mm512_srli_epi16(v2, 2), top));
    const __m512i minima[2] = {_mm512_and_si512(v2, six), last};
    KT_UNROLL for (int run = 0; run < STRIP_SPANS; run++) {
        f->scales[second][run] = _mm512_mul_ph(d, byte_pairs(scales[run / 4], run % 4));
        f->minima[second][run] = _mm512_mul_ph(dmin, byte_pairs(minima[run / 4], run % 4));
    }
}

/* Scales of the 256 columns from `first`, as float16 pairs of scaled rows. */
KT_INLINE void open_strip(const int type, filling *f, const int second, size_t first) {
    const uint8_t *group = f->group[second], *bound = group + kt_group_bytes(type, f->all_cols) - 64, *scales = group + kt_codes_bytes(type, f->all_cols);
    const __m512 factor = row_factor(bound);
    const __m512 scale_factor = _mm512_mul_ps(factor, _mm512_set1_ps(type == KT_FP8_BLOCK128 ? 256.0f : (float)(1 << (14 + kt_value_bits(type)))));
    if (type == KT_Q4_K || type == KT_Q5_K) {
        open_six_bits(f, second, scales + first / 256 * kt_scale_unit_bytes(type), scale_factor, factor);
        return;
    }
    float scale[STRIP / 16][LANES] __attribute__((aligned(64))) = {{0}}, minimum[STRIP / 16][LANES] __attribute__((aligned(64))) = {{0}};
    const size_t cols = f->all_cols - first < STRIP ? f->all_cols - first : STRIP, runs = (cols + kt_run(type) - 1) / kt_run(type);
    expand_scales(type, scales, 0, first, cols, LANES, scale[0], minimum[0]);
    for (size_t i = 0; i < runs; i++) {
        f->scales[second][i] = pairs_of(_mm512_mul_ps(_mm512_load_ps(scale[i]), scale_factor));
        f->minima[second][i] = pairs_of(_mm512_mul_ps(_mm512_load_ps(minimum[i]), factor));
    }
}

/* Quarter `part` of the next span's two tiles; of bf16, whose tiles are used where they lie, asks for it. */
KT_INLINE void fill_part(const int type, filling *f, const int part) {
    const size_t runs = KT_SPAN / kt_run(type), span_bytes = kt_span_bytes(type), at = f->first / KT_SPAN + f->at;
    const int second = part / 2, half = part % 2;
    if (!half) {
        const size_t further = at + SPANS_AHEAD, left = f->last / KT_SPAN;
        const uint8_t *ahead = further < left ? f->group[second] + further * span_bytes : f->after[second] + (further - left) * span_bytes;
        KT_UNROLL for (size_t line = 0; line < span_bytes; line += 64) _mm_prefetch((const char *)ahead + line, _MM_HINT_T1);
        if (type != KT_BF16 && f->at % STRIP_SPANS == 0) open_strip(type, f, second, f->first + f->at * KT_SPAN);
    }
    if (type != KT_BF16) {
        const size_t run = f->at % STRIP_SPANS * runs + (half ? runs - 1 : 0);
        fill_half_span(type, half, f->group[second] + at * span_bytes, f->scales[second][run], f->minima[second][run],
                       f->tiles + (2 * f->at + (size_t)second) * TILE_BYTES);
    }
    if (part == 3) f->at++;
}

KT_INLINE void fill_span(const int type, filling *f) {
    KT_UNROLL for (int part = 0; part < 4; part++) fill_part(type, f, part);
}

/* All tokens' blocks with one item. */
typedef struct {
    const kt_dot *dot;
    const uint8_t *a, *b0, *b1;
    size_t a_stride_bytes, b_step_bytes, steps;
    float *out;
    int fresh, last;   /* the first columns of all; the last ones of this panel */
} item;

/* One block's products with an item, and for every `pace`th step a span of the next one. A product's operands are loaded while
 * the one before runs. */
KT_INLINE void multiply_block(const int type, const int two, const item *it, size_t token, filling *f, size_t pace, size_t *pause) {
    const size_t a_stride = it->a_stride_bytes, b_step = it->b_step_bytes;
    const uint8_t *a = it->a + token * a_stride, *b0 = it->b0, *b1 = it->b1;
    const float *next = it->out + (token + BLOCK) * it->dot->out_stride;
    _tile_stream_loadd(6, b0, 64);
    _tile_stream_loadd(4, a, a_stride);
    _tile_stream_loadd(7, b1, 64);
    for (size_t step = 1;; step++) {
        const uint8_t *below = a + TILE * a_stride;
        int fill = 0;
        if (--*pause == 0) *pause = pace, fill = f->at < f->spans;
        if (step < it->steps) a += 64, b0 += b_step, b1 += b_step;
        _tile_dpbf16ps(0, 4, 6);
        if (two) _tile_stream_loadd(5, below, a_stride);
        if (fill) fill_part(type, f, 0);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stream_loadd(4, a, a_stride);
        if (fill) fill_part(type, f, 1);
        if (two) _tile_dpbf16ps(2, 5, 6);
        _tile_stream_loadd(6, b0, 64);
        if (fill) fill_part(type, f, 2);
        if (two) _tile_dpbf16ps(3, 5, 7);
        _tile_stream_loadd(7, b1, 64);
        if (fill) fill_part(type, f, 3);
        if (!it->fresh && step <= BLOCK && pace > 1) {
            _mm_prefetch((const char *)(next + (step - 1) * it->dot->out_stride), _MM_HINT_T0);
            _mm_prefetch((const char *)(next + (step - 1) * it->dot->out_stride + TILE), _MM_HINT_T0);
        }
        if (step == it->steps) return;
    }
}

/* `follows`: C is still in its tiles; `keep`: leave it there. */
KT_INLINE void multiply_and_fill(const int type, const item *it, filling *f, int follows, int keep) {
    const kt_dot *dot = it->dot;
    const size_t stride_bytes = dot->out_stride * sizeof(float), blocks = (dot->n_tokens + BLOCK - 1) / BLOCK;
    size_t pause = blocks;
    for (size_t token = 0; token < dot->n_tokens; token += BLOCK) {
        float *out = it->out + token * dot->out_stride, *below = out + TILE * dot->out_stride;
        const int two = dot->n_tokens - token > TILE;
        stores_before_tiles();
        if (!follows && it->fresh) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else if (!follows) {
            _tile_loadd(0, out, stride_bytes);
            _tile_loadd(1, out + TILE, stride_bytes);
            if (two) {
                _tile_loadd(2, below, stride_bytes);
                _tile_loadd(3, below + TILE, stride_bytes);
            }
        }
        if (two) multiply_block(type, 1, it, token, f, blocks, &pause);
        else multiply_block(type, 0, it, token, f, blocks, &pause);
        if (keep) break;
        _tile_stored(0, out, stride_bytes);
        _tile_stored(1, out + TILE, stride_bytes);
        if (two) {
            _tile_stored(2, below, stride_bytes);
            _tile_stored(3, below + TILE, stride_bytes);
        }
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

/* Rows back from what `fill` scaled them to, and activations from what kt_prepare_bf16 did. */
static void scale_back(const kt_dot *dot, size_t m) {
    for (size_t g = 0; g < dot->n_groups; g++) {
        __m512 factor = _mm512_set1_ps(KT_BF16_UNSCALE);
        if (dot->type[m] != KT_BF16) factor = row_unfactor(dot->w[m] + (g + 1) * dot->group_bytes[m] - 64);
        float *out = dot->out[m] + g * KT_ROWS;
        for (size_t t = 0; t < dot->n_tokens; t++, out += dot->out_stride) _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_loadu_ps(out), factor));
    }
}

/* Where an item is: panels outermost, then matrices, pairs of groups, and a pair's items. */
typedef struct { size_t panel, m, g, first; } place;

static int following(const kt_dot *dot, size_t width, size_t item_cols, place *p) {
    size_t end = p->panel + width < dot->cols ? p->panel + width : dot->cols;
    if ((p->first += item_cols) < end) return 1;
    p->first = p->panel;
    if ((p->g += 2) < dot->n_groups) return 1;
    p->g = 0;
    if (++p->m < dot->n_matrices) return 1;
    p->m = 0;
    p->first = p->panel += width;
    return p->panel < dot->cols;
}

static const uint8_t *codes_of(const kt_dot *dot, const place *p, int second) {
    size_t g = second && dot->n_groups - p->g > 1 ? p->g + 1 : p->g;   /* without a second group its results are not wanted */
    return dot->w[p->m] + g * dot->group_bytes[p->m];
}

static void open_item(filling *f, const kt_dot *dot, const place *p, size_t width, size_t item_cols, uint8_t *tiles) {
    place after = *p;
    f->type = dot->type[p->m], f->at = 0, f->all_cols = dot->cols, f->first = p->first, f->tiles = tiles;
    f->last = p->panel + width < dot->cols ? p->panel + width : dot->cols;
    f->spans = kt_spans(f->last - p->first < item_cols ? f->last - p->first : item_cols);
    f->last = kt_spans(f->last) * KT_SPAN;
    if (!following(dot, width, width, &after)) after = *p;
    for (int second = 0; second < 2; second++) {
        f->group[second] = codes_of(dot, p, second);
        f->after[second] = codes_of(dot, &after, second) + after.panel / KT_SPAN * kt_span_bytes(dot->type[after.m]);
    }
}

static void dot(const kt_dot *dot) {
    if (dot->few) {
        kt_dot_avx512_bf16(dot);
        return;
    }
    begin();
    const int alone = dot->n_tokens <= BLOCK;
    const size_t width = panel_cols(dot->n_tokens, dot->cols), item_cols = alone ? STRIP : width;
    const size_t b_bytes = item_cols * ITEM_COLUMN_BYTES, first_byte = kt_act_bytes_int16(dot->cols);
    uint8_t *b_tiles = dot->panel, *a_rows = b_tiles + 2 * b_bytes;
    const uint8_t *a = NULL;
    item it = {.dot = dot};
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
        it.out = dot->out[here.m] + here.g * KT_ROWS;
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
    for (size_t m = 0; m < dot->n_matrices; m++) scale_back(dot, m);
}

const kt_kernels kt_kernels_amx = {
    .types = KT_ALL_TYPES & ~KT_BIT(KT_F32), .act_bytes = kt_act_bytes_bf16, .panel_bytes = panel_bytes,
    .prepare = kt_prepare_bf16, .activate = kt_activate_avx512, .dot = dot, .end = end,
};
#endif
