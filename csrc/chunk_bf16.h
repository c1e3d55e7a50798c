/* 32 weights of any type as one vector of 32 bf16, rounded to nearest even. */
#include "chunk_avx512.h"

KT_INLINE __m512i bf16_pair(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

/* Number -> weight tables are rounded, not the weights: decoding is one permutation of 16-bit lanes by 5-bit numbers. */
KT_INLINE __m512i bf16_load(const int type, const uint8_t *block, const header *head, const int s) {
    if (type == KT_BF16) return _mm512_loadu_si512(block);
    if (type == KT_Q4_K) {
        __m256i table = (__m256i)_mm512_cvtneps_pbh(q4_k_table(head, s));
        const uint8_t *nibbles = ((const kt_block_q4_k *)(const void *)block)->q + s / 2 * 32;
        __m512i numbers = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)nibbles));
        if (s % 2) numbers = _mm512_srli_epi16(numbers, 4);
        /* Twice the table, so that the fifth bit, a neighbour's, does not matter. */
        return _mm512_permutexvar_epi16(numbers, _mm512_broadcast_i64x4(table));
    }
    if (type == KT_Q5_0) {
        const kt_block_q5_0 *q = (const void *)block;
        uint32_t high;
        memcpy(&high, q->high, 4);
        __m512 scale = _mm512_set1_ps(head->scale[0]), numbers = zero_to_15();
        __m512i table = bf16_pair(_mm512_mul_ps(scale, _mm512_sub_ps(numbers, _mm512_set1_ps(16))), _mm512_mul_ps(scale, numbers));
        __m128i low = _mm_loadu_si128((const void *)q->low);
        __m256i nibbles = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(low, 4), low), _mm256_set1_epi8(15));
        __m512i index = _mm512_cvtepu8_epi16(nibbles);
        return _mm512_permutexvar_epi16(_mm512_mask_add_epi16(index, high, index, _mm512_set1_epi16(16)), table);
    }
    floats32 weights = floats_load(type, block, head, s);
    return bf16_pair(weights.low, weights.high);
}
