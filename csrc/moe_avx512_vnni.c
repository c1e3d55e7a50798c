/* AVX-512 VNNI: activations as integers of 16 bits with a scale for each 32, weights exact, sums of a run exact.
 *
 * An activation is 256 high + low, two signed bytes; each meets four codes at a time. That is as fast as floats of 16 bits, which
 * round a hundred times coarser, would be if their products took half a cycle instead of two; and codes need no
 * conversion. Loops, shapes and tiles: dot.h. A run of 32 cannot overflow: 32 * 32767 * 255 < 2^31. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#include "avx512.h"
#include "lanes.h"

enum { TAKES = KT_INTEGER_TYPES };
#define OFFSET(type) 0.0f

typedef struct { const uint8_t *x; const float *scales, *sums16, *sums32; } act;   /* x: for each 32 columns 32 high bytes, then 32 low ones */
typedef __m512i partial;

KT_INLINE act act_open(const uint8_t *row, size_t cols) {
    const float *scales = (const float *)(const void *)(row + kt_spans(cols) * KT_SPAN * 2);
    return (act){row, scales, scales + kt_spans(cols), scales + 3 * kt_spans(cols)};
}
KT_INLINE float run_sum(act a, size_t column, size_t run) {
    return run == 16 ? a.sums16[column / 16] : a.sums32[column / KT_SPAN];
}
KT_INLINE partial partial_zero(void) { return _mm512_setzero_si512(); }
KT_INLINE floats partial_total(partial high, partial low, act a, size_t column) {
    __m512i total = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
    return (floats)_mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(a.scales[column / KT_SPAN]));
}

KT_INLINE __m512i four(const uint8_t *x) {
    int bytes;
    memcpy(&bytes, x, 4);
    return _mm512_set1_epi32(bytes);
}

KT_INLINE void span_products(const int type, const uint8_t *span, const int run, const int tokens, const act *acts, size_t column,
                             partial *high, partial *low) {
    const int per = (int)kt_run(type) / 4;
    KT_UNROLL for (int q = run * per; q < (run + 1) * per; q++) {
        __m512i codes = (__m512i)quad(type, span, q);
        KT_UNROLL for (int t = 0; t < tokens; t++) {
            const uint8_t *x = acts[t].x + 2 * column + (size_t)q * 4;
            high[t] = _mm512_dpbusd_epi32(high[t], codes, four(x));
            low[t] = _mm512_dpbusd_epi32(low[t], codes, four(x + KT_SPAN));
        }
    }
}
#include "dot.h"

size_t kt_act_bytes_int16(size_t cols) {
    size_t spans = kt_spans(cols);
    return kt_round_up(spans * (KT_SPAN * 2 + 4 * sizeof(float)), KT_ALIGN);
}

#define MOST 32639.0f   /* 127 * 256 + 127 */

void kt_prepare_int16(const float *src, size_t first, size_t n, size_t cols, int uses, uint8_t *row) {
    float *scales = (float *)(void *)(row + kt_spans(cols) * KT_SPAN * 2), *sums = scales + kt_spans(cols);
    for (size_t i = 0; i < n; i += KT_SPAN) {
        uint32_t mask = n - i < KT_SPAN ? (1u << (n - i)) - 1 : ~0u;
        __m512 half[2] = {_mm512_maskz_loadu_ps((__mmask16)mask, src + i), _mm512_setzero_ps()};
        if (mask >> 16) half[1] = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), src + i + 16);
        float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(half[0]), _mm512_abs_ps(half[1]))), scale = largest / MOST;
        __m512 inverse = _mm512_set1_ps(largest > 0 ? MOST / largest : 0);
        float *both = sums + 2 * kt_spans(cols) + (first + i) / KT_SPAN;
        scales[(first + i) / KT_SPAN] = scale;
        *both = 0;
        for (int j = 0; j < 2; j++) {
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(half[j], inverse));
            __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8), low = _mm512_sub_epi32(q, _mm512_slli_epi32(high, 8));
            uint8_t *to = row + 2 * (first + i) + 16 * (size_t)j;
            _mm_storeu_si128((void *)to, _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128((void *)(to + KT_SPAN), _mm512_cvtepi32_epi8(low));
            *both += sums[(first + i) / 16 + (size_t)j] = scale * (float)_mm512_reduce_add_epi32(q);
        }
    }
}

void kt_dot_avx512_vnni(const kt_dot *dot) { dot_few(dot); }

static size_t panel_bytes(void) { return 0; }

const kt_kernels kt_kernels_avx512_vnni = {
    .types = TAKES, .act_bytes = kt_act_bytes_int16, .panel_bytes = panel_bytes,
    .prepare = kt_prepare_int16, .activate = kt_activate_avx512, .accumulate = kt_accumulate_avx512, .dot = kt_dot_avx512_vnni,
};
#endif
