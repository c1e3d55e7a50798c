/* The loops of every vector instruction set but AMX; the including file says what a chunk of 32 weights is.
 *
 * SHAPES      w [rows, cols] in any type, acts [n_tokens, cols] prepared, out [n_tokens, rows] float
 * DEFINITION  moe_scalar.c
 * LAYOUT      weights: packed rows; panel: [rows, PANEL_COLS] in NATIVE type
 * TILES       up to FEW tokens: ROWS_1 x 1 or ROWS_FEW x FEW sums in registers, weights decoded as they stream by.
 *             more: PANEL_COLS columns of all rows are decoded once (L2), then meet the tokens in blocks of
 *             PANEL_ROWS x PANEL_TOKENS sums in registers, while those tokens stay in L1.
 *
 * The including file defines, before:
 *   header, header_open(type, block, &header)            what the chunks of one block share (scales), decoded once
 *   chunk, chunk_load(type, block, &header, s)     weights 32 s to 32 s + 31 of a block
 *   sums, sums_zero(), sums_add(sums, chunk, act), sums_total(sums)
 *   chunk_store(chunk, dst)                        as NATIVE type
 *   TAKES (bits of kt_type), NATIVE, ACT_BYTES (of 32 prepared activations), FEW, ROWS_1, ROWS_FEW, PANEL_ROWS, PANEL_TOKENS, PANEL_COLS
 */
#include "internal.h"

#define UNROLL _Pragma("GCC unroll 16")

/* The chunk at column col of a dense row, of which only n weights exist. */
KT_INLINE chunk chunk_load_tail(int type, const uint8_t *row, size_t col, size_t n) {
    uint8_t padded[KT_CHUNK * 4] = {0};
    memcpy(padded, row + kt_row_bytes(type, col), kt_row_bytes(type, n));
    header none = {0};
    return chunk_load(type, padded, &none, 0);
}

/* result[r][t] = w[r][0 .. cols) . act[t]; type, rows and tokens are constants where this is inlined.
 * Asks for the weights ahead_bytes from here unless that is 0: two to four rows are too few for the hardware to run ahead. */
KT_INLINE void products(const int type, const int rows, const int tokens, const uint8_t *const *w,
                        const uint8_t *const *act, size_t cols, const size_t ahead_bytes, float *result) {
    const size_t chunks = kt_block_weights(type) / KT_CHUNK, block_bytes = kt_block_bytes(type);
    sums sum[8][8];
    size_t blocks = cols / kt_block_weights(type);
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int t = 0; t < tokens; t++) sum[r][t] = sums_zero();
    for (size_t b = 0; b < blocks; b++) {
        header head[8];
        if (ahead_bytes)
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (size_t line = 0; line < (block_bytes + 63) / 64; line++)
                    __builtin_prefetch(w[r] + b * block_bytes + ahead_bytes + line * 64, 0, 2);
        UNROLL for (int r = 0; r < rows; r++) header_open(type, w[r] + b * block_bytes, &head[r]);
        UNROLL for (size_t s = 0; s < chunks; s++) {
            UNROLL for (int r = 0; r < rows; r++) {
                chunk weights = chunk_load(type, w[r] + b * block_bytes, &head[r], (int)s);
                UNROLL for (int t = 0; t < tokens; t++)
                    sum[r][t] = sums_add(sum[r][t], weights, act[t] + (b * chunks + s) * ACT_BYTES);
            }
        }
    }
    size_t done = blocks * kt_block_weights(type);
    if (kt_is_dense(type) && done < cols) {
        UNROLL for (int r = 0; r < rows; r++) {
            chunk weights = chunk_load_tail(type, w[r], done, cols - done);
            UNROLL for (int t = 0; t < tokens; t++) sum[r][t] = sums_add(sum[r][t], weights, act[t] + blocks * ACT_BYTES);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int t = 0; t < tokens; t++) result[r * tokens + t] = sums_total(sum[r][t]);
}

/* Streams one matrix past at most `tokens` tokens. Missing rows and tokens repeat the last one and are dropped. */
KT_INLINE void stream(const int type, const int rows, const int tokens, const kt_dot *dot, size_t m) {
    const uint8_t *act[8], *w[8];
    float result[64];
    for (int t = 0; t < tokens; t++) act[t] = kt_act_row(dot, (size_t)t < dot->n_tokens ? (size_t)t : dot->n_tokens - 1);
    for (size_t row = 0; row < dot->rows; row += (size_t)rows) {
        for (size_t r = 0; r < (size_t)rows; r++)
            w[r] = dot->w[m] + (row + r < dot->rows ? row + r : dot->rows - 1) * dot->row_bytes[m];
        products(type, rows, tokens, w, act, dot->cols, (size_t)rows * dot->row_bytes[m], result);
        for (size_t r = 0; r < (size_t)rows && row + r < dot->rows; r++)
            for (size_t t = 0; t < dot->n_tokens; t++)
                dot->out[m][t * dot->out_stride + row + r] = result[r * (size_t)tokens + t];
    }
}

