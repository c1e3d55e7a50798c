/* AMX with bf16 tiles: weights and activations rounded to bf16, sums of pairs in float.
 *
 * SHAPES      w [rows, cols] in any type but f32, acts [n_tokens, cols] bf16, out [n_tokens, rows] float
 * DEFINITION  moe_scalar.c
 * LAYOUT      A tile  [16 tokens][32 columns] bf16
 *             B tile  [16 column pairs][16 rows][2] bf16: weights as tile products want them ("VNNI"), 16 x 16 transposed
 *             C tile  [16 tokens][16 rows] float, read from and written to out
 *             every tile is 16 rows of 64 bytes and lies in 1 KiB of the panel, one column step after the other
 * TILES       for each PANEL_COLS columns: gather the tokens into A tiles, once for both matrices; decode all rows into
 *             B tiles, once for all tokens; then blocks of 2 x 2 C tiles, 32 tokens x 32 rows, through all the columns.
 *             Up to FEW_TOKENS tokens, which leave tiles nearly empty, go to the avx512_bf16 loops: same rounding.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#include "chunk_bf16.h"

enum { TILE = 16, TILE_BYTES = 1024, BLOCK = 2 * TILE, PANEL_COLS = 1024, PANEL_STEPS = PANEL_COLS / KT_CHUNK, FEW_TOKENS = 4 };

static void begin(void) {
    struct { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = TILE;
    __asm__ volatile("" : : "r"(&config) : "memory");  /* as stores_before_tiles, for a local variable */
    _tile_loadconfig(&config);
}

static void end(void) { _tile_release(); }

static size_t panel_bytes(size_t cols) {
    size_t tiles = (KT_TOKENS + KT_OUT) / TILE * PANEL_STEPS * TILE_BYTES;
    size_t few = kt_kernels_avx512_bf16.panel_bytes(cols);
    return tiles > few ? tiles : few;
}

/* A tiles of all tokens for `steps` column steps from col: [token / 16][step][16][32], zeros for missing tokens. */
static void gather_tokens(const kt_dot *dot, size_t col, size_t steps, uint8_t *a_tiles) {
    for (size_t t = 0; t < kt_round_up(dot->n_tokens, TILE); t++) {
        uint8_t *to = a_tiles + t / TILE * PANEL_STEPS * TILE_BYTES + t % TILE * 64;
        const uint8_t *from = t < dot->n_tokens ? kt_act_row(dot, t) + col * 2 : NULL;
        for (size_t step = 0; step < steps; step++)
            _mm512_store_si512(to + step * TILE_BYTES,
                               from ? _mm512_loadu_si512(from + step * 64) : _mm512_setzero_si512());
    }
}

/* Transposes 16 rows of 16 pairs of weights; a step swaps blocks of 1, 2, 4, then 8 pairs across the diagonal. */
KT_INLINE void store_transposed(const __m512i *row, uint8_t *tile) {
    __m512i a[16], b[16];
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i += 4) {  /* b[i + j]: pairs j, j + 4, j + 8, j + 12 of rows i to i + 3 */
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    _Pragma("GCC unroll 16") for (int j = 0; j < 4; j++) {
        __m512i low01 = _mm512_shuffle_i32x4(b[j], b[j + 4], 0x88), low23 = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0x88);
        __m512i high01 = _mm512_shuffle_i32x4(b[j], b[j + 4], 0xdd), high23 = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0xdd);
        _mm512_store_si512(tile + 64 * j, _mm512_shuffle_i32x4(low01, low23, 0x88));
        _mm512_store_si512(tile + 64 * (j + 4), _mm512_shuffle_i32x4(high01, high23, 0x88));
        _mm512_store_si512(tile + 64 * (j + 8), _mm512_shuffle_i32x4(low01, low23, 0xdd));
        _mm512_store_si512(tile + 64 * (j + 12), _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}

/* B tiles of 16 rows from `first`: [step][16][16][2]; missing rows repeat the last one. cols ends inside a chunk only
 * for dense types, whose last chunk is padded with zeros. */
KT_INLINE void decode_rows(const int type, const kt_dot *dot, size_t m, size_t first, size_t col, size_t cols, uint8_t *tiles) {
    const size_t chunks = kt_block_weights(type) / KT_CHUNK, block_bytes = kt_block_bytes(type);
    const uint8_t *from[TILE];
    for (size_t r = 0; r < TILE; r++)
        from[r] = dot->w[m] + (first + r < dot->rows ? first + r : dot->rows - 1) * dot->row_bytes[m] + kt_row_bytes(type, col);
    size_t blocks = cols / kt_block_weights(type);
    for (size_t b = 0; b < blocks; b++) {
        header head[TILE];
        for (int r = 0; r < TILE; r++) header_open(type, from[r] + b * block_bytes, &head[r]);
        _Pragma("GCC unroll 8") for (size_t s = 0; s < chunks; s++) {
            __m512i row[TILE];
            _Pragma("GCC unroll 16") for (int r = 0; r < TILE; r++) row[r] = bf16_load(type, from[r] + b * block_bytes, &head[r], (int)s);
            store_transposed(row, tiles + (b * chunks + s) * TILE_BYTES);
        }
    }
    size_t done = blocks * kt_block_weights(type);
    if (!kt_is_dense(type) || done == cols) return;
    __m512i row[TILE];
    for (int r = 0; r < TILE; r++) {
        uint8_t padded[4 * KT_CHUNK] = {0};
        header none = {0};
        memcpy(padded, from[r] + kt_row_bytes(type, done), kt_row_bytes(type, cols - done));
        row[r] = bf16_load(type, padded, &none, 0);
    }
    store_transposed(row, tiles + blocks * TILE_BYTES);
}

