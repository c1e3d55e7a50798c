/* Row-major sources of every type: how long they are, and their values. A block itself is read in pack.h. */
#include "pack.h"

size_t kt_source_bytes(int type, size_t rows, size_t cols) {
    size_t bytes;
    if (!is_source(type) || cols % kt_block(type) || cols > SIZE_MAX / 256) return 0;
    return __builtin_mul_overflow(rows, cols / kt_block(type) * block_bytes(type), &bytes) ? 0 : bytes;
}

/* Columns [c, c + n) of a row of blocks, whole ones, as floats. */
KT_INLINE void read_blocks(const int type, const uint8_t *row, size_t c, size_t n, float *out) {
    const size_t per = kt_block(type), run = kt_run(type);
    const int minima = type == KT_Q5_K || type == KT_Q4_K || type == KT_Q2_K;
    block b;
    for (size_t i = 0; i < n; i += per) {
        read_block(type, row + (c + i) / per * block_bytes(type), &b);
        float d = type == KT_MXFP4 ? kt_half_e8m0((uint8_t)b.d) : kt_f16((const uint8_t *)&b.d);
        float dmin = minima ? kt_f16((const uint8_t *)&b.dmin) : 0;
        for (size_t j = 0; j < per; j += run) {
            float scale = d, minimum = minima ? dmin * b.minimum[j / run] : 0;
            if (minima) scale = d * b.scale[j / run];
            else if (type == KT_Q6_K) scale = d * (float)(int8_t)b.scale[j / run];
            else if (kt_is_k(type)) scale = d * (float)(b.scale[j / run] - 32);
            if (kt_has_table(type)) {   /* a table of 16 floats: one look-up a weight */
                float value[16];
                for (int k = 0; k < 16; k++) value[k] = scale * (float)(kt_table(type)[k] - kt_bias(type));
                for (size_t k = j; k < j + run; k++) out[i + k] = value[b.code[k]];
                continue;
            }
            for (size_t k = j; k < j + run; k++) out[i + k] = scale * (float)(b.code[k] - kt_bias(type)) - minimum;
        }
    }
}

void kt_read_floats(int type, const source *from, size_t r, size_t c, size_t n, float *out) {
    const uint8_t *row = from->row + r * from->row_bytes;
    switch (type) {
#define CASE(TYPE) case TYPE: read_blocks(TYPE, row, c, n, out); return;
    CASE(KT_Q8_0) CASE(KT_Q5_0) CASE(KT_Q4_0) CASE(KT_Q6_K) CASE(KT_Q5_K) CASE(KT_Q4_K) CASE(KT_Q3_K) CASE(KT_Q2_K)
    CASE(KT_IQ4_NL) CASE(KT_IQ4_XS) CASE(KT_MXFP4)
#undef CASE
    case KT_F32: memcpy(out, row + 4 * c, 4 * n); return;
    case KT_BF16: for (size_t i = 0; i < n; i++) out[i] = kt_from_bits((uint32_t)kt_read_u16(row + 2 * (c + i)) << 16); return;
    case KT_F16: for (size_t i = 0; i < n; i++) out[i] = kt_f16(row + 2 * (c + i)); return;
    default:
        for (size_t i = 0, end; i < n; i = end) {  /* up to the next scale */
            float scale = from->scales[(c + i) / 128];
            end = i + 128 - (c + i) % 128;
            if (end > n) end = n;
            for (size_t k = i; k < end; k++) out[k] = from->e4m3[row[c + k]] * scale;
        }
    }
}
