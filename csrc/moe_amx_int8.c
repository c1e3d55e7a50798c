/* AMX with int8 tiles: weights in 8 bits with a scale a row, activations in 8 bits with a scale for each 256.
 *
 * SHAPES      w [rows, cols] KT_INT8, acts [n_tokens, cols], out [n_tokens, rows] float
 * DEFINITION  moe_scalar.c
 * LAYOUT      A tile  [16 tokens][64 columns] int8
 *             B tile  [16 quads][16 rows][4] codes, unsigned: two spans of a packed group, as they lie
 *             C tile  [16 tokens][16 rows] int32
 * TILES       blocks of 2 x 2 C tiles, 32 tokens x 32 rows; after each 256 columns the sums are scaled and added to out, while the
 *             products of the next 256 are under way.
 *             Experts with few tokens go to the loops of avx512_vnni, with activations in 16 bits.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8,prefer-vector-width=512")
#include "tiles.h"

enum { GROUP = 256, GROUP_STEPS = GROUP / 64, WINDOW = 4096, A_STRIDE = WINDOW + 64, SUMS_BYTES = 4 * TILE_BYTES };
typedef float window_scales[WINDOW / GROUP][KT_TOKENS + BLOCK];

static size_t panel_bytes(void) { return 2 * SUMS_BYTES + sizeof(window_scales) + (KT_TOKENS + BLOCK) * A_STRIDE; }

/* A prepared row: as kt_prepare_int16 makes it, for few tokens; int8 [cols, up to a multiple of 64]; for each 256 of
 * them a scale, and the sum times the scale. */
static size_t padded(size_t cols) { return kt_round_up(cols, 64); }
static size_t int8_at(size_t cols) { return kt_act_bytes_int16(cols); }
static float *scales_of(const uint8_t *row, size_t cols) { return (float *)(void *)(uintptr_t)(row + int8_at(cols) + padded(cols)); }
static size_t groups(size_t cols) { return (cols + GROUP - 1) / GROUP; }
static size_t act_bytes(size_t cols) { return int8_at(cols) + kt_round_up(padded(cols) + 2 * groups(cols) * sizeof(float), KT_ALIGN); }

/* A part of a group, as experts with few tokens prepare it, is never read as int8. */
static void prepare(const float *src, size_t first, size_t n, size_t cols, int uses, uint8_t *row) {
    uint8_t *int8 = row + int8_at(cols);
    float *scales = scales_of(row, cols), *sums = scales + groups(cols);
    if (uses & KT_FEW) kt_prepare_int16(src, first, n, cols, uses, row);
    if (!(uses & KT_TILES)) return;
    for (size_t start = 0; start < n; start += GROUP) {
        size_t here = n - start < GROUP ? n - start : GROUP, at = first + start;
        if (here < GROUP && at + here != cols) return;
        __m512 most = _mm512_setzero_ps();
        for (size_t i = 0; i < here; i += 16) {
            __mmask16 mask = here - i < 16 ? (__mmask16)((1u << (here - i)) - 1) : 0xffff;
            most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(mask, src + start + i)));
        }
        float largest = _mm512_reduce_max_ps(most);
        __m512 inverse = _mm512_set1_ps(largest > 0 ? 127 / largest : 0);
        __m512i sum = _mm512_setzero_si512();
        for (size_t i = 0; i < kt_round_up(here, 64); i += 16) {
            __mmask16 mask = i >= here ? 0 : here - i < 16 ? (__mmask16)((1u << (here - i)) - 1) : 0xffff;
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, src + start + (i < here ? i : 0)), inverse));
            _mm_storeu_si128((void *)(int8 + at + i), _mm512_cvtsepi32_epi8(q));
            sum = _mm512_add_epi32(sum, q);
        }
        scales[at / GROUP] = largest / 127;
        sums[at / GROUP] = largest / 127 * (float)_mm512_reduce_add_epi32(sum);
    }
}

