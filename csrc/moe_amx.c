/* AMX with bf16 tiles: weights and activations rounded to bf16, sums of pairs in float.
 *
 * SHAPES      w [rows, cols] in any type but f32, acts [n_tokens, cols] bf16, out [n_tokens, rows] float
 * DEFINITION  moe_scalar.c
 * LAYOUT      A tile  [16 tokens][32 columns] bf16, in the order of kt_bf16_column
 *             B tile  [16 column pairs][16 rows][2] bf16: a span of a packed group, so bf16 weights are tiles as they lie
 *             C tile  [16 tokens][16 rows] float, read from and written to out
 * TILES       for each panel of columns: the tokens' columns as A; 32 rows at a time, an item, their weights as B tiles, filled
 *             once for all tokens; then blocks of 2 x 2 C tiles, 32 tokens x 32 rows, through all columns of the panel. While an
 *             item is multiplied the next one is filled, a tile at a time between the products, which leave the vector units idle.
 *             Experts with few tokens, which would leave tiles empty, go to the loops of avx512_bf16.
 * FILLING     in float16, 32 weights at a time: an integer in the low bits of a float16 is that many 2^-24, so one
 *             multiply-add makes a weight of a code; three integer instructions make a bf16 of that. Rows are
 *             scaled by a power of two, from the bound that is packed with them, so that float16 reaches; out is scaled back.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512fp16,amx-tile,amx-bf16,prefer-vector-width=512")
#include "avx512.h"
#include "lanes.h"
#include "tiles.h"

enum { STRIP = 256, PANEL_BYTES = 1280 << 10, FILL_AHEAD = 16 };

/* Columns of a panel: so many that the tokens' and two items' weights fill two thirds of a second-level cache of 2 MiB. */
static size_t panel_cols(size_t n_tokens, size_t cols) {
    size_t column_bytes = 2 * kt_round_up(n_tokens, BLOCK) + 2 * BLOCK * 2, most = PANEL_BYTES / column_bytes / STRIP * STRIP;
    size_t panels = (cols + most - 1) / most;
    return kt_round_up((cols + panels - 1) / panels, STRIP);
}
static size_t panel_bytes(void) { return PANEL_BYTES + (KT_TOKENS + BLOCK) * KT_ALIGN; }

/* 2^-exponent of the bound: rows times this are below 2. */
KT_INLINE __m512 row_factor(const uint8_t *bound) {
    __m512i exponent = _mm512_and_si512(_mm512_loadu_si512(bound), _mm512_set1_epi32(0x7f800000));
    return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(254 << 23), exponent));
}
/* What out has to be multiplied by: the inverse, and 2^16 for bf16_of_half. */
KT_INLINE __m512 row_unfactor(const uint8_t *bound) {
    __m512i exponent = _mm512_and_si512(_mm512_loadu_si512(bound), _mm512_set1_epi32(0x7f800000));
    return _mm512_mul_ps(_mm512_castsi512_ps(exponent), _mm512_set1_ps(65536));
}

/* 2^-16 times each float16, as bf16: the exponent, 5 bits, gets 96 on top, where it has no bits. What has no exponent, below
 * 2^-15 of the row's bound, becomes 0. */
KT_INLINE __m512i bf16_of_half(__m512h half) {
    __mmask32 normal = _mm512_test_epi16_mask((__m512i)half, _mm512_set1_epi16(0x7c00));
    __m512i moved = _mm512_srai_epi16(_mm512_add_epi16((__m512i)half, _mm512_set1_epi16(4)), 3);
    moved = _mm512_ternarylogic_epi32(moved, _mm512_set1_epi32((int)0x8fff8fff), _mm512_set1_epi32(0x30003000), 0xea);
    return _mm512_maskz_mov_epi16(normal, moved);
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
    void (*half_tile)(struct filling *);
    size_t at, end;                                /* half tiles: filled, and all */
    int type;
    const uint8_t *group[2];
    const uint8_t *after;                          /* the codes that will be filled next: asked for in time */
    size_t n_groups, all_cols, first, spans;
    uint8_t *tiles;                                /* [2][spans] */
    __m512h scales[STRIP / 16], minima[STRIP / 16];   /* of 256 columns, in pairs */
} filling;

