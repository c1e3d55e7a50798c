/* AVX-512 BF16: weights and activations rounded to bf16, sums of pairs in float. Loops, shapes and tiles: dot.h. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#include "chunk_bf16.h"

typedef __m512i chunk;
typedef __m512 sums;

KT_INLINE chunk chunk_load(const int type, const uint8_t *block, const header *head, const int s) {
    return bf16_load(type, block, head, s);
}
KT_INLINE void chunk_store(chunk weights, uint8_t *dst) { _mm512_storeu_si512(dst, weights); }
KT_INLINE sums sums_zero(void) { return _mm512_setzero_ps(); }
KT_INLINE sums sums_add(sums sum, chunk weights, const uint8_t *act) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_loadu_si512(act));
}
KT_INLINE float sums_total(sums sum) { return _mm512_reduce_add_ps(sum); }

/* 24 sums, a weight and 6 activations of the 32 registers; the panel is half a MiB. */
enum { TAKES = KT_ALL_TYPES & ~(1u << KT_F32) };
enum { NATIVE = KT_BF16, ACT_BYTES = 2 * KT_CHUNK, FEW = 4, ROWS_1 = 4, ROWS_FEW = 2, PANEL_ROWS = 4, PANEL_TOKENS = 6, PANEL_COLS = 2048 };
#include "dot.h"

void kt_prepare_bf16(const float *src, size_t n, uint8_t *dst) {
    for (size_t i = 0; i < kt_chunks(n) * KT_CHUNK; i += 16) {
        size_t here = n > i ? n - i : 0;
        __mmask16 mask = here >= 16 ? 0xffff : (__mmask16)((1u << here) - 1);
        __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, src + (here ? i : 0)));
        _mm256_storeu_si256((void *)(dst + 2 * i), (__m256i)rounded);
    }
}

void kt_dot_avx512_bf16(const kt_dot *dot) { dot_all(dot); }


const kt_kernels kt_kernels_avx512_bf16 = {
    .types = TAKES, .act_chunk_bytes = ACT_BYTES, .panel_bytes = dot_panel_bytes,
    .prepare = kt_prepare_bf16, .activate = kt_activate_avx512, .dot = dot_all,
};
#endif
