/* What lanes.h asks for, with 16 rows in a register. */
#include <immintrin.h>
#include <stdint.h>

#define LANES 16
typedef uint32_t words16 __attribute__((vector_size(64), may_alias));
typedef float floats16 __attribute__((vector_size(64), may_alias));

static inline __attribute__((always_inline)) floats16 half_floats(const uint8_t *p) {
    return (floats16)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
}
static inline __attribute__((always_inline)) words16 byte_words(const uint8_t *p) {
    return (words16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
}
static inline __attribute__((always_inline)) words16 signed_byte_words(const uint8_t *p) {
    return (words16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p));
}
static inline __attribute__((always_inline)) words16 look_up(const uint8_t *table, words16 codes) {
    __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table));
    return (words16)_mm512_shuffle_epi8(four, (__m512i)codes);
}
