/* AVX-512 BF16: activations rounded to bf16 where weights are floats (bf16, fp8), sums of pairs in float. Weights are exact; f32
 * is refused. Where codes are integers, the loops of avx512_vnni. Loops, shapes and tiles: dot.h. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#include "avx512.h"
#include "lanes.h"

enum { TAKES = KT_BIT(KT_BF16) | KT_BIT(KT_FP8_BLOCK128) };
#define OFFSET(type) 0.0f

/* A prepared row: as kt_prepare_int16 makes it, and then bf16, KT_BF16_SCALE times as large, in the order of kt_bf16_column. */
#define RESULT(sum) ((sum) * KT_BF16_UNSCALE)
typedef struct { const uint8_t *x; } act;
typedef __m512 partial;

KT_INLINE act act_open(const uint8_t *row, size_t cols) { return (act){row + kt_act_bytes_int16(cols)}; }
KT_INLINE float run_sum(act a, size_t column, size_t run) { return 0; }
KT_INLINE partial partial_zero(void) { return _mm512_setzero_ps(); }
KT_INLINE floats partial_total(partial even, partial odd, act a, size_t column) { return (floats)_mm512_add_ps(even, odd); }

/* e4m3 in the high byte of each 16 bits, the low one anything: as bf16. */
KT_INLINE __m512i fp8_pair(__m512i w) {
    __m512i moved = _mm512_and_si512(_mm512_srai_epi16(w, 4), _mm512_set1_epi16((short)0x87f0));
    __m512i value = _mm512_add_epi16(moved, _mm512_set1_epi16(120 << 7));
    __mmask32 subnormal = _mm512_testn_epi16_mask(moved, _mm512_set1_epi16(0x0780));
    if (__builtin_expect(subnormal == 0, 1)) return value;
    const __m512i exact = _mm512_broadcast_i32x4(   /* mantissa * 2^-9 */
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i mantissa = _mm512_and_si512(_mm512_srli_epi16(moved, 4), _mm512_set1_epi16(7));
    __m512i sign = _mm512_and_si512(moved, _mm512_set1_epi16((short)0x8000));
    return _mm512_mask_mov_epi16(value, subnormal, _mm512_or_si512(_mm512_permutexvar_epi16(mantissa, exact), sign));
}

KT_INLINE void span_products(const int type, const uint8_t *span, const int run, const int tokens, const act *acts, size_t column,
                             partial *even, partial *odd) {
    KT_UNROLL for (int e = 0; e < 4; e++) {
        KT_UNROLL for (int p = 0; p < 4; p++) {
            __m512i w;
            if (type == KT_BF16) w = _mm512_loadu_si512(span + (e * 4 + p) * WORD_ROW);
            else {
                w = _mm512_loadu_si512(span + (2 * e + p % 2) * WORD_ROW);
                w = fp8_pair(p / 2 ? w : _mm512_slli_epi16(w, 8));
            }
            KT_UNROLL for (int t = 0; t < tokens; t++) {
                int two;
                memcpy(&two, acts[t].x + 2 * column + (size_t)(e * 4 + p) * 4, 4);
                partial *sum = p % 2 ? odd : even;
                sum[t] = _mm512_dpbf16_ps(sum[t], (__m512bh)w, (__m512bh)_mm512_set1_epi32(two));
            }
        }
    }
}
#include "dot.h"

size_t kt_act_bytes_bf16(size_t cols) { return kt_act_bytes_int16(cols) + kt_round_up(kt_spans(cols) * KT_SPAN * 2, KT_ALIGN); }

void kt_prepare_bf16(const float *src, size_t first, size_t n, size_t cols, int uses, uint8_t *row) {
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    uint8_t *to = row + kt_act_bytes_int16(cols) + 2 * first;
    if (uses & KT_FEW) kt_prepare_int16(src, first, n, cols, uses, row);
    for (size_t i = 0; i < kt_spans(n) * KT_SPAN; i += 16) {
        size_t here = n > i ? n - i : 0;
        __mmask16 mask = here >= 16 ? 0xffff : (__mmask16)((1u << here) - 1);
        __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, src + (here ? i : 0)), _mm512_set1_ps(KT_BF16_SCALE));
        __m256i rounded = (__m256i)_mm512_cvtneps_pbh(scaled);
        _mm256_storeu_si256((void *)(to + 2 * i), _mm256_shuffle_epi8(rounded, order));
    }
}

/* Each matrix by its own type. */
void kt_dot_avx512_bf16(const kt_dot *dot) {
    for (size_t m = 0; m < dot->n_matrices; m++) {
        kt_dot one = *dot;
        one.n_matrices = 1;
        one.type[0] = dot->type[m], one.w[0] = dot->w[m], one.group_bytes[0] = dot->group_bytes[m], one.out[0] = dot->out[m];
        if (TAKES >> dot->type[m] & 1) dot_few(&one);
        else kt_dot_avx512_vnni(&one);
    }
}

static size_t panel_bytes(void) { return 0; }

/* Without tiles every expert streams. */
static void prepare(const float *src, size_t first, size_t n, size_t cols, int uses, uint8_t *row) { kt_prepare_bf16(src, first, n, cols, KT_FEW, row); }

const kt_kernels kt_kernels_avx512_bf16 = {
    .types = KT_ALL_TYPES & ~KT_BIT(KT_F32), .act_bytes = kt_act_bytes_bf16, .panel_bytes = panel_bytes,
    .prepare = prepare, .activate = kt_activate_avx512, .accumulate = kt_accumulate_avx512, .dot = kt_dot_avx512_bf16,
};
#endif
