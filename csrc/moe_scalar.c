/* Plain C: the reference for every other instruction set, and the fallback where none of them runs.
 *
 * SHAPES      w [rows, cols] in any type, acts [n_tokens, cols] float, out [n_tokens, rows] float
 * DEFINITION  for t, r:  out[t, r] = sum over c of decode(w[r, c]) * acts[t, c]
 * LAYOUT      weights: packed rows; activations: float, zeros up to a multiple of 32
 * TILES       one row of weights is decoded to float once (the panel) and meets every token
 */
#include <math.h>

#include "internal.h"

static size_t panel_bytes(size_t cols) { return kt_chunks(cols) * KT_CHUNK * sizeof(float); }

void kt_prepare_f32(const float *src, size_t n, uint8_t *dst) {
    memcpy(dst, src, n * sizeof(float));
    memset(dst + n * sizeof(float), 0, (kt_chunks(n) * KT_CHUNK - n) * sizeof(float));
}

static float activation(int kind, float v) {
    switch (kind) {
    case KT_SILU: return v / (1 + expf(-v));
    case KT_GELU: return 0.5f * v * (1 + erff(v * 0.70710678f));
    default: return 0.5f * v * (1 + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    }
}

static void activate(int kind, float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) gate[i] = activation(kind, gate[i]) * up[i];
}

static void dot(const kt_dot *dot) {
    float *row = (float *)dot->panel;
    for (size_t m = 0; m < dot->n_matrices; m++) {
        for (size_t r = 0; r < dot->rows; r++) {
            for (size_t c = 0; c < dot->cols; c += KT_CHUNK)
                kt_decode_chunk(dot->type[m], dot->w[m] + r * dot->row_bytes[m], c,
                                dot->cols - c < KT_CHUNK ? dot->cols - c : KT_CHUNK, row + c);
            for (size_t t = 0; t < dot->n_tokens; t++) {
                const float *act = (const float *)kt_act_row(dot, t);
                float sum[4] = {0};  /* four, so that the compiler may use a vector without being told to reorder */
                size_t c = 0;
                for (; c + 4 <= dot->cols; c += 4)
                    for (int i = 0; i < 4; i++) sum[i] += row[c + i] * act[c + i];
                for (; c < dot->cols; c++) sum[0] += row[c] * act[c];
                dot->out[m][t * dot->out_stride + r] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            }
        }
    }
}

const kt_kernels kt_kernels_scalar = {
    .types = KT_ALL_TYPES, .act_chunk_bytes = 4 * KT_CHUNK, .panel_bytes = panel_bytes,
    .prepare = kt_prepare_f32, .activate = activate, .dot = dot,
};
