/* Quantisers: float rows to ggml blocks, and to FP8 with a scale for each 128 x 128 block.
 *
 * SHAPES
 *     src [rows, cols] float, row-major; dst rows back to back in their encoding; cols a multiple of the type's block
 *
 * DEFINITION
 *     q8_0, q5_0, q4_0   one scale d a block of 32, from its largest value; q = x / d rounded. Bit for bit what
 *                        quantize_row_*_ref of ggml-quants.c and gguf/quants.py give.
 *     q4_k, q5_k, q6_k   see quantize_k.c
 *     fp8                scale = largest magnitude / 448, byte = e4m3(x / scale), nearest even
 *     A block that fp16 scales cannot reach is clipped: what is stored is always finite.
 */
#include "quantize.h"

/* ---- one scale for each 32 values */

/* The scale, at most what fp16 holds, and its reciprocal, 0 if there is none. */
KT_INLINE float reciprocal(float *d) {
    *d = clamp(*d, -HALF_MAX, HALF_MAX);
    float inverse = *d == 0 ? 0 : 1 / *d;
    return is_finite(kt_to_bits(inverse) & 0x7fffffffu) ? inverse : 0;
}

static int row_q8_0(const float *x, size_t cols, kt_block_q8_0 *block) {
    for (; cols; cols -= 32, x += 32, block++) {
        uint32_t peak = peak_bits(x, 32);
        if (!is_finite(peak)) return KT_BAD_ARGUMENT;
        float d = kt_from_bits(peak) / 127, inverse = reciprocal(&d);
        int32_t q[32];
        for (int i = 0; i < 32; i += LANES) {   /* half away from zero; adding 0.5 would round 0.49999997 up */
            f32x4 y;
            memcpy(&y, x + i, sizeof y);
            y *= all(inverse);
            i32x4 minus = (i32x4)y >> 31;
            f32x4 size = lesser((f32x4)((i32x4)y & 0x7fffffff), all(127));
            i32x4 whole = __builtin_convertvector(size, i32x4);
            whole += __builtin_convertvector(2 * (size - __builtin_convertvector(whole, f32x4)), i32x4);
            whole = (whole ^ minus) - minus;
            memcpy(q + i, &whole, sizeof whole);
        }
        for (int i = 0; i < 32; i++) block->q[i] = (int8_t)q[i];
        put_half(block->d, d);
    }
    return KT_OK;
}

/* q = 0 .. 2 * half - 1 for x = -half * d .. (half - 1) * d. The sign of d makes the largest value q = 0. */
KT_INLINE int integers_of_32(const float *x, int half, float *d, uint8_t q[32]) {
    uint32_t peak = peak_bits(x, 32);
    if (!is_finite(peak)) return 0;
    int first = 0;
    while ((kt_to_bits(x[first]) & 0x7fffffffu) != peak) first++;
    *d = x[first] / (float)-half;
    float inverse = reciprocal(d), most = (float)(2 * half - 1);
    for (int i = 0; i < 32; i++) {
        float y = x[i] * inverse + ((float)half + 0.5f);
        y = y < 0 ? 0 : y;
        q[i] = (uint8_t)(int32_t)(y > most ? most : y);
    }
    return 1;
}

static int row_q4_0(const float *x, size_t cols, kt_block_q4_0 *block) {
    for (; cols; cols -= 32, x += 32, block++) {
        float d;
        uint8_t q[32];
        if (!integers_of_32(x, 8, &d, q)) return KT_BAD_ARGUMENT;
        put_half(block->d, d);
        for (int i = 0; i < 16; i++) block->q[i] = (uint8_t)(q[i] | q[i + 16] << 4);
    }
    return KT_OK;
}

static int row_q5_0(const float *x, size_t cols, kt_block_q5_0 *block) {
    for (; cols; cols -= 32, x += 32, block++) {
        float d;
        uint8_t q[32];
        if (!integers_of_32(x, 16, &d, q)) return KT_BAD_ARGUMENT;
        put_half(block->d, d);
        for (int i = 0; i < 16; i++) block->low[i] = (uint8_t)((q[i] & 15) | q[i + 16] << 4);
        for (int byte = 0; byte < 4; byte++) {
            int bits = 0;
            for (int i = 0; i < 8; i++) bits |= (q[8 * byte + i] >> 4) << i;
            block->high[byte] = (uint8_t)bits;
        }
    }
    return KT_OK;
}