/* The codes of the tile that is `ahead` tiles further. */
KT_INLINE const uint8_t *codes_ahead(const filling *f, size_t tile, size_t span_bytes) {
    size_t all = f->n_groups * f->spans;
    if (tile >= all) return f->after + (tile - all) * span_bytes;
    size_t second = tile >= f->spans;
    return f->group[second] + (f->first / KT_SPAN + tile - second * f->spans) * span_bytes;
}

/* Scales of the 256 columns from `first`, as float16 pairs of scaled rows. */
KT_INLINE void open_strip(const int type, filling *f, const uint8_t *group, size_t first) {
    const size_t runs = STRIP / kt_run(type);
    const uint8_t *bound = group + kt_group_bytes(type, f->all_cols) - 64;
    const __m512 factor = row_factor(bound);
    const __m512 scale_factor = _mm512_mul_ps(factor, _mm512_set1_ps(type == KT_FP8_BLOCK128 ? 256.0f : (float)(1 << (14 + kt_value_bits(type)))));
    float scale[STRIP / 16][LANES] __attribute__((aligned(64))), minimum[STRIP / 16][LANES] __attribute__((aligned(64)));
    size_t cols = f->all_cols - first < STRIP ? f->all_cols - first : STRIP;
    expand_scales(type, group + kt_codes_bytes(type, f->all_cols), 0, first, cols, LANES, scale[0], minimum[0]);
    for (size_t i = 0; i < runs; i++) {
        f->scales[i] = pairs_of(_mm512_mul_ps(_mm512_load_ps(scale[i]), scale_factor));
        f->minima[i] = pairs_of(_mm512_mul_ps(_mm512_load_ps(minimum[i]), factor));
    }
}

/* Half a tile; of bf16, whose tiles are used where they lie, asks for it. */
KT_INLINE void fill_half_tile(const int type, filling *f) {
    const size_t runs = KT_SPAN / kt_run(type), span_bytes = kt_span_bytes(type);
    size_t tile = f->at / 2, half = f->at % 2, second = tile >= f->spans, c = tile - second * f->spans;
    const uint8_t *group = f->group[second], *span = group + (f->first / KT_SPAN + c) * span_bytes;
    f->at++;
    if (type == KT_BF16) {
        KT_UNROLL for (size_t line = 0; line < span_bytes / 2; line += 64)
            _mm_prefetch((const char *)span + half * span_bytes / 2 + line, _MM_HINT_T1);
        return;
    }
    const size_t run = c % (STRIP / KT_SPAN) * runs;
    if (half) {
        fill_half_span(type, 1, span, f->scales[run + runs - 1], f->minima[run + runs - 1], f->tiles + tile * TILE_BYTES);
        return;
    }
    const uint8_t *ahead = codes_ahead(f, tile + FILL_AHEAD, span_bytes);
    KT_UNROLL for (size_t line = 0; line < span_bytes; line += 64) _mm_prefetch((const char *)ahead + line, _MM_HINT_T0);
    if (run == 0) open_strip(type, f, group, f->first + c * KT_SPAN);
    fill_half_span(type, 0, span, f->scales[run], f->minima[run], f->tiles + tile * TILE_BYTES);
}

#define FILL_TYPES(X) X(KT_BF16) X(KT_Q8_0) X(KT_Q5_0) X(KT_Q4_0) X(KT_Q6_K) X(KT_Q5_K) X(KT_Q4_K) X(KT_Q3_K) X(KT_Q2_K) X(KT_IQ4_NL) \
    X(KT_IQ4_XS) X(KT_MXFP4) X(KT_FP8_BLOCK128) X(KT_INT8) X(KT_INT4_64) X(KT_INT4_128)
