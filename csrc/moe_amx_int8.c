/* AMX with int8 tiles: weights in 8 bits with a scale a row, activations in 8 bits with a scale for each 1024, or 256.
 *
 * SHAPES      w [rows, cols] KT_INT8, acts [n_tokens, cols], out [n_tokens, rows] float
 * DEFINITION  moe_scalar.c
 * LAYOUT      A tile  [16 tokens][64 columns] int8
 *             B tile  [16 quads][16 rows][4] codes, unsigned: two spans of a packed group, as they lie
 *             sums    [16 tokens][16 rows] int32, of a strip: columns that share the tokens' scales
 *             C       the same of float
 * TILES       for each panel of columns: the tokens' columns as A; 32 rows and a strip of them at a time, whose tiles stay in the
 *             first-level cache, as C does, blocks of 2 x 2 tiles, 32 tokens x 32 rows. The sums of a block are scaled and added to
 *             C some rows after each product of the next one, and the weights of strips further on are asked for: neither
 *             keeps products waiting.
 *             Experts with few tokens go to the loops of avx512_vnni, with activations in 16 bits.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8,prefer-vector-width=512")
#include "tiles.h"

enum {
    LONG_STRIP = 4 * STRIP,   /* of rows that are prepared whole; those prepared in parts have strips of STRIP */
    COLUMNS_AHEAD = 1024,
    SCALES_BYTES = PANEL_BYTES / STRIP * sizeof(float), SUMS_BYTES = C_BLOCK * sizeof(int32_t),
};

static size_t panel_bytes(void) { return C_BYTES + SCALES_BYTES + 2 * SUMS_BYTES + PANEL_BYTES + (KT_TOKENS + BLOCK) * KT_ALIGN; }

/* A prepared row: as kt_prepare_int16 makes it, for few tokens; int8 [cols, up to a multiple of 64]; for each strip a scale,
 * and the sum times the scale; then the columns of a strip. */
static size_t padded(size_t cols) { return kt_round_up(cols, 64); }
static size_t int8_at(size_t cols) { return kt_act_bytes_int16(cols); }
static float *scales_of(const uint8_t *row, size_t cols) { return (float *)(void *)(uintptr_t)(row + int8_at(cols) + padded(cols)); }
static size_t strips(size_t cols) { return (cols + STRIP - 1) / STRIP; }   /* at most */
static uint32_t *strip_of(const uint8_t *row, size_t cols) { return (uint32_t *)(void *)(scales_of(row, cols) + 2 * strips(cols)); }
static size_t act_bytes(size_t cols) { return int8_at(cols) + kt_round_up(padded(cols) + 2 * strips(cols) * sizeof(float) + sizeof(uint32_t), KT_ALIGN); }

/* A part of a strip, as experts with few tokens prepare it, is never read as int8. */
static void prepare(const float *src, size_t first, size_t n, size_t cols, int uses, uint8_t *row) {
    uint8_t *int8 = row + int8_at(cols);
    float *scales = scales_of(row, cols), *sums = scales + strips(cols);
    if (uses & KT_FEW) kt_prepare_int16(src, first, n, cols, uses, row);
    if (!(uses & KT_TILES)) return;
    const size_t strip = n == cols ? LONG_STRIP : STRIP;
    if (first == 0) *strip_of(row, cols) = (uint32_t)strip;
    for (size_t start = 0; start < n; start += strip) {
        size_t here = n - start < strip ? n - start : strip, at = first + start;
        if (here < strip && at + here != cols) return;
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
        scales[at / strip] = largest / 127;
        sums[at / strip] = largest / 127 * (float)_mm512_reduce_add_epi32(sum);
    }
}

/* Sums of a block of 32 tokens x 32 rows over a strip, which are being added to C. */
typedef struct {
    const int32_t *sums;    /* [2 halves of 32 tokens][2 groups of rows][16][16] */
    const float *scale;     /* [32 tokens] */
    float *c;               /* as sums */
    __mmask16 keep;         /* 0: C is not yet set */
    size_t at, rows;        /* of 64: added, and all */
} addition;