/* Decodes columns [col, col + cols) of all rows into the panel; col is a multiple of PANEL_COLS, hence of the block. */
KT_INLINE void fill_panel(const int type, const kt_dot *dot, size_t m, size_t col, size_t cols) {
    const size_t chunks = kt_block_weights(type) / KT_CHUNK, chunk_bytes = kt_block_bytes(NATIVE);
    for (size_t r = 0; r < dot->rows; r++) {
        const uint8_t *from = dot->w[m] + r * dot->row_bytes[m] + kt_row_bytes(type, col);
        uint8_t *to = dot->panel + r * kt_row_bytes(NATIVE, PANEL_COLS);
        size_t blocks = cols / kt_block_weights(type);
        for (size_t b = 0; b < blocks; b++) {
            header head;
            header_open(type, from + b * kt_block_bytes(type), &head);
            UNROLL for (size_t s = 0; s < chunks; s++)
                chunk_store(chunk_load(type, from + b * kt_block_bytes(type), &head, (int)s), to + (b * chunks + s) * chunk_bytes);
        }
        size_t done = blocks * kt_block_weights(type);
        if (kt_is_dense(type) && done < cols) chunk_store(chunk_load_tail(type, from, done, cols - done), to + blocks * chunk_bytes);
    }
}

static void few_tokens(int type, const kt_dot *dot, size_t m) {
#define CASE(TYPE) case TYPE: \
    if (!(TAKES >> TYPE & 1)) return; \
    if (dot->n_tokens == 1) stream(TYPE, ROWS_1, 1, dot, m); else stream(TYPE, ROWS_FEW, FEW, dot, m); return;
    switch (type) { CASE(KT_F32) CASE(KT_BF16) CASE(KT_Q8_0) CASE(KT_Q5_0) CASE(KT_Q4_K) CASE(KT_Q6_K) }
#undef CASE
}

static void fill_panel_of(int type, const kt_dot *dot, size_t m, size_t col, size_t cols) {
#define CASE(TYPE) case TYPE: if (TAKES >> TYPE & 1) fill_panel(TYPE, dot, m, col, cols); return;
    switch (type) { CASE(KT_F32) CASE(KT_BF16) CASE(KT_Q8_0) CASE(KT_Q5_0) CASE(KT_Q4_K) CASE(KT_Q6_K) }
#undef CASE
}

/* Columns [col, col + cols) of matrix m, decoded in the panel, times every token; adds to out unless col is 0. */
static void panel_products(const kt_dot *dot, size_t m, size_t col, size_t cols) {
    const uint8_t *act[PANEL_TOKENS], *w[PANEL_ROWS];
    float result[PANEL_ROWS * PANEL_TOKENS];
    for (size_t token = 0; token < dot->n_tokens; token += PANEL_TOKENS) {
        size_t tokens = dot->n_tokens - token < PANEL_TOKENS ? dot->n_tokens - token : PANEL_TOKENS;
        for (size_t t = 0; t < PANEL_TOKENS; t++)
            act[t] = kt_act_row(dot, token + (t < tokens ? t : tokens - 1)) + col / KT_CHUNK * ACT_BYTES;
        for (size_t row = 0; row < dot->rows; row += PANEL_ROWS) {
            size_t rows = dot->rows - row < PANEL_ROWS ? dot->rows - row : PANEL_ROWS;
            for (size_t r = 0; r < PANEL_ROWS; r++)
                w[r] = dot->panel + (row + (r < rows ? r : rows - 1)) * kt_row_bytes(NATIVE, PANEL_COLS);
            products(NATIVE, PANEL_ROWS, PANEL_TOKENS, w, act, kt_chunks(cols) * KT_CHUNK, 0, result);
            for (size_t t = 0; t < tokens; t++) {
                float *out = dot->out[m] + (token + t) * dot->out_stride + row;
                for (size_t r = 0; r < rows; r++) out[r] = (col ? out[r] : 0) + result[r * PANEL_TOKENS + t];
            }
        }
    }
}

static void dot_all(const kt_dot *dot) {
    for (size_t m = 0; m < dot->n_matrices; m++) {
        if (dot->n_tokens <= FEW) {
            few_tokens(dot->type[m], dot, m);
            continue;
        }
        for (size_t col = 0; col < dot->cols; col += PANEL_COLS) {
            size_t cols = dot->cols - col < PANEL_COLS ? dot->cols - col : PANEL_COLS;
            fill_panel_of(dot->type[m], dot, m, col, cols);
            panel_products(dot, m, col, cols);
        }
    }
}

static size_t dot_panel_bytes(size_t cols) {
    (void)cols;
    return KT_OUT * kt_row_bytes(NATIVE, PANEL_COLS);
}