#define DEFINE(TYPE) static void fill_##TYPE(filling *f) { fill_half_tile(TYPE, f); }
FILL_TYPES(DEFINE)
#define ENTRY(TYPE) [TYPE] = fill_##TYPE,
static void (*const half_tile_of[KT_TYPE_COUNT])(filling *) = {FILL_TYPES(ENTRY)};

/* All tokens' blocks with one item. */
typedef struct {
    const kt_dot *dot;
    const uint8_t *a, *b0, *b1;
    size_t a_stride_bytes, steps;
    float *out;
    int more;         /* out has the sums of the columns before */
} item;

/* Between products: as many half tiles as keep the filling even. */
KT_INLINE void fill_some(filling *f, size_t *credit, size_t share, size_t unit) {
    for (*credit += share; *credit >= unit; *credit -= unit)
        if (f->at < f->end) f->half_tile(f);
}

static void multiply_and_fill(const item *it, filling *f) {
    const kt_dot *dot = it->dot;
    const size_t stride_bytes = dot->out_stride * sizeof(float), a_stride = it->a_stride_bytes;
    const size_t pauses = (dot->n_tokens + BLOCK - 1) / BLOCK * it->steps * 2;
    size_t credit = 0;
    for (size_t token = 0; token < dot->n_tokens; token += BLOCK) {
        float *out = it->out + token * dot->out_stride, *below = out + TILE * dot->out_stride, *next = out + BLOCK * dot->out_stride;
        const uint8_t *a = it->a + token * a_stride, *b0 = it->b0, *b1 = it->b1;
        const int two = dot->n_tokens - token > TILE;
        stores_before_tiles();
        if (it->more) {
            _tile_loadd(0, out, stride_bytes);
            _tile_loadd(1, out + TILE, stride_bytes);
            if (two) {
                _tile_loadd(2, below, stride_bytes);
                _tile_loadd(3, below + TILE, stride_bytes);
            }
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        if (two) {
            for (size_t step = 0; step < it->steps; step++, a += 64, b0 += TILE_BYTES, b1 += TILE_BYTES) {
                _tile_stream_loadd(6, b0, 64);
                _tile_stream_loadd(4, a, a_stride);
                _tile_dpbf16ps(0, 4, 6);
                _tile_stream_loadd(7, b1, 64);
                _tile_dpbf16ps(1, 4, 7);
                fill_some(f, &credit, f->end, pauses);
                _tile_stream_loadd(5, a + TILE * a_stride, a_stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
                if (it->more && step < BLOCK) {
                    _mm_prefetch((const char *)(next + step * dot->out_stride), _MM_HINT_T0);
                    _mm_prefetch((const char *)(next + step * dot->out_stride + TILE), _MM_HINT_T0);
                }
                fill_some(f, &credit, f->end, pauses);
            }
            _tile_stored(2, below, stride_bytes);
            _tile_stored(3, below + TILE, stride_bytes);
        } else {
            for (size_t step = 0; step < it->steps; step++, a += 64, b0 += TILE_BYTES, b1 += TILE_BYTES) {
                _tile_stream_loadd(4, a, a_stride);
                _tile_stream_loadd(6, b0, 64);
                _tile_dpbf16ps(0, 4, 6);
                fill_some(f, &credit, f->end, pauses);
                _tile_stream_loadd(7, b1, 64);
                _tile_dpbf16ps(1, 4, 7);
                fill_some(f, &credit, f->end, pauses);
            }
        }
        _tile_stored(0, out, stride_bytes);
        _tile_stored(1, out + TILE, stride_bytes);
    }
    while (f->at < f->end) f->half_tile(f);
}

/* Rows back from what `fill` scaled them to. */
static void scale_back(const kt_dot *dot, size_t m) {
    for (size_t g = 0; g < dot->n_groups; g++) {
        __m512 factor = row_unfactor(dot->w[m] + (g + 1) * dot->group_bytes[m] - 64);
        float *out = dot->out[m] + g * KT_ROWS;
        for (size_t t = 0; t < dot->n_tokens; t++, out += dot->out_stride) _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_loadu_ps(out), factor));
    }
}

