/* Quantisers of ggml's blocks of 256, which have scales of scales.
 *
 * DEFINITION
 *     q4_k, q5_k         x ~ d * scale[s] * q - dmin * minimum[s], eight sub-blocks s of 32, scale and minimum 6 bits.
 *     q6_k               x ~ d * scale[s] * q, sixteen sub-blocks s of 16, scale 8 bits and signed.
 *         All three minimise the sum of w * error^2, w = 3 + x^2 / the sub-block's mean of x^2, in three steps:
 *         1. each sub-block by itself: q for a range of scales, the best scale (and minimum) for each q by least
 *            squares, the best of these; for q4_k and q5_k then q for that scale and minimum, and so on, twice;
 *         2. d from the largest scale; the scales and minimums as the multiples of d and dmin, among the nearest and
 *            their neighbours, that are best for the sub-block;
 *         3. d and dmin for these integers by least squares over the block, then q again, if that is better.
 *     A block that fp16 scales cannot reach, above 65504 * 63 * 15 and the like, is clipped; one that they cannot
 *     resolve, below 2^-25, is zero. What is stored is always finite.
 */
#include "quantize.h"

enum { K_BLOCK = 256, MOST_SUBS = 16 };

/* A block made comparable: times a power of two, so that squares neither overflow nor vanish, with its weights. */
typedef struct {
    f32x4 y[K_BLOCK / LANES], w[K_BLOCK / LANES];
    float unit;         /* x = y * unit */
} k_block;

/* 1: ready; 0: so small that its integers are all zero; -1: not finite. `subs` sub-blocks have weights of their own. */
static int open_block(const float *x, int subs, k_block *b) {
    uint32_t peak = peak_bits(x, K_BLOCK);
    if (!is_finite(peak)) return -1;
    if (kt_from_bits(peak) < HALF_TINY / 2) return 0;
    uint32_t exponent = peak >> 23 > 252 ? 252 : peak >> 23;   /* both powers of two are normal numbers */
    b->unit = kt_from_bits(exponent << 23);
    f32x4 inverse = all(kt_from_bits((254 - exponent) << 23));
    const int vectors = K_BLOCK / LANES / subs;
    for (int s = 0; s < subs; s++) {
        f32x4 *y = b->y + s * vectors, *w = b->w + s * vectors, total = all(0);
        for (int i = 0; i < vectors; i++) {
            memcpy(&y[i], x + (s * vectors + i) * LANES, sizeof y[i]);
            y[i] *= inverse;
            w[i] = y[i] * y[i];
            total += w[i];
        }
        float mean = sum(total) / (float)(vectors * LANES);
        f32x4 per_mean = all(mean > 0x1p-100f ? 1 / mean : 0);   /* below that, a block of zeros: equal weights */
        for (int i = 0; i < vectors; i++) w[i] = w[i] * per_mean + all(3);
    }
    return 1;
}

/* The scale of fp16 for `wanted`, in units of the block: never 0 unless `wanted` is, for the integers can be larger. */
KT_INLINE float half_scale(const k_block *b, float wanted, uint8_t *half) {
    float x = clamp(wanted, -HALF_MAX / b->unit, HALF_MAX / b->unit) * b->unit;
    if (x != 0 && x < HALF_TINY && x > -HALF_TINY) x = x < 0 ? -HALF_TINY : HALF_TINY;
    put_half(half, x);
    return kt_f16(half) / b->unit;
}

/* Least squares of z ~ scale * q + offset, offset <= ceiling. Sums are weighted; returns the error. */
typedef struct { double w, z, zz; } fixed_sums;
static double solve(const fixed_sums *s, double q, double qq, double qz, double ceiling, double *scale,
                    double *offset) {
    double spread = s->w * qq - q * q;   /* 0 where all q are one: then every offset does */
    *scale = (s->w * qz - q * s->z) / spread;
    *offset = (qq * s->z - q * qz) / spread;
    if (!(spread > 1e-7 * s->w * qq) || *offset > ceiling) {
        *offset = ceiling;
        *scale = (qz - ceiling * q) / qq;
    }
    return s->zz + *scale * (*scale * qq + 2 * (*offset * q - qz)) + *offset * (*offset * s->w - 2 * s->z);
}