/* A block's operands: A [32 tokens][columns], rows a_stride apart; B two runs of tiles of 16 weight rows, one tile a step. */
typedef struct {
    const uint8_t *a, *b0, *b1;
    size_t a_stride_bytes, steps;
} tile_block;

/* C tile number: 2 * (token half) + (row half); A tiles are 4 and 5, B tiles 6 and 7. Loads between products: while one
 * product runs, the next operand comes from the cache. */
#define BLOCK_2X2(block) \
    do { \
        const uint8_t *a_ = (block)->a, *b0_ = (block)->b0, *b1_ = (block)->b1; \
        const size_t stride_ = (block)->a_stride_bytes; \
        for (size_t step_ = 0; step_ < (block)->steps; step_++, a_ += 64, b0_ += TILE_BYTES, b1_ += TILE_BYTES) { \
            _tile_loadd(6, b0_, 64); \
            _tile_stream_loadd(4, a_, stride_); \
            _tile_dpbsud(0, 4, 6); \
            _tile_loadd(7, b1_, 64); \
            _tile_dpbsud(1, 4, 7); \
            _tile_stream_loadd(5, a_ + TILE * stride_, stride_); \
            _tile_dpbsud(2, 5, 6); \
            _tile_dpbsud(3, 5, 7); \
        } \
    } while (0)

/* The last 16 tokens, where there are no 32. */
#define BLOCK_1X2(block) \
    do { \
        const uint8_t *a_ = (block)->a, *b0_ = (block)->b0, *b1_ = (block)->b1; \
        for (size_t step_ = 0; step_ < (block)->steps; step_++, a_ += 64, b0_ += TILE_BYTES, b1_ += TILE_BYTES) { \
            _tile_loadd(4, a_, (block)->a_stride_bytes); \
            _tile_loadd(6, b0_, 64); \
            _tile_dpbsud(0, 4, 6); \
            _tile_loadd(7, b1_, 64); \
            _tile_dpbsud(1, 4, 7); \
        } \
    } while (0)

/* out += C * scale of the tokens; C is int32. */
KT_INLINE void add_scaled(const int32_t *c, const float *scale, size_t first, float *out, size_t out_stride) {
    KT_UNROLL for (size_t t = 0; t < TILE; t++) {
        __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(c + t * TILE)), s = _mm512_set1_ps(scale[t]);
        float *to = out + t * out_stride;
        _mm512_storeu_ps(to, first ? _mm512_mul_ps(sum, s) : _mm512_fmadd_ps(sum, s, _mm512_loadu_ps(to)));
    }
}

/* Sums of a block of 32 tokens x 32 rows that are not yet in out. */
typedef struct {
    const int32_t *c;                 /* [2 x 2 tiles]; null: there are none */
    const float *scale;               /* [32 tokens] */
    float *out;
    int first, half;                  /* the first columns; 16 tokens only */
} sums;

KT_INLINE void finish(const sums *s, size_t out_stride) {
    if (!s->c) return;
    add_scaled(s->c, s->scale, s->first, s->out, out_stride);
    add_scaled(s->c + 256, s->scale, s->first, s->out + TILE, out_stride);
    if (s->half) return;
    add_scaled(s->c + 512, s->scale + TILE, s->first, s->out + TILE * out_stride, out_stride);
    add_scaled(s->c + 768, s->scale + TILE, s->first, s->out + TILE * out_stride + TILE, out_stride);
}