/* C += sums * scale, `n` rows of 64 */
KT_INLINE void add_rows(addition *add, const size_t n) {
    if (add->at >= add->rows) return;
    const float *scale = add->scale + add->at / BLOCK * TILE + add->at % TILE;
    KT_UNROLL for (size_t i = 0; i < n; i++) {
        const size_t place = (add->at + i) * TILE;
        __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(add->sums + place)), before = _mm512_maskz_load_ps(add->keep, add->c + place);
        _mm512_store_ps(add->c + place, _mm512_fmadd_ps(sum, _mm512_set1_ps(scale[i]), before));
    }
    add->at += n;
}

/* A strip that is asked for: lines of it, from both groups. */
typedef struct { const uint8_t *group[2]; size_t line, lines, lines_a_step; } asking;

KT_INLINE void ask(asking *ahead) {
    for (size_t i = 0; i < ahead->lines_a_step; i++, ahead->line++)
        _mm_prefetch((const char *)ahead->group[ahead->line >= ahead->lines] + (ahead->line >= ahead->lines ? ahead->line - ahead->lines : ahead->line) * 64, _MM_HINT_T1);
}

/* Sums of a block over a strip, while those of another block are added to C. */
KT_INLINE void multiply_block(const int two, const size_t n, const uint8_t *a, size_t a_stride, const uint8_t *b0, const uint8_t *b1, size_t steps, asking *ahead, addition *add, int32_t *sums) {
    stores_before_tiles();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t step = 0; step < steps; step++, a += 64, b0 += TILE_BYTES, b1 += TILE_BYTES) {
        _tile_loadd(6, b0, 64);
        _tile_stream_loadd(4, a, a_stride);
        _tile_dpbsud(0, 4, 6);
        add_rows(add, n);
        _tile_loadd(7, b1, 64);
        _tile_dpbsud(1, 4, 7);
        add_rows(add, n);
        ask(ahead);
        if (!two) continue;
        _tile_stream_loadd(5, a + TILE * a_stride, a_stride);
        _tile_dpbsud(2, 5, 6);
        add_rows(add, n);
        _tile_dpbsud(3, 5, 7);
        add_rows(add, n);
    }
    while (add->at < add->rows) add_rows(add, n);
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + C_TILE, 64);
    _tile_stored(2, sums + 2 * C_TILE, 64);
    _tile_stored(3, sums + 3 * C_TILE, 64);
    __asm__ volatile("" : : : "memory");
}

/* out = (C - what the codes' bias comes to) * scale of the rows */
static void scale_out(const kt_dot *dot, size_t strip, size_t m, const float *c) {
    const size_t blocks = (dot->n_tokens + BLOCK - 1) / BLOCK;
    for (size_t t = 0; t < dot->n_tokens; t++) {
        const float *scaled_sums = scales_of(kt_act_row(dot, t), dot->cols) + strips(dot->cols);
        float biases = 0;
        for (size_t i = 0; i * strip < dot->cols; i++) biases += kt_bias(KT_INT8) * scaled_sums[i];
        for (size_t g = 0; g < dot->n_groups; g++) {
            const float *from = c + (g / 2 * blocks + t / BLOCK) * C_BLOCK + t % BLOCK / TILE * 2 * C_TILE + g % 2 * C_TILE + t % TILE * TILE;
            __m512 row_scale = _mm512_loadu_ps(dot->w[m] + g * dot->group_bytes[m] + kt_codes_bytes(KT_INT8, dot->cols));
            _mm512_storeu_ps(dot->out[m] + t * dot->out_stride + g * KT_ROWS, _mm512_mul_ps(row_scale, _mm512_sub_ps(_mm512_load_ps(from), _mm512_set1_ps(biases))));
        }
    }
}