static void decode_rows_of(int type, const kt_dot *dot, size_t m, size_t first, size_t col, size_t cols, uint8_t *tiles) {
#define CASE(TYPE) case TYPE: decode_rows(TYPE, dot, m, first, col, cols, tiles); return;
    switch (type) { CASE(KT_BF16) CASE(KT_Q8_0) CASE(KT_Q5_0) CASE(KT_Q4_K) CASE(KT_Q6_K) }
#undef CASE
}

/* gcc 12 does not say of ldtilecfg and tileloadd that they read memory: without this, stores may move past them. */
KT_INLINE void stores_before_tiles(void) { __asm__ volatile("" : : : "memory"); }

/* C tile number: 2 * (token half) + (row half); A tiles are 4 and 5, B tiles 6 and 7. */
KT_INLINE void block_2x2(const uint8_t *a, const uint8_t *b, size_t steps, int add, float *out, size_t stride_bytes) {
    const size_t next = PANEL_STEPS * TILE_BYTES;  /* the next 16 tokens, the next 16 rows */
    float *below = (float *)(void *)((uint8_t *)out + TILE * stride_bytes);
    stores_before_tiles();
    if (add) {
        _tile_loadd(0, out, stride_bytes);
        _tile_loadd(1, out + TILE, stride_bytes);
        _tile_loadd(2, below, stride_bytes);
        _tile_loadd(3, below + TILE, stride_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size_t step = 0; step < steps; step++, a += TILE_BYTES, b += TILE_BYTES) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + next, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + next, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, stride_bytes);
    _tile_stored(1, out + TILE, stride_bytes);
    _tile_stored(2, below, stride_bytes);
    _tile_stored(3, below + TILE, stride_bytes);
}

/* The last 16 tokens, where there are no 32. */
KT_INLINE void block_1x2(const uint8_t *a, const uint8_t *b, size_t steps, int add, float *out, size_t stride_bytes) {
    stores_before_tiles();
    if (add) {
        _tile_loadd(0, out, stride_bytes);
        _tile_loadd(1, out + TILE, stride_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (size_t step = 0; step < steps; step++, a += TILE_BYTES, b += TILE_BYTES) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + PANEL_STEPS * TILE_BYTES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, out, stride_bytes);
    _tile_stored(1, out + TILE, stride_bytes);
}

static void dot(const kt_dot *dot) {
    if (dot->n_tokens <= FEW_TOKENS) {
        kt_dot_avx512_bf16(dot);
        return;
    }
    uint8_t *a_tiles = dot->panel, *b_tiles = a_tiles + KT_TOKENS / TILE * PANEL_STEPS * TILE_BYTES;
    const size_t group_bytes = PANEL_STEPS * TILE_BYTES;
    for (size_t col = 0; col < dot->cols; col += PANEL_COLS) {
        size_t cols = dot->cols - col < PANEL_COLS ? dot->cols - col : PANEL_COLS, steps = kt_chunks(cols);
        gather_tokens(dot, col, steps, a_tiles);
        for (size_t m = 0; m < dot->n_matrices; m++) {
            for (size_t row = 0; row < kt_round_up(dot->rows, BLOCK); row += TILE)
                decode_rows_of(dot->type[m], dot, m, row, col, cols, b_tiles + row / TILE * group_bytes);
            for (size_t row = 0; row < dot->rows; row += BLOCK) {
                const uint8_t *b = b_tiles + row / TILE * group_bytes;
                for (size_t token = 0; token < dot->n_tokens; token += BLOCK) {
                    const uint8_t *a = a_tiles + token / TILE * group_bytes;
                    float *out = dot->out[m] + token * dot->out_stride + row;
                    if (dot->n_tokens - token > TILE) block_2x2(a, b, steps, col > 0, out, dot->out_stride * sizeof *out);
                    else block_1x2(a, b, steps, col > 0, out, dot->out_stride * sizeof *out);
                }
            }
        }
    }
}

const kt_kernels kt_kernels_amx = {
    .types = KT_ALL_TYPES & ~(1u << KT_F32), .act_chunk_bytes = 2 * KT_CHUNK, .panel_bytes = panel_bytes,
    .prepare = kt_prepare_bf16, .activate = kt_activate_avx512, .dot = dot, .begin = begin, .end = end,
};
#endif
