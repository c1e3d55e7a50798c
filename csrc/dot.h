/* Products of groups of rows with a few tokens at a time, weights decoded in registers as they stream by.
 *
 * SHAPES      w [rows, cols] in any type, acts [n_tokens, cols] prepared, out [n_tokens, rows] float
 * DEFINITION  moe_scalar.c
 * LAYOUT      packed groups of 16 rows; a lane is a row, so no sum goes across a register
 * TILES       LANES rows x up to 8 tokens (for one or two tokens, two groups side by side). Of each run of 32 (or 16) columns the products of bare codes are summed in two
 *             registers a token, then scaled into a third. What the code stands for is put right with the sum of the
 *             activations of the run:   sum of (scale * code - minimum) * x  =  scale * sum of code * x - minimum * sum of x
 *             The order of the sums does not depend on the number of tokens.
 *
 * The including file includes lanes.h before and defines
 *   TAKES (bits of kt_type), and act_bytes(cols)
 *   OFFSET(type)                 what its products add to each code: they may see `offset + code`
 *   act, act_open(row, cols)     a token's prepared row; run_sum(act, column, run): the sum of its activations there
 *   partial                      sums of a run; partial_zero(), partial_total(partial, act, column): as floats
 *   RESULT(sum)                  what is stored of a sum; by default as it is
 *   span_products(type, span, run_in_span, tokens, acts, column, partial *even, partial *odd)
 */
#ifndef RESULT
#define RESULT(sum) (sum)
#endif

enum { SPANS = 8, MOST_TOKENS = 8, MOST_GROUPS = 4, AHEAD_BYTES = 4096, SCALES_AHEAD = 2048 };

KT_INLINE void group_products(const int type, const int groups, const int tokens, const uint8_t *group, size_t group_bytes, size_t cols,
                              const size_t row, const uint8_t *const *rows, float *const *out) {
    const size_t run = kt_run(type), runs = KT_SPAN / run, span_bytes = kt_span_bytes(type), codes_bytes = kt_codes_bytes(type, cols);
    const int scaled = !kt_is_float(type);
    const float offset = scaled ? OFFSET(type) : 0;
    float scale[MOST_GROUPS][SPANS * 2][LANES] __attribute__((aligned(64))), minimum[MOST_GROUPS][SPANS * 2][LANES] __attribute__((aligned(64)));
    floats sum[MOST_GROUPS][MOST_TOKENS];
    act acts[MOST_TOKENS];
    KT_UNROLL for (int t = 0; t < tokens; t++) acts[t] = act_open(rows[t], cols);
    KT_UNROLL for (int g = 0; g < groups; g++) KT_UNROLL for (int t = 0; t < tokens; t++) sum[g][t] = (floats){0};
    for (size_t first = 0; first < cols; first += SPANS * KT_SPAN) {
        size_t here = cols - first < SPANS * KT_SPAN ? cols - first : SPANS * KT_SPAN;
        if (scaled) KT_UNROLL for (int g = 0; g < groups; g++) {
            const uint8_t *scales = group + (size_t)g * group_bytes + codes_bytes;
            const uint8_t *ahead = scales + (first + SCALES_AHEAD) / kt_scale_columns(type) * kt_scale_unit_bytes(type);
            if (row == 0)
                KT_UNROLL for (size_t line = 0; line < kt_scale_unit_bytes(type) * SPANS * KT_SPAN / kt_scale_columns(type); line += 64)
                    __builtin_prefetch(ahead + line, 0, 3);
            expand_scales(type, scales, row, first, here, LANES, scale[g][0], minimum[g][0]);
        }
        for (size_t c = 0; c < here; c += KT_SPAN) {
            KT_UNROLL for (int g = 0; g < groups; g++) {
                const uint8_t *span = group + (size_t)g * group_bytes + (first + c) / KT_SPAN * span_bytes + 4 * row;
                if (row == 0)
                    KT_UNROLL for (size_t line = 0; line < span_bytes; line += 64) __builtin_prefetch(span + AHEAD_BYTES + line, 0, 3);
                KT_UNROLL for (size_t i = 0; i < runs; i++) {
                    partial even[MOST_TOKENS], odd[MOST_TOKENS];
                    KT_UNROLL for (int t = 0; t < tokens; t++) even[t] = partial_zero(), odd[t] = partial_zero();
                    span_products(type, span, (int)i, tokens, acts, first + c, even, odd);
                    floats s = {0}, m = {0};
                    if (scaled) s = load_floats(scale[g][c / run + i]), m = load_floats(minimum[g][c / run + i]) + s * offset;
                    KT_UNROLL for (int t = 0; t < tokens; t++) {
                        floats total = partial_total(even[t], odd[t], acts[t], first + c);
                        if (scaled) sum[g][t] = sum[g][t] + s * total - m * run_sum(acts[t], first + c + i * run, run);
                        else sum[g][t] += total;
                    }
                }
            }
        }
    }
    KT_UNROLL for (int g = 0; g < groups; g++)
        KT_UNROLL for (int t = 0; t < tokens; t++) store_floats(out[t] + g * KT_ROWS + row, RESULT(sum[g][t]));
}

