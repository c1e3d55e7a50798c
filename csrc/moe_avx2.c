/* AVX2 with FMA and F16C: exact weights, float activations, float sums. Loops, shapes and tiles: dot.h. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "activate.h"

typedef struct { float scale[16]; float minimum[8]; } header;
typedef struct { __m256 part[4]; } chunk;
typedef __m256 sums;

KT_INLINE float half_to_float(const uint8_t *p) { return _cvtsh_ss(kt_read_u16(p)); }

KT_INLINE void header_open(const int type, const uint8_t *block, header *head) {
    if (type == KT_Q4_K) {
        const kt_block_q4_k *q = (const void *)block;
        uint32_t a, b, c;  /* 6-bit numbers: the first 4 in place, the others split into 4 + 2 bits */
        memcpy(&a, q->scales, 4), memcpy(&b, q->scales + 4, 4), memcpy(&c, q->scales + 8, 4);
        uint64_t scales = (a & 0x3f3f3f3f) | (uint64_t)((c & 0x0f0f0f0f) | (a >> 2 & 0x30303030)) << 32;
        uint64_t minima = (b & 0x3f3f3f3f) | (uint64_t)((c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030)) << 32;
        __m256 scale = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)scales)));
        __m256 minimum = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)minima)));
        _mm256_storeu_ps(head->scale, _mm256_mul_ps(scale, _mm256_set1_ps(half_to_float(q->d))));
        _mm256_storeu_ps(head->minimum, _mm256_mul_ps(minimum, _mm256_set1_ps(half_to_float(q->dmin))));
        KT_IN_MEMORY(*head);
    } else if (type == KT_Q6_K) {
        const kt_block_q6_k *q = (const void *)block;
        __m256 d = _mm256_set1_ps(half_to_float(q->d));
        for (int i = 0; i < 16; i += 8) {
            __m256i scales = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(q->scales + i)));
            _mm256_storeu_ps(head->scale + i, _mm256_mul_ps(d, _mm256_cvtepi32_ps(scales)));
        }
        KT_IN_MEMORY(*head);
    } else if (type == KT_Q8_0 || type == KT_Q5_0) {
        head->scale[0] = half_to_float(block);
    }
}

/* 32 signed numbers, times a scale for each 16, less a minimum. */
KT_INLINE chunk scaled(__m256i numbers, float first, float second, float minimum) {
    chunk weights;
    __m128i half[2] = {_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1)};
    for (int i = 0; i < 4; i++) {
        __m128i eight = i % 2 ? _mm_unpackhi_epi64(half[i / 2], half[i / 2]) : half[i / 2];
        __m256 scale = _mm256_set1_ps(i < 2 ? first : second);
        weights.part[i] = _mm256_fmsub_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), scale, _mm256_set1_ps(minimum));
    }
    return weights;
}

/* Bit i of the word to byte i: 16 where it is set. */
KT_INLINE __m256i fifth_bits(const uint8_t *word) {
    uint32_t bits;
    memcpy(&bits, word, 4);
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), byte_of);
    __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201u);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), _mm256_set1_epi8(16));
}

KT_INLINE chunk chunk_load(const int type, const uint8_t *block, const header *head, const int s) {
    chunk weights;
    switch (type) {
    case KT_F32:
        for (int i = 0; i < 4; i++) weights.part[i] = _mm256_loadu_ps((const float *)(const void *)(block + 32 * i));
        return weights;
    case KT_BF16:
        for (int i = 0; i < 4; i++) {
            __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(block + 16 * i)));
            weights.part[i] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
        }
        return weights;
    case KT_Q8_0: {
        const kt_block_q8_0 *q = (const void *)block;
        return scaled(_mm256_loadu_si256((const void *)q->q), head->scale[0], head->scale[0], 0);
    }
    case KT_Q5_0: {
        const kt_block_q5_0 *q = (const void *)block;
        __m128i low = _mm_loadu_si128((const void *)q->low);
        __m256i numbers = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(low, 4), low), _mm256_set1_epi8(15));
        numbers = _mm256_sub_epi8(_mm256_or_si256(numbers, fifth_bits(q->high)), _mm256_set1_epi8(16));
        return scaled(numbers, head->scale[0], head->scale[0], 0);
    }
    case KT_Q4_K: {
        const kt_block_q4_k *q = (const void *)block;
        __m256i numbers = _mm256_srli_epi16(_mm256_loadu_si256((const void *)(q->q + s / 2 * 32)), s % 2 * 4);
        return scaled(_mm256_and_si256(numbers, _mm256_set1_epi8(15)), head->scale[s], head->scale[s], head->minimum[s]);
    }
    default: {
        const kt_block_q6_k *q = (const void *)block;
        __m256i low = _mm256_loadu_si256((const void *)(q->low + s / 4 * 64 + s % 2 * 32));
        __m256i high = _mm256_loadu_si256((const void *)(q->high + s / 4 * 32));
        low = _mm256_and_si256(_mm256_srli_epi16(low, s % 4 / 2 * 4), _mm256_set1_epi8(15));
        high = _mm256_slli_epi16(_mm256_and_si256(_mm256_srli_epi16(high, s % 4 * 2), _mm256_set1_epi8(3)), 4);
        __m256i numbers = _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32));
        return scaled(numbers, head->scale[2 * s], head->scale[2 * s + 1], 0);
    }
    }
}
KT_INLINE void chunk_store(chunk weights, uint8_t *dst) {
    for (int i = 0; i < 4; i++) _mm256_storeu_ps((float *)(void *)(dst + 32 * i), weights.part[i]);
}
KT_INLINE sums sums_zero(void) { return _mm256_setzero_ps(); }
KT_INLINE sums sums_add(sums sum, chunk weights, const uint8_t *act) {
    for (int i = 0; i < 4; i++)
        sum = _mm256_fmadd_ps(weights.part[i], _mm256_loadu_ps((const float *)(const void *)(act + 32 * i)), sum);
    return sum;
}
KT_INLINE float sums_total(sums sum) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* 8 sums, 4 parts of a chunk and an activation of the 16 registers. */
enum { TAKES = KT_ALL_TYPES };
enum { NATIVE = KT_F32, ACT_BYTES = 4 * KT_CHUNK, FEW = 4, ROWS_1 = 4, ROWS_FEW = 2, PANEL_ROWS = 2, PANEL_TOKENS = 4, PANEL_COLS = 1024 };
#include "dot.h"

static void activate(int activation, float *gate, const float *up, size_t n) { activate_all(activation, gate, up, n); }

const kt_kernels kt_kernels_avx2 = {
    .types = TAKES, .act_chunk_bytes = ACT_BYTES, .panel_bytes = dot_panel_bytes,
    .prepare = kt_prepare_f32, .activate = activate, .dot = dot_all,
};
#endif
