/* Loops over the rows of a result. act(gate) * up, without branches, so that the compiler turns the loop into vectors of the including file's target. */
#include <math.h>

#include "internal.h"

/* Cephes' way: e^v = 2^n e^r with |r| <= ln 2 / 2; within 2 units in the last place. */
KT_INLINE float activate_exp(float v) {
    const float round_to_int = 0x1.8p23f;  /* adding it leaves the nearest integer in the low mantissa bits */
    v = v < -87.0f ? -87.0f : v > 88.0f ? 88.0f : v;
    float shifted = v * 1.44269504f + round_to_int, n = shifted - round_to_int;
    float r = v - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * kt_from_bits((kt_to_bits(shifted) << 23) + (127u << 23));
}

KT_INLINE void activate_all(const kt_moe *moe, float *restrict gate, const float *restrict up, size_t n) {
    const float alpha = moe->alpha, limit = moe->limit;
    switch (moe->activation) {
    case KT_SILU:
        for (size_t i = 0; i < n; i++) gate[i] = gate[i] / (1 + activate_exp(-gate[i])) * up[i];
        return;
    case KT_GELU_TANH:  /* (1 + tanh u) / 2 = 1 / (1 + e^-2u) */
        for (size_t i = 0; i < n; i++) {
            float v = gate[i];
            gate[i] = v / (1 + activate_exp(-1.59576912f * (v + 0.044715f * v * v * v))) * up[i];
        }
        return;
    case KT_GELU:
        for (size_t i = 0; i < n; i++) gate[i] = 0.5f * gate[i] * (1 + erff(gate[i] * 0.70710678f)) * up[i];
        return;
    default:
        for (size_t i = 0; i < n; i++) {
            float g = gate[i] < limit ? gate[i] : limit, u = up[i] < limit ? up[i] : limit;
            u = u > -limit ? u : -limit;
            gate[i] = g / (1 + activate_exp(-alpha * g)) * (u + 1);
        }
    }
}

KT_INLINE void accumulate_all(float *restrict to, const float *restrict more, float score, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] += score * more[i];
}
