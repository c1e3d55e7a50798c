/* Weights of any type, as bf16 in tiles: what moe_amx.c multiplies, filled a row of a tile at a time.
 *
 * FILLING     in float16, 32 weights at a time: an integer in the low bits of a float16 is that many 2^-24, so one
 *             multiply-add makes a weight of a code; two integer instructions make a bf16 of that, 2^-112 times as large.
 *             Activations are 2^64 times as large, so nothing underflows. Rows are scaled by a power of two, from the bound that
 *             is packed with them, so that float16 reaches. Out is scaled back.
 */
#include "avx512.h"
#include "lanes.h"
#include "tiles.h"

enum { STRIP_SPANS = STRIP / KT_SPAN, SPANS_AHEAD = 32 };

/* 2^-exponent of the bound: rows times this are below 2. */
KT_INLINE __m512 row_factor(const uint8_t *bound) {
    __m512i exponent = _mm512_and_si512(_mm512_loadu_si512(bound), _mm512_set1_epi32(0x7f800000));
    return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(254 << 23), exponent));
}
/* What out has to be multiplied by: the inverse, 2^112 for bf16_of_half, and KT_BF16_UNSCALE. */
KT_INLINE __m512 row_unfactor(const uint8_t *bound) {
    __m512i exponent = _mm512_and_si512(_mm512_loadu_si512(bound), _mm512_set1_epi32(0x7f800000));
    return _mm512_mul_ps(_mm512_castsi512_ps(exponent), _mm512_set1_ps(0x1p112f * KT_BF16_UNSCALE));
}

/* 2^-112 times each float16, as bf16: rounded to three bits less, with the exponent as it is and none of the sign's copies.
 * What has no exponent, below 2^-15 of the row's bound, has none in bf16 either, where tiles take it for 0. */
KT_INLINE __m512i bf16_of_half(__m512h half) {
    __m512i moved = _mm512_mulhrs_epi16((__m512i)half, _mm512_set1_epi16(1 << 12));
    return _mm512_and_si512(moved, _mm512_set1_epi16((short)0x8fff));
}

/* 16 floats as pairs of float16. */
KT_INLINE __m512h pairs_of(__m512 value) {
    const __m512i twice = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return (__m512h)_mm512_permutexvar_epi16(twice, _mm512_castsi256_si512(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)));
}

/* `bits` bits from bit `from` of each 16 to the top of a float16's mantissa. */
KT_INLINE __m512h placed(__m512i w, const int from, const int bits) {
    const int by = 10 - bits - from;
    const int mask = ((1 << bits) - 1) << (10 - bits);
    if (by > 0) w = _mm512_slli_epi16(w, by > 0 ? by : 0);
    if (by < 0) w = _mm512_srli_epi16(w, by < 0 ? -by : 0);
    return (__m512h)_mm512_and_si512(w, _mm512_set1_epi16((short)mask));
}

/* Row `r` of the tile of a span, columns 2 r and 2 r + 1 in the order of kt_bf16_column, whose scales and minima are given. */
KT_INLINE void fill_row(const int type, const int r, const uint8_t *span, __m512h scale, __m512h minimum, uint8_t *tile) {
    const int bits = kt_value_bits(type), e = r / 4, second = r % 2, upper = r % 4 / 2;
    __m512h value;
    if (type == KT_FP8_BLOCK128) {   /* in float16, exponents of e4m3 mean 2^-8 of what they mean there */
        __m512i w = _mm512_loadu_si512(span + (2 * e + second) * WORD_ROW);
        if (!upper) w = _mm512_slli_epi16(w, 8);
        w = _mm512_and_si512(_mm512_srai_epi16(w, 1), _mm512_set1_epi16((short)0xbf80));
        value = _mm512_mul_ph((__m512h)w, scale);
    } else if (bits == 4) {
        value = placed(_mm512_loadu_si512(span + e * WORD_ROW), 4 * second + 8 * upper, bits);
        value = _mm512_fmsub_ph(value, scale, minimum);
    } else {
        value = placed((__m512i)quad(type, span, 2 * e + second), 8 * upper, bits);
        value = _mm512_fmsub_ph(value, scale, minimum);
    }
    _mm512_store_si512(tile + r * 64, bf16_of_half(value));
}