static void dot(const kt_dot *dot) {
    if (dot->few) {
        kt_dot_avx512_vnni(dot);
        return;
    }
    begin();
    const size_t spans = kt_round_up(kt_spans(dot->cols), 2), padded = spans * KT_SPAN;
    window_scales *scales = (window_scales *)(void *)(dot->panel + 2 * SUMS_BYTES);
    uint8_t *a_rows = (uint8_t *)(scales + 1);
    float total[KT_TOKENS];
    sums made[2] = {0};
    size_t number = 0;
    memset(scales, 0, sizeof *scales);
    for (size_t col = 0; col < padded; col += WINDOW) {
        size_t cols = padded - col < WINDOW ? padded - col : WINDOW;
        tile_block block = {.a_stride_bytes = A_STRIDE};
        const uint8_t *a = gather(dot, int8_at(dot->cols) + col, cols, a_rows, &block.a_stride_bytes);
        for (size_t t = 0; t < dot->n_tokens; t++)
            for (size_t i = 0; i * GROUP < cols; i++) (*scales)[i][t] = scales_of(kt_act_row(dot, t), dot->cols)[col / GROUP + i];
        for (size_t m = 0; m < dot->n_matrices; m++) {
            for (size_t g = 0; g < dot->n_groups; g += 2) {
                const uint8_t *group = dot->w[m] + g * dot->group_bytes[m] + col / KT_SPAN * 512;
                int two = g + 1 < dot->n_groups;
                for (size_t token = 0; token < dot->n_tokens; token += BLOCK) {
                    int half = dot->n_tokens - token <= TILE;
                    float *out = dot->out[m] + token * dot->out_stride + g * KT_ROWS;
                    for (size_t from = 0; from < cols; from += GROUP) {
                        block.steps = cols - from < GROUP ? (cols - from) / 64 : GROUP_STEPS;
                        block.a = a + token * block.a_stride_bytes + from;
                        block.b0 = group + from / KT_SPAN * 512;
                        block.b1 = two ? block.b0 + dot->group_bytes[m] : block.b0;
                        sums *now = &made[number % 2];
                        int32_t *c = (int32_t *)(void *)(dot->panel + number % 2 * SUMS_BYTES);
                        stores_before_tiles();
                        _tile_zero(0);
                        _tile_zero(1);
                        _tile_zero(2);
                        _tile_zero(3);
                        if (half) BLOCK_1X2(&block);
                        else BLOCK_2X2(&block);
                        finish(&made[++number % 2], dot->out_stride);
                        *now = (sums){c, (*scales)[from / GROUP] + token, out, col + from == 0, half};
                        _tile_stored(0, c, 64);
                        _tile_stored(1, c + 256, 64);
                        _tile_stored(2, c + 512, 64);
                        _tile_stored(3, c + 768, 64);
                        __asm__ volatile("" : : : "memory");
                    }
                }
            }
        }
        finish(&made[(number + 1) % 2], dot->out_stride);   /* before other columns' scales take the place */
        made[(number + 1) % 2].c = NULL;
    }
    for (size_t t = 0; t < dot->n_tokens; t++) {
        const float *scaled = scales_of(kt_act_row(dot, t), dot->cols) + groups(dot->cols);
        total[t] = 0;
        for (size_t i = 0; i < groups(dot->cols); i++) total[t] += kt_bias(KT_INT8) * scaled[i];
    }
    for (size_t m = 0; m < dot->n_matrices; m++)
        for (size_t g = 0; g < dot->n_groups; g++) {
            __m512 row_scale = _mm512_loadu_ps(dot->w[m] + g * dot->group_bytes[m] + kt_codes_bytes(KT_INT8, dot->cols));
            for (size_t t = 0; t < dot->n_tokens; t++) {
                float *out = dot->out[m] + t * dot->out_stride + g * KT_ROWS;
                _mm512_storeu_ps(out, _mm512_mul_ps(row_scale, _mm512_sub_ps(_mm512_loadu_ps(out), _mm512_set1_ps(total[t]))));
            }
        }
}

const kt_kernels kt_kernels_amx_int8 = {
    .types = KT_BIT(KT_INT8), .act_bytes = act_bytes, .panel_bytes = panel_bytes,
    .prepare = prepare, .activate = kt_activate_avx512, .accumulate = kt_accumulate_avx512, .dot = dot, .end = end,
};
#endif
