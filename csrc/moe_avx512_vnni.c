/* AVX-512 VNNI: activations rounded to int8 with one scale for 32, weights as the unsigned integers they are stored as.
 *
 *     weights  scale * q - minimum        q in 0..255; q8_0 and q5_0 are shifted to it, minimum = scale * shift
 *     acts     scale' * a, and their sum  a in -127..127
 *     32 products:  scale * scale' * (q . a) - minimum * sum      (q . a) exact in int32
 * Loops, shapes and tiles: dot.h.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "chunk_avx512.h"

typedef struct { int8_t q[32]; float scale, sum; } act_block;   /* sum is of scale * q */
typedef struct { __m256i q; float scale, minimum; } chunk;
typedef struct { __m256 products; float minima; } sums;

KT_INLINE chunk chunk_load(const int type, const uint8_t *block, const header *head, const int s) {
    switch (type) {
    case KT_Q8_0: {
        __m256i q = _mm256_loadu_si256((const void *)((const kt_block_q8_0 *)(const void *)block)->q);
        return (chunk){_mm256_xor_si256(q, _mm256_set1_epi8(-128)), head->scale[0], head->scale[0] * 128};
    }
    case KT_Q5_0: {
        const kt_block_q5_0 *q = (const void *)block;
        uint32_t high;
        memcpy(&high, q->high, 4);
        __m128i low = _mm_loadu_si128((const void *)q->low);
        __m256i nibbles = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(low, 4), low), _mm256_set1_epi8(15));
        return (chunk){_mm256_mask_add_epi8(nibbles, high, nibbles, _mm256_set1_epi8(16)), head->scale[0], head->scale[0] * 16};
    }
    case KT_Q4_K: {
        __m256i q = _mm256_loadu_si256((const void *)(((const kt_block_q4_k *)(const void *)block)->q + s / 2 * 32));
        q = _mm256_and_si256(s % 2 ? _mm256_srli_epi16(q, 4) : q, _mm256_set1_epi8(15));
        return (chunk){q, head->scale[s], head->minimum[s]};
    }
    default: {
        const kt_block_unpacked *q = (const void *)block;
        return (chunk){_mm256_loadu_si256((const void *)q->q), q->scale, q->minimum};
    }
    }
}
KT_INLINE void chunk_store(chunk weights, uint8_t *dst) {
    kt_block_unpacked *block = (void *)dst;
    _mm256_storeu_si256((void *)block->q, weights.q);
    block->scale = weights.scale;
    block->minimum = weights.minimum;
}
KT_INLINE sums sums_zero(void) { return (sums){_mm256_setzero_ps(), 0}; }
KT_INLINE sums sums_add(sums sum, chunk weights, const uint8_t *act) {
    const act_block *a = (const void *)act;
    __m256i products = _mm256_dpbusd_epi32(_mm256_setzero_si256(), weights.q, _mm256_loadu_si256((const void *)a->q));
    __m256 scale = _mm256_set1_ps(weights.scale * a->scale);
    return (sums){_mm256_fmadd_ps(_mm256_cvtepi32_ps(products), scale, sum.products), sum.minima + weights.minimum * a->sum};
}
KT_INLINE float sums_total(sums sum) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum.products), _mm256_extractf128_ps(sum.products, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two))) - sum.minima;
}

/* 8 x (sum, minima); the panel is 640 KiB. */
enum { TAKES = 1u << KT_Q8_0 | 1u << KT_Q5_0 | 1u << KT_Q4_K };
enum { NATIVE = KT_UNPACKED, ACT_BYTES = sizeof(act_block), FEW = 4, ROWS_1 = 4, ROWS_FEW = 2, PANEL_ROWS = 2, PANEL_TOKENS = 4, PANEL_COLS = 4096 };
#include "dot.h"

static void prepare(const float *src, size_t n, uint8_t *dst) {
    for (size_t i = 0; i < n; i += KT_CHUNK, dst += sizeof(act_block)) {
        act_block *block = (void *)dst;
        uint32_t mask = n - i < KT_CHUNK ? (1u << (n - i)) - 1 : ~0u;
        __m512 low = _mm512_maskz_loadu_ps((__mmask16)mask, src + i);
        __m512 high = mask >> 16 ? _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), src + i + 16) : _mm512_setzero_ps();
        float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
        __m512 inverse = _mm512_set1_ps(largest > 0 ? 127 / largest : 0);
        __m512i low_q = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse)), high_q = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
        _mm_storeu_si128((void *)block->q, _mm512_cvtsepi32_epi8(low_q));
        _mm_storeu_si128((void *)(block->q + 16), _mm512_cvtsepi32_epi8(high_q));
        block->scale = largest / 127;
        block->sum = block->scale * (float)_mm512_reduce_add_epi32(_mm512_add_epi32(low_q, high_q));
    }
}

const kt_kernels kt_kernels_avx512_vnni = {
    .types = TAKES, .act_chunk_bytes = ACT_BYTES, .panel_bytes = dot_panel_bytes,
    .prepare = prepare, .activate = kt_activate_avx512, .dot = dot_all,
};
#endif
