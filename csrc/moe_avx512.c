/* AVX-512: exact weights, float activations, float sums. Loops, shapes and tiles: dot.h. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#include "activate.h"
#include "chunk_avx512.h"

typedef floats32 chunk;
typedef __m512 sums;

KT_INLINE chunk chunk_load(const int type, const uint8_t *block, const header *head, const int s) {
    return floats_load(type, block, head, s);
}
KT_INLINE void chunk_store(chunk weights, uint8_t *dst) {
    _mm512_storeu_ps(dst, weights.low);
    _mm512_storeu_ps(dst + 64, weights.high);
}
KT_INLINE sums sums_zero(void) { return _mm512_setzero_ps(); }
KT_INLINE sums sums_add(sums sum, chunk weights, const uint8_t *act) {
    sum = _mm512_fmadd_ps(weights.low, _mm512_loadu_ps(act), sum);
    return _mm512_fmadd_ps(weights.high, _mm512_loadu_ps(act + 64), sum);
}
KT_INLINE float sums_total(sums sum) { return _mm512_reduce_add_ps(sum); }

/* 24 sums, 2 weights and 6 activations of the 32 registers; the panel is half a MiB. */
enum { TAKES = KT_ALL_TYPES };
enum { NATIVE = KT_F32, ACT_BYTES = 4 * KT_CHUNK, FEW = 4, ROWS_1 = 4, ROWS_FEW = 2, PANEL_ROWS = 4, PANEL_TOKENS = 6, PANEL_COLS = 1024 };
#include "dot.h"

void kt_activate_avx512(int activation, float *gate, const float *up, size_t n) { activate_all(activation, gate, up, n); }

const kt_kernels kt_kernels_avx512 = {
    .types = TAKES, .act_chunk_bytes = ACT_BYTES, .panel_bytes = dot_panel_bytes,
    .prepare = kt_prepare_f32, .activate = kt_activate_avx512, .dot = dot_all,
};
#endif
