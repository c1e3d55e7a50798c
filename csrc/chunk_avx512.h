/* 32 weights of any type as two vectors of 16 floats, exact. */
#include <immintrin.h>

#include "internal.h"

typedef struct { float scale[16]; float minimum[8]; } header;   /* of the block's sub-blocks, as floats */
typedef struct { __m512 low, high; } floats32;

KT_INLINE float half_to_float(const uint8_t *p) { return _cvtsh_ss(kt_read_u16(p)); }

KT_INLINE void header_open(const int type, const uint8_t *block, header *head) {
    if (type == KT_Q4_K) {
        /* 6-bit scales and minima: the low 4 of each in place, those of the high 4 split into 4 + 2 bits. */
        const kt_block_q4_k *q = (const void *)block;
        uint32_t a, b, c;
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
        __m512 scale = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)q->scales)));
        _mm512_storeu_ps(head->scale, _mm512_mul_ps(scale, _mm512_set1_ps(half_to_float(q->d))));
        KT_IN_MEMORY(*head);
    } else if (type == KT_Q8_0 || type == KT_Q5_0) {
        head->scale[0] = half_to_float(block);
    }
}

/* The 32 6-bit numbers of sub-block s, less 32. */
KT_INLINE __m256i q6_k_numbers(const kt_block_q6_k *q, int s) {
    __m256i low = _mm256_loadu_si256((const void *)(q->low + s / 4 * 64 + s % 2 * 32));
    __m256i high = _mm256_loadu_si256((const void *)(q->high + s / 4 * 32));
    low = _mm256_and_si256(_mm256_srli_epi16(low, s % 4 / 2 * 4), _mm256_set1_epi8(15));
    high = _mm256_and_si256(_mm256_srli_epi16(high, s % 4 * 2), _mm256_set1_epi8(3));
    return _mm256_sub_epi8(_mm256_or_si256(low, _mm256_slli_epi16(high, 4)), _mm256_set1_epi8(32));
}

KT_INLINE floats32 bytes_to_floats(__m256i bytes) {
    return (floats32){_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes))),
                      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)))};
}

KT_INLINE __m512 zero_to_15(void) { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

/* Number -> weight, for the 16 numbers of a nibble: a permutation by the nibbles is then the whole decoding. */
KT_INLINE __m512 q4_k_table(const header *head, int s) {
    return _mm512_fmsub_ps(zero_to_15(), _mm512_set1_ps(head->scale[s]), _mm512_set1_ps(head->minimum[s]));
}

KT_INLINE floats32 floats_load(const int type, const uint8_t *block, const header *head, const int s) {
    switch (type) {
    case KT_F32: return (floats32){_mm512_loadu_ps(block), _mm512_loadu_ps(block + 64)};
    case KT_BF16: {
        __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)block));
        __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(block + 32)));
        return (floats32){_mm512_castsi512_ps(_mm512_slli_epi32(low, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(high, 16))};
    }
    case KT_Q8_0: {
        floats32 v = bytes_to_floats(_mm256_loadu_si256((const void *)((const kt_block_q8_0 *)(const void *)block)->q));
        __m512 scale = _mm512_set1_ps(head->scale[0]);
        return (floats32){_mm512_mul_ps(v.low, scale), _mm512_mul_ps(v.high, scale)};
    }
    case KT_Q5_0: {
        const kt_block_q5_0 *q = (const void *)block;
        uint32_t high;
        memcpy(&high, q->high, 4);
        __m512i numbers = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)q->low));
        __m512 scale = _mm512_set1_ps(head->scale[0]), sixteen = _mm512_mul_ps(scale, _mm512_set1_ps(16));
        __m512 weights = _mm512_mul_ps(scale, _mm512_sub_ps(zero_to_15(), _mm512_set1_ps(16)));
        floats32 v = {_mm512_permutexvar_ps(numbers, weights),
                      _mm512_permutexvar_ps(_mm512_srli_epi32(numbers, 4), weights)};
        v.low = _mm512_mask_add_ps(v.low, (__mmask16)high, v.low, sixteen);
        v.high = _mm512_mask_add_ps(v.high, (__mmask16)(high >> 16), v.high, sixteen);
        return v;
    }
    case KT_Q4_K: {
        const uint8_t *nibbles = ((const kt_block_q4_k *)(const void *)block)->q + s / 2 * 32;
        __m512 weights = q4_k_table(head, s);
        __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)nibbles));
        __m512i high = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(nibbles + 16)));
        if (s % 2) low = _mm512_srli_epi32(low, 4), high = _mm512_srli_epi32(high, 4);
        return (floats32){_mm512_permutexvar_ps(low, weights), _mm512_permutexvar_ps(high, weights)};
    }
    default: {
        floats32 v = bytes_to_floats(q6_k_numbers((const void *)block, s));
        return (floats32){_mm512_mul_ps(v.low, _mm512_set1_ps(head->scale[2 * s])),
                          _mm512_mul_ps(v.high, _mm512_set1_ps(head->scale[2 * s + 1]))};
    }
    }
}
