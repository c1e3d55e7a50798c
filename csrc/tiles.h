/* What the tile kernels share: the state of a thread, and tokens' rows as operands. */
#include <immintrin.h>

#include "internal.h"

enum {
    TILE = 16, TILE_BYTES = 1024, BLOCK = 2 * TILE, STRIP = 256, PANEL_BYTES = 640 << 10,
    C_TILE = TILE * TILE, C_BLOCK = 4 * C_TILE,           /* floats: [2 halves of 32 tokens][2 groups of rows][16][16] */
    C_BYTES = KT_TOKENS * KT_TILE_ROWS * sizeof(float),   /* blocks of all tokens and rows */
};

/* Columns of a panel, a multiple of `unit`, a column of which takes so many bytes: so many that it fills a third of a second-level
 * cache of 2 MiB, which two threads may share. Panels are alike. */
KT_INLINE size_t panel_cols(size_t column_bytes, size_t unit, size_t cols) {
    size_t most = PANEL_BYTES / column_bytes / unit * unit, panels = (cols + most - 1) / most;
    return kt_round_up((cols + panels - 1) / panels, unit);
}

/* Columns [first, ...) of two groups of rows: panels outermost, then matrices, pairs of groups, and a pair's items. */
typedef struct { size_t panel, m, g, first; } place;

/* Moves to the item that follows; 0 if there is none. */
KT_INLINE int following(const kt_dot *dot, size_t width, size_t item_cols, place *p) {
    size_t end = p->panel + width < dot->cols ? p->panel + width : dot->cols;
    if (p->panel >= dot->cols) return 0;
    if ((p->first += item_cols) < end) return 1;
    p->first = p->panel;
    if ((p->g += 2) < dot->n_groups) return 1;
    p->g = 0;
    if (++p->m < dot->n_matrices) return 1;
    p->m = 0;
    p->first = p->panel += width;
    return p->panel < dot->cols;
}

/* A pair's group; without a second one its results are not wanted. */
KT_INLINE const uint8_t *group_of(const kt_dot *dot, const place *p, int second) {
    size_t g = second && dot->n_groups - p->g > 1 ? p->g + 1 : p->g;
    return dot->w[p->m] + g * dot->group_bytes[p->m];
}

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
