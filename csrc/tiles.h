/* What the two tile kernels share: the state of a thread, and 2 x 2 blocks of tiles through a panel of columns. */
#include <immintrin.h>

#include "internal.h"

enum { TILE = 16, TILE_BYTES = 1024, BLOCK = 2 * TILE };

static void begin(void) {
    struct { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = TILE;
    __asm__ volatile("" : : "r"(&config) : "memory");  /* as stores_before_tiles, for a local variable */
    _tile_loadconfig(&config);
}

static void end(void) { _tile_release(); }

/* gcc 12 does not say of ldtilecfg and tileloadd that they read memory: without this, stores may move past them. */
KT_INLINE void stores_before_tiles(void) { __asm__ volatile("" : : : "memory"); }

/* A block's operands: A [32 tokens][columns], rows a_stride apart; B two runs of tiles of 16 weight rows, one tile a step. */
typedef struct {
    const uint8_t *a, *b0, *b1;
    size_t a_stride_bytes, steps;
} tile_block;

/* C tile number: 2 * (token half) + (row half); A tiles are 4 and 5, B tiles 6 and 7. Loads between products: while one
 * product runs, the next operand comes from the cache. */
#define BLOCK_2X2(PRODUCT, block) \
    do { \
        const uint8_t *a_ = (block)->a, *b0_ = (block)->b0, *b1_ = (block)->b1; \
        const size_t stride_ = (block)->a_stride_bytes; \
        for (size_t step_ = 0; step_ < (block)->steps; step_++, a_ += 64, b0_ += TILE_BYTES, b1_ += TILE_BYTES) { \
            _tile_loadd(6, b0_, 64); \
            _tile_stream_loadd(4, a_, stride_); \
            PRODUCT(0, 4, 6); \
            _tile_loadd(7, b1_, 64); \
            PRODUCT(1, 4, 7); \
            _tile_stream_loadd(5, a_ + TILE * stride_, stride_); \
            PRODUCT(2, 5, 6); \
            PRODUCT(3, 5, 7); \
        } \
    } while (0)

/* The last 16 tokens, where there are no 32. */
#define BLOCK_1X2(PRODUCT, block) \
    do { \
        const uint8_t *a_ = (block)->a, *b0_ = (block)->b0, *b1_ = (block)->b1; \
        for (size_t step_ = 0; step_ < (block)->steps; step_++, a_ += 64, b0_ += TILE_BYTES, b1_ += TILE_BYTES) { \
            _tile_loadd(4, a_, (block)->a_stride_bytes); \
            _tile_loadd(6, b0_, 64); \
            PRODUCT(0, 4, 6); \
            _tile_loadd(7, b1_, 64); \
            PRODUCT(1, 4, 7); \
        } \
    } while (0)

/* Tokens' columns [col, col + cols) as rows stride_bytes apart: gathered, or where they lie if they are neighbours. */
KT_INLINE const uint8_t *gather(const kt_dot *dot, size_t first_byte, size_t n_bytes, uint8_t *to, size_t *stride_bytes) {
    if (!dot->index) {
        *stride_bytes = dot->act_stride_bytes;
        return dot->acts + first_byte;
    }
    for (size_t t = 0; t < dot->n_tokens; t++) memcpy(to + t * *stride_bytes, kt_act_row(dot, t) + first_byte, n_bytes);
    return to;
}
