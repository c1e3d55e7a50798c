/* What the tile kernels share: the state of a thread, and tokens' rows as operands. */
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

/* Tokens' columns [col, col + cols) as rows stride_bytes apart: gathered, or where they lie if they are neighbours. */
KT_INLINE const uint8_t *gather(const kt_dot *dot, size_t first_byte, size_t n_bytes, uint8_t *to, size_t *stride_bytes) {
    if (!dot->index) {
        *stride_bytes = dot->act_stride_bytes;
        return dot->acts + first_byte;
    }
    for (size_t t = 0; t < dot->n_tokens; t++) memcpy(to + t * *stride_bytes, kt_act_row(dot, t) + first_byte, n_bytes);
    return to;
}
