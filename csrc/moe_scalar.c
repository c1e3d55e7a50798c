/* Plain C: the reference for every other instruction set, and the fallback where none of them runs.
 *
 * SHAPES      w [rows, cols] in any type, acts [n_tokens, cols] float, out [n_tokens, rows] float
 * DEFINITION  for t, r:  out[t, r] = sum over c of w[r, c] * acts[t, c], w as kt_unpack gives it
 * LAYOUT      weights: packed groups of 16 rows; activations: float, zeros up to a multiple of 32, then sums of 16
 * TILES       a group of rows is unpacked to float 256 columns at a time (the panel) and meets every token
 */
#include <math.h>

#include "internal.h"

enum { STRIP = 256 };

static size_t panel_bytes(void) { return KT_ROWS * STRIP * sizeof(float); }

size_t kt_act_bytes_f32(size_t cols) {
    size_t padded = kt_spans(cols) * KT_SPAN;
    return kt_round_up((padded + padded / 16) * sizeof(float), KT_ALIGN);
}

void kt_prepare_f32(const float *src, size_t first, size_t n, size_t cols, int uses, uint8_t *row) {
    float *to = (float *)row + first, *sums = (float *)row + kt_spans(cols) * KT_SPAN + first / 16;
    size_t padded = kt_spans(n) * KT_SPAN;
    memcpy(to, src, n * sizeof(float));
    memset(to + n, 0, (padded - n) * sizeof(float));
    for (size_t i = 0; i < padded / 16; i++) {
        sums[i] = 0;
        for (int j = 0; j < 16; j++) sums[i] += to[16 * i + (size_t)j];
    }
}

static float activation(int kind, float v) {
    switch (kind) {
    case KT_SILU: return v / (1 + expf(-v));
    case KT_GELU: return 0.5f * v * (1 + erff(v * 0.70710678f));
    default: return 0.5f * v * (1 + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    }
}

static void accumulate(float *to, const float *more, float score, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] += score * more[i];
}

static void activate(const kt_moe *moe, float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (moe->activation != KT_SWIGLU_OAI) {
            gate[i] = activation(moe->activation, gate[i]) * up[i];
            continue;
        }
        float g = fminf(gate[i], moe->limit), u = fminf(fmaxf(up[i], -moe->limit), moe->limit);
        gate[i] = g / (1 + expf(-moe->alpha * g)) * (u + 1);
    }
}

static void dot(const kt_dot *dot) {
    float *panel = (float *)(void *)dot->panel;
    for (size_t m = 0; m < dot->n_matrices; m++) {
        for (size_t t = 0; t < dot->n_tokens; t++) memset(dot->out[m] + t * dot->out_stride, 0, dot->n_groups * KT_ROWS * sizeof(float));
        for (size_t g = 0; g < dot->n_groups; g++) {
            const uint8_t *group = dot->w[m] + g * dot->group_bytes[m];
            for (size_t c = 0; c < dot->cols; c += STRIP) {
                size_t n = dot->cols - c < STRIP ? dot->cols - c : STRIP;
                kt_unpack_strip(dot->type[m], group, dot->cols, c, n, panel);
                for (size_t t = 0; t < dot->n_tokens; t++) {
                    const float *act = (const float *)(const void *)kt_act_row(dot, t) + c;
                    float *out = dot->out[m] + t * dot->out_stride + g * KT_ROWS;
                    for (size_t r = 0; r < KT_ROWS; r++) {
                        float sum = 0;
                        for (size_t i = 0; i < n; i++) sum += panel[r * STRIP + i] * act[i];
                        out[r] += sum;
                    }
                }
            }
        }
    }
}

const kt_kernels kt_kernels_scalar = {
    .types = KT_ALL_TYPES, .act_bytes = kt_act_bytes_f32, .panel_bytes = panel_bytes,
    .prepare = kt_prepare_f32, .activate = activate, .accumulate = accumulate, .dot = dot,
};