/* The filling of an item, as far as it is: tiles of columns [first, first + 32 spans) of two groups of 16 rows. */
typedef struct filling {
    size_t at, spans;                              /* spans: filled, and all */
    int type;
    const uint8_t *group[2];
    struct { const uint8_t *codes, *scales, *bound; } after[2];   /* of the groups that follow: what is asked for in time */
    size_t all_cols, first, last;                  /* last: the end of the panel */
    uint8_t *tiles;                                /* [spans][2] */
    /* Of 256 columns. Scales of 6 bits, in bytes, and what they and minima are multiplied by, in pairs; or as floats. */
    __m512i scales6[2][2], minima6[2][2];
    __m512h d[2], dmin[2];
    __m512 scale_factor[2], factor[2];
    float scales[2][STRIP / 16][LANES] __attribute__((aligned(64))), minima[2][STRIP / 16][LANES] __attribute__((aligned(64)));
} filling;

/* Twice each number of 0 to 15, in bytes. */
KT_INLINE __m512i pair_bytes(void) {
    return _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909, 0x08080808,
                            0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
}

/* 16 float16 times a power of two, as pairs. */
KT_INLINE __m512h scaled_pairs(const uint8_t *halves, __m512 factor) {
    return pairs_of(_mm512_mul_ps((__m512)half_floats(halves), factor));
}

KT_INLINE int has_six_bits(const int type) { return type == KT_Q4_K || type == KT_Q5_K; }

/* Bytes 16 `run` and up of four runs, times d. */
KT_INLINE __m512h byte_pairs(__m512i bytes, size_t run, __m512h d) {
    const __m512i low = _mm512_add_epi8(pair_bytes(), _mm512_set1_epi8((char)(16 * run)));
    return _mm512_mul_ph(d, _mm512_cvtepu16_ph(_mm512_maskz_permutexvar_epi8(0x5555555555555555u, low, bytes)));
}

/* Scales of the 256 columns from `first`, of rows scaled by row_factor: so far that a run is quick to open. */
KT_INLINE void open_strip(const int type, filling *f, const int second, size_t first) {
    const uint8_t *group = f->group[second], *bound = group + kt_group_bytes(type, f->all_cols) - 64, *scales = group + kt_codes_bytes(type, f->all_cols);
    const __m512 factor = row_factor(bound);
    const __m512 scale_factor = _mm512_mul_ps(factor, _mm512_set1_ps(type == KT_FP8_BLOCK128 ? 256.0f : (float)(1 << (14 + kt_value_bits(type)))));
    if (has_six_bits(type)) {
        const uint8_t *unit = scales + first / 256 * kt_scale_unit_bytes(type);
        const __m512i v0 = _mm512_loadu_si512(unit + 64), v1 = _mm512_loadu_si512(unit + 128), v2 = _mm512_loadu_si512(unit + 192);
        const __m512i six = _mm512_set1_epi8(63), two = _mm512_set1_epi8(3), four = _mm512_set1_epi8(12), top = _mm512_set1_epi8(48);
        f->d[second] = scaled_pairs(unit, scale_factor), f->dmin[second] = scaled_pairs(unit + 32, factor);
        f->scales6[second][0] = _mm512_and_si512(v0, six), f->scales6[second][1] = _mm512_and_si512(v1, six), f->minima6[second][0] = _mm512_and_si512(v2, six);
        f->minima6[second][1] = _mm512_or_si512(_mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(v0, 6), two), _mm512_and_si512(_mm512_srli_epi16(v1, 4), four)),
                                                _mm512_and_si512(_mm512_srli_epi16(v2, 2), top));
        return;
    }
    const size_t cols = f->all_cols - first < STRIP ? f->all_cols - first : STRIP;
    f->scale_factor[second] = scale_factor, f->factor[second] = factor;
    expand_scales(type, scales, 0, first, cols, LANES, f->scales[second][0], f->minima[second][0]);
}