/* ---- FP8 */

/* Nearest even; above 448, 448. */
KT_INLINE uint8_t to_e4m3(float x) {
    uint32_t bits = kt_to_bits(x), size = bits & 0x7fffffffu;
    uint32_t normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120u << 3);
    uint32_t small = kt_to_bits(kt_from_bits(size) + 0x1p14f) - kt_to_bits(0x1p14f);   /* the unit there is 2^-9 */
    uint32_t code = size < 0x3c800000u ? small : normal;
    return (uint8_t)((code > 0x7e ? 0x7e : code) | (bits >> 24 & 0x80));
}

static int fp8_block(const float *x, size_t rows, size_t cols, size_t stride, uint8_t *dst, float *scale) {
    uint32_t peak = 0;
    for (size_t r = 0; r < rows; r++) {
        uint32_t found = peak_bits(x + r * stride, cols);
        peak = found > peak ? found : peak;
    }
    if (!is_finite(peak)) return KT_BAD_ARGUMENT;
    float wanted = kt_from_bits(peak) / 448;
    *scale = peak == 0 ? 1 : wanted < 0x1p-126f ? 0x1p-126f : wanted;   /* a normal number: no scale is lost */
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) dst[r * stride + c] = to_e4m3(x[r * stride + c] / *scale);
    return KT_OK;
}

static int all_fp8(size_t rows, size_t cols, const float *src, uint8_t *dst, float *scales) {
    for (size_t r = 0; r < rows; r += 128)
        for (size_t c = 0; c < cols; c += 128) {
            size_t n_rows = rows - r < 128 ? rows - r : 128, n_cols = cols - c < 128 ? cols - c : 128;
            int status = fp8_block(src + r * cols + c, n_rows, n_cols, cols, dst + r * cols + c, scales++);
            if (status) return status;
        }
    return KT_OK;
}

/* ---- the interface */

#define WRITTEN (KT_BIT(KT_Q8_0) | KT_BIT(KT_Q4_0) | KT_BIT(KT_Q5_0) | KT_BIT(KT_Q4_K) | KT_BIT(KT_Q5_K) | KT_BIT(KT_Q6_K) \
                 | KT_BIT(KT_FP8_BLOCK128))

int kt_quantize(int type, size_t rows, size_t cols, const float *src, void *dst, float *scales) {
    if (type < 0 || type >= KT_TYPE_COUNT || !(WRITTEN & KT_BIT(type))) return KT_BAD_ARGUMENT;
    if (!rows || !cols || !src || !dst || (type == KT_FP8_BLOCK128) != (scales != NULL)) return KT_BAD_ARGUMENT;
    if (cols % kt_block(type)) return KT_BAD_COLUMNS;
    if (!kt_source_bytes(type, rows, cols)) return KT_TOO_LARGE;
    if (type == KT_FP8_BLOCK128) return all_fp8(rows, cols, src, dst, scales);
    size_t row_bytes = kt_source_bytes(type, 1, cols);
    for (size_t r = 0; r < rows; r++, src += cols) {
        void *row = (uint8_t *)dst + r * row_bytes;
        int status = KT_BAD_ARGUMENT;
        switch (type) {
        case KT_Q8_0: status = row_q8_0(src, cols, row); break;
        case KT_Q4_0: status = row_q4_0(src, cols, row); break;
        case KT_Q5_0: status = row_q5_0(src, cols, row); break;
        case KT_Q4_K: status = kt_quantize_q4_k(src, cols, row); break;
        case KT_Q5_K: status = kt_quantize_q5_k(src, cols, row); break;
        case KT_Q6_K: status = kt_quantize_q6_k(src, cols, row); break;
        }
        if (status) return status;
    }
    return KT_OK;
}
