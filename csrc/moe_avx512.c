/* AVX-512: exact weights, float activations, float sums. Loops, shapes and tiles: dot.h. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#include "activate.h"
#include "avx512.h"

enum { TAKES = KT_ALL_TYPES };
#include "float_lanes.h"

void kt_expand_scales_avx512(int type, const uint8_t *scales, size_t first, size_t cols, float *scale, float *minimum) {
#define CASE(TYPE) case TYPE: expand_scales(TYPE, scales, 0, first, cols, LANES, scale, minimum); return;
    switch (type) {
        CASE(KT_Q8_0) CASE(KT_Q5_0) CASE(KT_Q4_0) CASE(KT_Q6_K) CASE(KT_Q5_K) CASE(KT_Q4_K) CASE(KT_Q3_K) CASE(KT_Q2_K) CASE(KT_IQ4_NL)
        CASE(KT_IQ4_XS) CASE(KT_MXFP4) CASE(KT_FP8_BLOCK128) CASE(KT_INT8) CASE(KT_INT4_64) CASE(KT_INT4_128)
    }
#undef CASE
}

void kt_activate_avx512(const kt_moe *moe, float *gate, const float *up, size_t n) { activate_all(moe, gate, up, n); }
void kt_accumulate_avx512(float *to, const float *more, float score, size_t n) { accumulate_all(to, more, score, n); }

static size_t panel_bytes(void) { return 0; }

const kt_kernels kt_kernels_avx512 = {
    .types = TAKES, .act_bytes = kt_act_bytes_f32, .panel_bytes = panel_bytes,
    .prepare = kt_prepare_f32, .activate = kt_activate_avx512, .accumulate = kt_accumulate_avx512, .dot = dot_few,
};
#endif