/* Scale and minimum of a run of these columns, as float16 pairs. */
KT_INLINE void open_run(const int type, const filling *f, const int second, size_t run, __m512h *scale, __m512h *minimum) {
    if (has_six_bits(type)) {
        *scale = byte_pairs(f->scales6[second][run / 4], run % 4, f->d[second]);
        *minimum = byte_pairs(f->minima6[second][run / 4], run % 4, f->dmin[second]);
    } else {
        *scale = pairs_of(_mm512_mul_ps(_mm512_load_ps(f->scales[second][run]), f->scale_factor[second]));
        *minimum = pairs_of(_mm512_mul_ps(_mm512_load_ps(f->minima[second][run]), f->factor[second]));
    }
}

/* The span that is being filled. */
typedef struct { const uint8_t *span[2]; __m512h scales[2][2], minima[2][2]; uint8_t *tiles; } span_filling;

/* Asks for codes, and at the beginning of 256 columns for scales, of spans further on. */
KT_INLINE void ask_ahead(const int type, const filling *f, const int second, size_t span) {
    const size_t span_bytes = kt_span_bytes(type), further = span + SPANS_AHEAD, left = f->last / KT_SPAN;
    const uint8_t *codes = further < left ? f->group[second] + further * span_bytes : f->after[second].codes + (further - left) * span_bytes;
    KT_UNROLL for (size_t line = 0; line < span_bytes; line += 64) _mm_prefetch((const char *)codes + line, _MM_HINT_T1);
    if (kt_is_float(type) || f->at % STRIP_SPANS) return;
    const size_t bytes = STRIP / kt_scale_columns(type) * kt_scale_unit_bytes(type), strip = further / STRIP_SPANS, strips = left / STRIP_SPANS;
    const uint8_t *scales = strip < strips ? f->group[second] + kt_codes_bytes(type, f->all_cols) + strip * bytes : f->after[second].scales + (strip - strips) * bytes;
    KT_UNROLL for (size_t line = 0; line < bytes + 63; line += 64) _mm_prefetch((const char *)scales + line, _MM_HINT_T0);
    if (strip == strips) _mm_prefetch((const char *)f->after[second].bound, _MM_HINT_T0);
}

/* Begins with the next span. */
KT_INLINE span_filling begin_span(const int type, filling *f) {
    const size_t runs = KT_SPAN / kt_run(type), at = f->first / KT_SPAN + f->at, in_strip = f->at % STRIP_SPANS;
    span_filling s = {.tiles = f->tiles + 2 * f->at * TILE_BYTES};
    KT_UNROLL for (int second = 0; second < 2; second++) {
        ask_ahead(type, f, second, at);
        if (type == KT_BF16) continue;
        if (in_strip == 0) open_strip(type, f, second, at * KT_SPAN);
        s.span[second] = f->group[second] + at * kt_span_bytes(type);
        KT_UNROLL for (size_t i = 0; i < runs; i++) open_run(type, f, second, in_strip * runs + i, &s.scales[second][i], &s.minima[second][i]);
    }
    f->at++;
    return s;
}

/* Rows [from, from + n) of its two tiles, of 32. Tiles of bf16 are used where they lie. */
KT_INLINE void fill_rows(const int type, const span_filling *s, const int from, const int n) {
    if (type == KT_BF16) return;
    KT_UNROLL for (int i = from; i < from + n; i++) {
        const int second = i / TILE, r = i % TILE, run = r >= TILE / 2 && kt_run(type) == 16;
        fill_row(type, r, s->span[second], s->scales[second][run], s->minima[second][run], s->tiles + second * TILE_BYTES);
    }
}

KT_INLINE void fill_span(const int type, filling *f) {
    const span_filling s = begin_span(type, f);
    fill_rows(type, &s, 0, TILE);
    fill_rows(type, &s, TILE, TILE);
}