/* Item `number` of a dot: panels outermost, then matrices, then pairs of groups. Past the last one there is nothing to fill. */
static const uint8_t *codes_of(const kt_dot *dot, size_t number, size_t width, size_t *first, size_t *m, size_t *g) {
    size_t pairs = (dot->n_groups + 1) / 2;
    *m = number / pairs % dot->n_matrices, *g = number % pairs * 2, *first = number / (pairs * dot->n_matrices) * width;
    return dot->w[*m] + *g * dot->group_bytes[*m];
}

static void open_item(filling *f, const kt_dot *dot, size_t number, size_t width, uint8_t *tiles) {
    size_t first, m, g, first_after, m_after, g_after;
    f->group[0] = codes_of(dot, number, width, &first, &m, &g);
    f->after = codes_of(dot, number + 1, width, &first_after, &m_after, &g_after);
    f->after += first_after / KT_SPAN * kt_span_bytes(dot->type[m_after]);
    f->at = f->end = f->spans = 0;
    if (first >= dot->cols) return;
    f->type = dot->type[m], f->half_tile = half_tile_of[f->type];
    f->all_cols = dot->cols, f->first = first, f->tiles = tiles;
    f->n_groups = dot->n_groups - g > 1 ? 2 : 1;
    f->group[1] = f->group[0] + (f->n_groups - 1) * dot->group_bytes[m];
    f->spans = kt_spans(dot->cols - first < width ? dot->cols - first : width);
    f->end = 2 * f->n_groups * f->spans;
}

static void dot(const kt_dot *dot) {
    if (dot->few) {
        kt_dot_avx512_bf16(dot);
        return;
    }
    begin();
    const size_t width = panel_cols(dot->n_tokens, dot->cols), b_bytes = width * 2 * BLOCK;
    const size_t pairs = (dot->n_groups + 1) / 2, items = pairs * dot->n_matrices, first_byte = kt_act_bytes_int16(dot->cols);
    uint8_t *b_tiles = dot->panel, *a_rows = b_tiles + 2 * b_bytes;
    item it = {.dot = dot};
    filling fillings[2];
    open_item(&fillings[0], dot, 0, width, b_tiles);
    while (fillings[0].at < fillings[0].end) fillings[0].half_tile(&fillings[0]);
    for (size_t number = 0;; number++) {
        const filling *now = &fillings[number % 2];
        filling *next = &fillings[(number + 1) % 2];
        size_t m = number / pairs % dot->n_matrices, g = number % pairs * 2;
        if (!now->spans) break;
        if (number % items == 0) {
            it.a_stride_bytes = width * 2 + KT_ALIGN, it.steps = now->spans;
            it.a = gather(dot, first_byte + now->first * 2, now->spans * 64, a_rows, &it.a_stride_bytes);
        }
        it.out = dot->out[m] + g * KT_ROWS;
        it.more = now->first > 0;
        it.b0 = now->tiles;
        it.b1 = now->tiles + (now->n_groups - 1) * now->spans * TILE_BYTES;   /* without a second group its results are not wanted */
        if (now->type == KT_BF16) {
            it.b0 = now->group[0] + now->first / KT_SPAN * TILE_BYTES;
            it.b1 = now->group[1] + now->first / KT_SPAN * TILE_BYTES;
        }
        open_item(next, dot, number + 1, width, b_tiles + (number + 1) % 2 * b_bytes);
        multiply_and_fill(&it, next);
    }
    for (size_t m = 0; m < dot->n_matrices; m++)
        if (dot->type[m] != KT_BF16) scale_back(dot, m);
}

const kt_kernels kt_kernels_amx = {
    .types = KT_ALL_TYPES & ~KT_BIT(KT_F32), .act_bytes = kt_act_bytes_bf16, .panel_bytes = panel_bytes,
    .prepare = kt_prepare_bf16, .activate = kt_activate_avx512, .dot = dot, .end = end,
};
#endif