/* Step 1 for 32 values and q in [0, most]: y ~ scale * q - minimum, both at least 0. */
static void fit_affine(const f32x4 *y, const f32x4 *w, float most, float *scale, float *minimum) {
    enum { N = 8, CANDIDATES = 21, ROUNDS = 2 };
    f32x4 low4 = all(0), high4 = y[0], z[N], wz[N], sum_w = all(0), sum_z = all(0), sum_zz = all(0);
    for (int i = 0; i < N; i++) {
        low4 = lesser(y[i], low4);
        high4 = greater(y[i], high4);
    }
    float low = low4[0], high = high4[0];
    for (int l = 1; l < LANES; l++) {
        low = low4[l] < low ? low4[l] : low;
        high = high4[l] > high ? high4[l] : high;
    }
    *scale = 0;
    *minimum = -low;
    if (!(high > low)) return;
    for (int i = 0; i < N; i++) {
        z[i] = y[i] - all(low);
        wz[i] = w[i] * z[i];
        sum_w += w[i];
        sum_z += wz[i];
        sum_zz += wz[i] * z[i];
    }
    const fixed_sums fixed = {sum(sum_w), sum(sum_z), sum(sum_zz)};
    double best = 1e300, offset = 0;
    for (int c = 0; c < CANDIDATES + ROUNDS; c++) {
        const int grid = c < CANDIDATES || !(*scale > 0);
        const f32x4 inverse = all(grid ? (most - 1 + 0.1f * (float)c) / (high - low) : 1 / *scale);
        const f32x4 start = all(grid ? 0 : (float)offset);
        f32x4 sum_q = all(0), sum_qq = all(0), sum_qz = all(0);
        for (int i = 0; i < N; i++) {
            f32x4 q = nearest4(greater(lesser((z[i] - start) * inverse, all(most)), all(0))), wq = w[i] * q;
            sum_q += wq;
            sum_qq += wq * q;
            sum_qz += wz[i] * q;
        }
        double a, o, error = solve(&fixed, sum(sum_q), sum(sum_qq), sum(sum_qz), -(double)low, &a, &o);
        if (!(error < best) || !(a >= 0)) continue;
        best = error;
        offset = o;
        *scale = (float)a;
        *minimum = (float)(-(double)low - o);
    }
}

/* Step 1 for 16 values and q in [-32, 31]: y ~ scale * q. */
static float fit_signed(const f32x4 *y, const f32x4 *w) {
    enum { N = 4, CANDIDATES = 18 };
    float peak = 0;
    for (int i = 0; i < N; i++)
        for (int l = 0; l < LANES; l++) peak = y[i][l] * y[i][l] > peak * peak ? y[i][l] : peak;
    if (peak * peak == 0) return 0;
    float scale = 0, best = -1;
    for (int c = 0; c <= CANDIDATES; c++) {
        f32x4 inverse = all(-(31.1f + 0.1f * (float)c) / peak), sum_qq = all(0), sum_qy = all(0);
        for (int i = 0; i < N; i++) {
            f32x4 q = nearest4(greater(lesser(y[i] * inverse, all(31)), all(-32))), wq = w[i] * q;
            sum_qq += wq * q;
            sum_qy += wq * y[i];
        }
        float a = sum(sum_qy) / sum(sum_qq), gain = a * sum(sum_qy);
        if (gain <= best) continue;
        best = gain;
        scale = a;
    }
    return scale;
}

/* A block as integers: y ~ d * scale[s] * q - dmin * minimum[s]. */
typedef struct {
    f32x4 q[K_BLOCK / LANES];
    float scale[MOST_SUBS], minimum[MOST_SUBS], d, dmin;
    uint8_t d_half[2], dmin_half[2];
} k_integers;

/* What the integers of a type can be. */
typedef struct { int subs; float q_low, q_high, scale_low, scale_high, minimum_high; } k_range;
static const k_range Q4_K_RANGE = {8, 0, 15, 0, 63, 63};
static const k_range Q5_K_RANGE = {8, 0, 31, 0, 63, 63};
static const k_range Q6_K_RANGE = {16, -32, 31, -128, 127, 0};

/* q of sub-block s for a scale and a minimum; returns the weighted error. */
KT_INLINE float round_sub(const k_block *b, const k_range *of, const k_integers *k, int s, float scale, float minimum,
                          f32x4 *q) {
    const int vectors = K_BLOCK / LANES / of->subs;
    const float step = k->d * scale;
    const f32x4 inverse = all(step == 0 ? 0 : 1 / step), offset = all(k->dmin * minimum), width = all(step);
    const f32x4 *y = b->y + s * vectors, *w = b->w + s * vectors;
    f32x4 error = all(0);
    for (int i = 0; i < vectors; i++) {
        q[i] = nearest4(greater(lesser((y[i] + offset) * inverse, all(of->q_high)), all(of->q_low)));
        f32x4 miss = y[i] - (width * q[i] - offset);
        error += w[i] * (miss * miss);
    }
    return sum(error);
}

