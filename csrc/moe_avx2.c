/* AVX2 with FMA and F16C: exact weights, float activations, float sums. Loops, shapes and tiles: dot.h. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "activate.h"

#define LANES 8
typedef uint32_t words8 __attribute__((vector_size(32), may_alias));
typedef float floats8 __attribute__((vector_size(32), may_alias));

KT_INLINE floats8 half_floats(const uint8_t *p) { return (floats8)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
KT_INLINE words8 byte_words(const uint8_t *p) { return (words8)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)); }
KT_INLINE words8 signed_byte_words(const uint8_t *p) { return (words8)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)); }
KT_INLINE words8 look_up(const uint8_t *table, words8 codes) {
    __m256i two = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table));
    return (words8)_mm256_shuffle_epi8(two, (__m256i)codes);
}

enum { TAKES = KT_ALL_TYPES };
#include "float_lanes.h"

static void activate(const kt_moe *moe, float *gate, const float *up, size_t n) { activate_all(moe, gate, up, n); }
static void accumulate(float *to, const float *more, float score, size_t n) { accumulate_all(to, more, score, n); }

static size_t panel_bytes(void) { return 0; }

const kt_kernels kt_kernels_avx2 = {
    .types = TAKES, .act_bytes = kt_act_bytes_f32, .panel_bytes = panel_bytes,
    .prepare = kt_prepare_f32, .activate = activate, .accumulate = accumulate, .dot = dot_few,
};
#endif
