/* Storage types: sizes, exact decoding, and conversion into the packed layout. */
#include "internal.h"

static float fp8_e4m3(uint8_t byte) {
    uint32_t sign = (uint32_t)(byte & 0x80) << 24, exponent = byte >> 3 & 15, mantissa = byte & 7;
    if (exponent == 15 && mantissa == 7) return kt_from_bits(sign | 0x7fc00000u);  /* the only NaN; no infinities */
    if (exponent == 0) return kt_from_bits(sign | kt_to_bits((float)mantissa * 0x1p-9f));
    return kt_from_bits(sign | (exponent + 120) << 23 | mantissa << 20);
}

static void decode_q5_0(const kt_block_q5_0 *block, float *out) {
    uint32_t high = (uint32_t)block->high[0] | (uint32_t)block->high[1] << 8 | (uint32_t)block->high[2] << 16 |
                    (uint32_t)block->high[3] << 24;
    float d = kt_f16(block->d);
    for (int i = 0; i < 32; i++) {
        int low = i < 16 ? block->low[i] & 15 : block->low[i - 16] >> 4;
        out[i] = d * (float)((low | (int)(high >> i & 1) << 4) - 16);
    }
}

static void decode_q4_k(const kt_block_q4_k *block, int s, float *out) {
    uint8_t scale, minimum;
    kt_q4_k_scale(block->scales, s, &scale, &minimum);
    float d = kt_f16(block->d) * scale, m = kt_f16(block->dmin) * minimum;
    for (int i = 0; i < 32; i++) out[i] = d * (float)(block->q[s / 2 * 32 + i] >> s % 2 * 4 & 15) - m;
}

/* Sub-block s: nibble s % 4 / 2 of 32 bytes, two more bits of another 32, and a scale for each 16. */
static void decode_q6_k(const kt_block_q6_k *block, int s, float *out) {
    const uint8_t *low = block->low + s / 4 * 64 + s % 2 * 32, *high = block->high + s / 4 * 32;
    float d = kt_f16(block->d);
    for (int i = 0; i < 32; i++) {
        int q = (low[i] >> s % 4 / 2 * 4 & 15) | (high[i] >> s % 4 * 2 & 3) << 4;
        out[i] = d * (float)block->scales[2 * s + i / 16] * (float)(q - 32);
    }
}

void kt_decode_chunk(int type, const uint8_t *row, size_t col, size_t n, float *out) {
    const uint8_t *block = row + col / kt_block_weights(type) * kt_block_bytes(type);
    int s = (int)(col % kt_block_weights(type) / KT_CHUNK);
    switch (type) {
    case KT_F32: memcpy(out, block, n * sizeof *out); return;
    case KT_BF16: for (size_t i = 0; i < n; i++) out[i] = kt_from_bits((uint32_t)kt_read_u16(block + 2 * i) << 16); return;
    case KT_F16: for (size_t i = 0; i < n; i++) out[i] = kt_f16(block + 2 * i); return;
    case KT_FP8_BLOCK128: for (size_t i = 0; i < n; i++) out[i] = fp8_e4m3(block[i]); return;
    case KT_Q8_0: {
        const kt_block_q8_0 *q = (const void *)block;
        float d = kt_f16(q->d);
        for (size_t i = 0; i < n; i++) out[i] = d * (float)q->q[i];
        return;
    }
    case KT_Q5_0: decode_q5_0((const void *)block, out); return;
    case KT_Q4_K: decode_q4_k((const void *)block, s, out); return;
    case KT_Q6_K: decode_q6_k((const void *)block, s, out); return;
    }
}

size_t kt_packed_bytes(int isa, int type, size_t rows, size_t cols) {
    size_t bytes;
    if (!kt_isa_takes(isa, type) || (!kt_is_dense(type) && cols % kt_block_weights(type))) return 0;
    if (cols > SIZE_MAX / 8 || __builtin_mul_overflow(rows, kt_row_bytes(type, cols), &bytes)) return 0;
    return bytes;
}

int kt_pack(int src_type, int dst_type, size_t rows, size_t cols, const void *src, const float *scales, void *dst) {
    if (!src || !dst || !rows || !cols) return KT_BAD_ARGUMENT;
    if (src_type < 0 || src_type >= KT_TYPE_COUNT || dst_type < 0 || dst_type >= KT_TYPE_COUNT) return KT_BAD_ARGUMENT;
    if ((src_type == KT_FP8_BLOCK128) != (scales != NULL)) return KT_BAD_ARGUMENT;
    if (!kt_is_dense(src_type) && cols % kt_block_weights(src_type)) return KT_BAD_COLUMNS;
    size_t src_bytes = kt_row_bytes(src_type, cols), dst_bytes = kt_row_bytes(dst_type, cols), scale_cols = (cols + 127) / 128;
    if (src_type == dst_type && (KT_ALL_TYPES >> src_type & 1)) {
        memcpy(dst, src, rows * src_bytes);
        return KT_OK;
    }
    if (dst_type != KT_F32 && dst_type != KT_BF16) return KT_NO_PACKING;
    for (size_t r = 0; r < rows; r++) {
        const uint8_t *from = (const uint8_t *)src + r * src_bytes;
        uint8_t *to = (uint8_t *)dst + r * dst_bytes;
        for (size_t col = 0; col < cols; col += KT_CHUNK) {
            size_t n = cols - col < KT_CHUNK ? cols - col : KT_CHUNK;
            float values[KT_CHUNK];
            kt_decode_chunk(src_type, from, col, n, values);
            if (scales)
                for (size_t i = 0; i < n; i++) values[i] *= scales[r / 128 * scale_cols + col / 128];
            if (dst_type == KT_F32) {
                memcpy(to + 4 * col, values, 4 * n);
                continue;
            }
            for (size_t i = 0; i < n; i++) {
                uint16_t rounded = kt_bf16(values[i]);
                memcpy(to + 2 * (col + i), &rounded, 2);
            }
        }
    }
    return KT_OK;
}