/* q of the whole block; returns the weighted error. */
static float round_all(const k_block *b, const k_range *of, k_integers *k) {
    float error = 0;
    for (int s = 0; s < of->subs; s++)
        error += round_sub(b, of, k, s, k->scale[s], k->minimum[s], k->q + s * (K_BLOCK / LANES / of->subs));
    return error;
}

/* Step 2: scales and minimums as integers. Rounding each by itself is not best for both: their neighbours are tried. */
static void round_scales(const k_block *b, const k_range *of, const float *scale, const float *minimum, k_integers *k) {
    for (int s = 0; s < of->subs; s++) {
        f32x4 q[8];
        const float near = k->d == 0 ? 0 : nearest(clamp(scale[s] / k->d, of->scale_low, of->scale_high));
        const float near_minimum = k->dmin == 0 ? 0 : nearest(clamp(minimum[s] / k->dmin, 0, of->minimum_high));
        float best = round_sub(b, of, k, s, k->scale[s] = near, k->minimum[s] = near_minimum, q);
        for (int i = 0; i < 9; i++) {
            float other = near + (float)(i / 3 - 1), other_minimum = near_minimum + (float)(i % 3 - 1);
            if (other < of->scale_low || other > of->scale_high) continue;
            if (other_minimum < 0 || other_minimum > of->minimum_high) continue;
            float error = round_sub(b, of, k, s, other, other_minimum, q);
            if (error >= best) continue;
            best = error;
            k->scale[s] = other;
            k->minimum[s] = other_minimum;
        }
    }
}

/* Step 3. dmin is left alone where it is 0. */
static void refine(const k_block *b, const k_range *of, k_integers *k) {
    const int vectors = K_BLOCK / LANES / of->subs;
    const float error = round_all(b, of, k);
    f32x4 aa = all(0), ab = all(0), bb = all(0), ay = all(0), by = all(0);
    for (int s = 0; s < of->subs; s++) {
        f32x4 scale = all(k->scale[s]), minimum = all(k->minimum[s]);
        for (int i = s * vectors; i < (s + 1) * vectors; i++) {
            f32x4 a = scale * k->q[i], wa = b->w[i] * a, wm = b->w[i] * minimum;
            aa += wa * a;
            ab += wa * minimum;
            bb += wm * minimum;
            ay += wa * b->y[i];
            by += wm * b->y[i];
        }
    }
    double A = sum(aa), AB = sum(ab), B = sum(bb), AY = sum(ay), BY = sum(by), det = A * B - AB * AB;
    if (!(A > 0)) return;
    k_integers other = *k;
    double d = AY / A, dmin = 0;
    if (k->dmin != 0) {
        if (!(det > 1e-6 * A * B)) return;
        d = (AY * B - BY * AB) / det;
        dmin = (AY * AB - BY * A) / det;
        if (!(dmin > 0)) return;
    }
    other.d = half_scale(b, (float)d, other.d_half);
    other.dmin = half_scale(b, (float)dmin, other.dmin_half);
    if (round_all(b, of, &other) < error) *k = other;
}

/* Steps 1 to 3 of q4_k and q5_k. */
static void affine(const k_block *b, const k_range *of, k_integers *k) {
    float scale[MOST_SUBS], minimum[MOST_SUBS], top_scale = 0, top_minimum = 0;
    for (int s = 0; s < of->subs; s++) {
        fit_affine(b->y + s * 8, b->w + s * 8, of->q_high, &scale[s], &minimum[s]);
        top_scale = scale[s] > top_scale ? scale[s] : top_scale;
        top_minimum = minimum[s] > top_minimum ? minimum[s] : top_minimum;
    }
    k->d = half_scale(b, top_scale / 63, k->d_half);
    k->dmin = half_scale(b, top_minimum / 63, k->dmin_half);
    round_scales(b, of, scale, minimum, k);
    refine(b, of, k);
}

/* Steps 1 to 3 of q6_k. */
static void symmetric(const k_block *b, const k_range *of, k_integers *k) {
    const float none[MOST_SUBS] = {0};
    float scale[MOST_SUBS], top = 0;
    for (int s = 0; s < of->subs; s++) {
        scale[s] = fit_signed(b->y + s * 4, b->w + s * 4);
        top = scale[s] * scale[s] > top * top ? scale[s] : top;
    }
    k->d = half_scale(b, top / -128, k->d_half);
    k->dmin = half_scale(b, 0, k->dmin_half);
    round_scales(b, of, scale, none, k);
    refine(b, of, k);
}