static void dot(const kt_dot *dot) {
    if (dot->few) {
        kt_dot_avx512_vnni(dot);
        return;
    }
    begin();
    const size_t blocks = (dot->n_tokens + BLOCK - 1) / BLOCK, strip = *strip_of(kt_act_row(dot, 0), dot->cols);
    const size_t width = panel_cols(blocks * BLOCK, strip, dot->cols);
    const size_t c_matrix = (dot->n_groups + 1) / 2 * blocks * C_BLOCK;
    float *c = (float *)(void *)dot->panel, *scales = c + C_BYTES / sizeof(float);   /* [strips of the panel][blocks][32] */
    int32_t *sums = (int32_t *)(void *)(dot->panel + C_BYTES + SCALES_BYTES);
    uint8_t *a_rows = (uint8_t *)(sums + 2 * C_BLOCK);
    const uint8_t *a = NULL;
    size_t a_stride = 0, number = 0;
    addition add = {0};
    place here = {0}, further = {0};
    for (size_t i = 0; i < COLUMNS_AHEAD; i += strip) following(dot, width, strip, &further);
    for (int more = 1; more; more = following(dot, width, strip, &here)) {
        const size_t end = here.panel + width < dot->cols ? here.panel + width : dot->cols, last = padded(end);
        if (here.m == 0 && here.g == 0 && here.first == here.panel) {
            while (add.at < add.rows) add_rows(&add, 4);   /* its scales' place is taken now */
            a_stride = width + KT_ALIGN;
            a = gather(dot, int8_at(dot->cols) + here.panel, last - here.panel, a_rows, &a_stride);
            for (size_t t = 0; t < blocks * BLOCK; t++)
                for (size_t i = 0; i * strip < end - here.panel; i++)
                    scales[i * blocks * BLOCK + t] = t < dot->n_tokens ? scales_of(kt_act_row(dot, t), dot->cols)[here.panel / strip + i] : 0;
        }
        const size_t steps = (last - here.first < strip ? last - here.first : strip) / 64;
        const uint8_t *b0 = group_of(dot, &here, 0) + here.first * KT_ROWS, *b1 = group_of(dot, &here, 1) + here.first * KT_ROWS;
        asking ahead = {.lines = strip * KT_ROWS / 64, .lines_a_step = (2 * KT_ROWS + blocks - 1) / blocks};
        if (!following(dot, width, strip, &further)) ahead.lines_a_step = 0;
        else for (int i = 0; i < 2; i++) ahead.group[i] = group_of(dot, &further, i) + further.first * KT_ROWS;
        float *to = c + here.m * c_matrix + here.g / 2 * blocks * C_BLOCK;
        for (size_t block = 0; block < blocks; block++, number++, to += C_BLOCK) {
            const uint8_t *block_a = a + block * BLOCK * a_stride + here.first - here.panel;
            int32_t *now = sums + number % 2 * C_BLOCK;
            const int two = dot->n_tokens - block * BLOCK > TILE;
            if (!two) multiply_block(0, 4, block_a, a_stride, b0, b1, steps, &ahead, &add, now);
            else if (strip == STRIP) multiply_block(1, 4, block_a, a_stride, b0, b1, steps, &ahead, &add, now);
            else multiply_block(1, 1, block_a, a_stride, b0, b1, steps, &ahead, &add, now);
            const float *block_scales = scales + ((here.first - here.panel) / strip * blocks + block) * BLOCK;
            add = (addition){now, block_scales, to, here.first ? 0xffff : 0, 0, two ? 2 * BLOCK : BLOCK};
        }
    }
    while (add.at < add.rows) add_rows(&add, 4);
    for (size_t m = 0; m < dot->n_matrices; m++) scale_out(dot, strip, m, c + m * c_matrix);
}

const kt_kernels kt_kernels_amx_int8 = {
    .types = KT_BIT(KT_INT8), .act_bytes = act_bytes, .panel_bytes = panel_bytes,
    .prepare = prepare, .activate = kt_activate_avx512, .accumulate = kt_accumulate_avx512, .dot = dot, .end = end,
};
#endif