static void group_dot(int type, int groups, int tokens, const uint8_t *group, size_t group_bytes, size_t cols, const uint8_t *const *rows,
                      float *const *out) {
#define PRODUCTS(TYPE, G, N) case (G) * 16 + (N): \
    for (size_t row = 0; row < KT_ROWS; row += LANES) group_products(TYPE, G, N, group, group_bytes, cols, row, rows, out); \
    return;
#define CASE(TYPE) case TYPE: \
    if (!(TAKES >> TYPE & 1)) return; \
    switch (groups * 16 + tokens) { \
        PRODUCTS(TYPE, 4, 1) PRODUCTS(TYPE, 2, 1) PRODUCTS(TYPE, 2, 2) PRODUCTS(TYPE, 1, 1) PRODUCTS(TYPE, 1, 2) PRODUCTS(TYPE, 1, 3) \
        PRODUCTS(TYPE, 1, 4) PRODUCTS(TYPE, 1, 8) \
    } \
    return;
    switch (type) {
        CASE(KT_F32) CASE(KT_BF16) CASE(KT_Q8_0) CASE(KT_Q5_0) CASE(KT_Q4_0) CASE(KT_Q6_K) CASE(KT_Q5_K) CASE(KT_Q4_K) CASE(KT_Q3_K)
        CASE(KT_Q2_K) CASE(KT_IQ4_NL) CASE(KT_IQ4_XS) CASE(KT_MXFP4) CASE(KT_FP8_BLOCK128) CASE(KT_INT8) CASE(KT_INT4_64)
        CASE(KT_INT4_128)
    }
#undef CASE
#undef PRODUCTS
}

/* Groups outermost: the weights come from memory once, and from the cache for every further block of tokens. */
static void dot_few(const kt_dot *dot) {
    for (size_t m = 0; m < dot->n_matrices; m++) {
        for (size_t g = 0, step; g < dot->n_groups; g += step) {
            const uint8_t *group = dot->w[m] + g * dot->group_bytes[m];
            /* Groups side by side: weights that stream through the first-level cache push a token's row out less often. */
            step = dot->n_tokens == 1 ? 4 : dot->n_tokens == 2 ? 2 : 1;
            while (step > dot->n_groups - g) step /= 2;
            for (size_t token = 0; token < dot->n_tokens;) {
                size_t left = dot->n_tokens - token, block = left > 4 ? 8 : left;
                const uint8_t *rows[MOST_TOKENS];
                float *out[MOST_TOKENS], spare[MOST_GROUPS * KT_ROWS];
                for (size_t t = 0; t < block; t++) {   /* missing tokens repeat the last one and are dropped */
                    rows[t] = kt_act_row(dot, token + (t < left ? t : left - 1));
                    out[t] = t < left ? dot->out[m] + (token + t) * dot->out_stride + g * KT_ROWS : spare;
                }
                group_dot(dot->type[m], (int)step, (int)block, group, dot->group_bytes[m], dot->cols, rows, out);
                token += left < block ? left : block;
            }
        }
    }
}