/* The 12 bytes that kt_q4_k_scale reads. */
static void put_scales(const k_integers *k, uint8_t *bytes) {
    for (int s = 0; s < 4; s++) {
        int low = (int)k->scale[s], high = (int)k->scale[s + 4];
        int low_min = (int)k->minimum[s], high_min = (int)k->minimum[s + 4];
        bytes[s] = (uint8_t)(low | high >> 4 << 6);
        bytes[s + 4] = (uint8_t)(low_min | high_min >> 4 << 6);
        bytes[s + 8] = (uint8_t)((high & 15) | (high_min & 15) << 4);
    }
}

/* The integers as bytes, `plus` added. */
static void to_bytes(const k_integers *k, int plus, uint8_t q[K_BLOCK]) {
    for (int i = 0; i < K_BLOCK; i++) q[i] = (uint8_t)((int32_t)((const float *)k->q)[i] + plus);
}

int kt_quantize_q4_k(const float *x, size_t cols, kt_block_q4_k *block) {
    k_block b;
    k_integers k;
    for (; cols; cols -= K_BLOCK, x += K_BLOCK, block++) {
        int ready = open_block(x, Q4_K_RANGE.subs, &b);
        if (ready < 0) return KT_BAD_ARGUMENT;
        memset(block, 0, sizeof *block);
        if (!ready) continue;
        uint8_t q[K_BLOCK];
        affine(&b, &Q4_K_RANGE, &k);
        to_bytes(&k, 0, q);
        memcpy(block->d, k.d_half, 2);
        memcpy(block->dmin, k.dmin_half, 2);
        put_scales(&k, block->scales);
        for (int i = 0; i < 128; i++) {
            const uint8_t *from = q + i / 32 * 64 + i % 32;
            block->q[i] = (uint8_t)(from[0] | from[32] << 4);
        }
    }
    return KT_OK;
}

int kt_quantize_q5_k(const float *x, size_t cols, kt_block_q5_k *block) {
    k_block b;
    k_integers k;
    for (; cols; cols -= K_BLOCK, x += K_BLOCK, block++) {
        int ready = open_block(x, Q5_K_RANGE.subs, &b);
        if (ready < 0) return KT_BAD_ARGUMENT;
        memset(block, 0, sizeof *block);
        if (!ready) continue;
        uint8_t q[K_BLOCK];
        affine(&b, &Q5_K_RANGE, &k);
        to_bytes(&k, 0, q);
        memcpy(block->d, k.d_half, 2);
        memcpy(block->dmin, k.dmin_half, 2);
        put_scales(&k, block->scales);
        for (int i = 0; i < 128; i++) {
            const uint8_t *from = q + i / 32 * 64 + i % 32;
            block->low[i] = (uint8_t)((from[0] & 15) | from[32] << 4);
            block->high[i % 32] |= (uint8_t)((from[0] >> 4 | from[32] >> 4 << 1) << i / 32 * 2);
        }
    }
    return KT_OK;
}

int kt_quantize_q6_k(const float *x, size_t cols, kt_block_q6_k *block) {
    k_block b;
    k_integers k;
    for (; cols; cols -= K_BLOCK, x += K_BLOCK, block++) {
        int ready = open_block(x, Q6_K_RANGE.subs, &b);
        if (ready < 0) return KT_BAD_ARGUMENT;
        memset(block, 0, sizeof *block);
        if (!ready) continue;
        uint8_t q[K_BLOCK];
        symmetric(&b, &Q6_K_RANGE, &k);
        to_bytes(&k, 32, q);
        memcpy(block->d, k.d_half, 2);
        for (int s = 0; s < Q6_K_RANGE.subs; s++) block->scales[s] = (int8_t)k.scale[s];
        for (int i = 0; i < 128; i++) {
            const uint8_t *from = q + i / 64 * 128 + i % 64;
            block->low[i] = (uint8_t)((from[0] & 15) | from[64] << 4);
        }
        for (int i = 0; i < 64; i++) {
            const uint8_t *from = q + i / 32 * 128 + i % 32;
            block->high[i] = (uint8_t)(from[0] >> 4 | from[32] >> 4 << 2 | from[64] >> 4 << 4 | from[96] >> 4 << 6);
        }
    }
    return KT_OK;
}
