/* The tiles of one level. The including file defines TARGET, INLINE, UNROLL, ROWS_OF_TILE (2, 4 or 12), LEVEL and these operations on vectors of 16:
 *   VI (int32), VF (float); ints(v), floats(v): all lanes v; line(p): load 64 bytes; halves(p): load 16 float16;
 *   dot(sums, bytes, word): sums += the 4 unsigned bytes of a lane times the 4 signed bytes of word; dot_small: bytes below 16;
 *   low_nibbles(v), high_nibbles(v); byte_value(v, j): byte j - 128 as float; nibble_value(v, j, table): nibble j by a table of VF;
 *   nibble_table(offset): a table of n - offset; to_float(v); fused(a, b, c) = a b + c; add(a, b), times(a, b); save(p, v);
 *   fetch(p), fetch_far(p): prefetch into the first and the second cache; with WIDE_ROWS also dot_vectors(sums, bytes, words), load(p),
 *   save_line(p, v).
 *
 * A tile is a few rows of inputs times a panel. Sums within a group are integers if inputs are quantized, else chains over a group (4
 * bits) or over 32 inputs (8 bits); they are added in the order of the groups. The processor works on several chains at once. The loops test
 * their end last: with a loop that may run zero times, gcc 12 copies all sums in every turn.
 */
#include "linear_int_parts.h"

#include <string.h>

#define CHAIN 8 /* lines in a chain, with 8 bits */

INLINE long smaller(long a, long b) { return a < b ? a : b; }

#define DEFINE_TILES(ROWS)                                                                                                           \
    TARGET static void bytes_quantized_##ROWS(const IntLinear *job, const void *inputs, const void *group_sums,                      \
                                              const float *scales, const uint8_t *w, long ahead, float *out) {                       \
        const uint32_t *x = inputs;                                                                                                  \
        const int32_t *sums = group_sums;                                                                                            \
        VF total[ROWS];                                                                                                              \
        UNROLL for (int m = 0; m < ROWS; m++) total[m] = floats(0);                                                                  \
        for (long left = (job->ins + 3) / 4, lines = job->group / 4; left > 0; left -= lines, sums += ROWS, scales += ROWS) {        \
            VI acc[ROWS];                                                                                                            \
            UNROLL for (int m = 0; m < ROWS; m++) acc[m] = ints(sums[m]);                                                            \
            long end = smaller(left, lines);                                                                                         \
            do {                                                                                                                     \
                VI bytes = line(w);                                                                                                  \
                fetch_far(w + ahead);                                                                                                \
                UNROLL for (int m = 0; m < ROWS; m++) acc[m] = dot(acc[m], bytes, x[m]);                                             \
                x += ROWS, w += 64;                                                                                                  \
            } while (--end > 0);                                                                                                     \
            UNROLL for (int m = 0; m < ROWS; m++) total[m] = fused(to_float(acc[m]), floats(scales[m]), total[m]);                   \
        }                                                                                                                            \
        UNROLL for (int m = 0; m < ROWS; m++) save(out + 16 * m, total[m]);                                                          \
    }                                                                                                                                \
    TARGET static void bytes_float_##ROWS(const IntLinear *job, const void *inputs, const void *group_sums,                          \
                                              const float *scales, const uint8_t *w, long ahead, float *out) {                       \
        const float *x = inputs;                                                                                                     \
        VF total[ROWS];                                                                                                              \
        (void)group_sums, (void)scales;                                                                                              \
        UNROLL for (int m = 0; m < ROWS; m++) total[m] = floats(0);                                                                  \
        for (long left = (job->ins + 3) / 4; left > 0; left -= CHAIN) {                                                              \
            VF acc[ROWS];                                                                                                            \
            UNROLL for (int m = 0; m < ROWS; m++) acc[m] = floats(0);                                                                \
            long end = smaller(left, CHAIN);                                                                                         \
            do {                                                                                                                     \
                VI bytes = line(w);                                                                                                  \
                fetch_far(w + ahead);                                                                                                \
                UNROLL for (int j = 0; j < 4; j++) {                                                                                 \
                    VF value = byte_value(bytes, j);                                                                                 \
                    UNROLL for (int m = 0; m < ROWS; m++) acc[m] = fused(value, floats(x[j * ROWS + m]), acc[m]);                    \
                }                                                                                                                    \
                x += 4 * ROWS, w += 64;                                                                                              \
            } while (--end > 0);                                                                                                     \
            UNROLL for (int m = 0; m < ROWS; m++) total[m] = add(total[m], acc[m]);                                                  \
        }                                                                                                                            \
        UNROLL for (int m = 0; m < ROWS; m++) save(out + 16 * m, total[m]);                                                          \
    }                                                                                                                                \
    TARGET static void nibbles_quantized_##ROWS(const IntLinear *job, const void *inputs, const void *group_sums,                    \
                                              const float *scales, const uint8_t *w, long ahead, float *out) {                       \
        const uint32_t *x = inputs;                                                                                                  \
        const int32_t *sums = group_sums;                                                                                            \
        const uint8_t *halves_ = w;                                                                                                  \
        long groups = job->ins / job->group, lines = job->group / 8, header = job->symmetric ? 64 : 128;                             \
        VF total[ROWS];                                                                                                              \
        UNROLL for (int m = 0; m < ROWS; m++) total[m] = floats(0);                                                                  \
        for (long g = 0; g < groups; g++, sums += ROWS, scales += ROWS) {                                                            \
            VI acc[ROWS];                                                                                                            \
            if (g % 2 == 0)                                                                                                          \
                halves_ = w, w += header;                                                                                            \
            UNROLL for (int m = 0; m < ROWS; m++) acc[m] = ints(job->symmetric ? sums[m] : 0);                                       \
            long i = lines;                                                                                                          \
            do {                                                                                                                     \
                VI both = line(w), low = low_nibbles(both), high = high_nibbles(both);                                               \
                fetch(w + ahead);                                                                                                    \
                UNROLL for (int m = 0; m < ROWS; m++) acc[m] = dot_small(acc[m], low, x[m]);                                         \
                UNROLL for (int m = 0; m < ROWS; m++) acc[m] = dot_small(acc[m], high, x[ROWS + m]);                                 \
                x += 2 * ROWS, w += 64;                                                                                              \
            } while (--i > 0);                                                                                                       \
            VF scale = halves(halves_ + g % 2 * 32);                                                                                 \
            UNROLL for (int m = 0; m < ROWS; m++) total[m] = fused(times(to_float(acc[m]), scale), floats(scales[m]), total[m]);     \
            if (!job->symmetric) {                                                                                                   \
                VF low = halves(halves_ + 64 + g % 2 * 32);                                                                          \
                UNROLL for (int m = 0; m < ROWS; m++) total[m] = fused(low, floats(((const float *)sums)[m]), total[m]);             \
            }                                                                                                                        \
        }                                                                                                                            \
        UNROLL for (int m = 0; m < ROWS; m++) save(out + 16 * m, total[m]);                                                          \
    }                                                                                                                                \
    TARGET static void nibbles_float_##ROWS(const IntLinear *job, const void *inputs, const void *group_sums,                        \
                                              const float *scales, const uint8_t *w, long ahead, float *out) {                       \
        const float *x = inputs, *sums = group_sums;                                                                                 \
        const uint8_t *halves_ = w;                                                                                                  \
        long groups = job->ins / job->group, lines = job->group / 8, header = job->symmetric ? 64 : 128;                             \
        (void)scales;                                                                                                                \
        VF total[ROWS], table = nibble_table(job->symmetric ? 8.0f : 0.0f);                                                          \
        UNROLL for (int m = 0; m < ROWS; m++) total[m] = floats(0);                                                                  \
        for (long g = 0; g < groups; g++, sums += ROWS) {                                                                            \
            VF acc[ROWS];                                                                                                            \
            if (g % 2 == 0)                                                                                                          \
                halves_ = w, w += header;                                                                                            \
            UNROLL for (int m = 0; m < ROWS; m++) acc[m] = floats(0);                                                                \
            long i = lines;                                                                                                          \
            do {                                                                                                                     \
                VI both = line(w);                                                                                                   \
                fetch(w + ahead);                                                                                                    \
                UNROLL for (int j = 0; j < 8; j++) {                                                                                 \
                    VF value = nibble_value(both, j, table);                                                                         \
                    UNROLL for (int m = 0; m < ROWS; m++) acc[m] = fused(value, floats(x[j * ROWS + m]), acc[m]);                    \
                }                                                                                                                    \
                x += 8 * ROWS, w += 64;                                                                                              \
            } while (--i > 0);                                                                                                       \
            VF scale = halves(halves_ + g % 2 * 32);                                                                                 \
            UNROLL for (int m = 0; m < ROWS; m++) total[m] = fused(acc[m], scale, total[m]);                                         \
            if (!job->symmetric) {                                                                                                   \
                VF low = halves(halves_ + 64 + g % 2 * 32);                                                                          \
                UNROLL for (int m = 0; m < ROWS; m++) total[m] = fused(low, floats(sums[m]), total[m]);                              \
            }                                                                                                                        \
        }                                                                                                                            \
        UNROLL for (int m = 0; m < ROWS; m++) save(out + 16 * m, total[m]);                                                          \
    }

DEFINE_TILES(1)
DEFINE_TILES(2)
#if ROWS_OF_TILE > 2
DEFINE_TILES(3)
DEFINE_TILES(4)
#endif
#if ROWS_OF_TILE > 4
DEFINE_TILES(5)
DEFINE_TILES(6)
DEFINE_TILES(7)
DEFINE_TILES(8)
DEFINE_TILES(9)
DEFINE_TILES(10)
DEFINE_TILES(11)
DEFINE_TILES(12)
#define ALL_ROWS(kind)                                                                                                               \
    {0, kind##_1, kind##_2, kind##_3, kind##_4, kind##_5, kind##_6, kind##_7, kind##_8, kind##_9, kind##_10, kind##_11, kind##_12}
#elif ROWS_OF_TILE == 4
#define ALL_ROWS(kind) {0, kind##_1, kind##_2, kind##_3, kind##_4}
#else
#define ALL_ROWS(kind) {0, kind##_1, kind##_2}
#endif

/* By whether the weights are nibbles and whether the inputs are quantized. */
static const IntTile tiles[2][2][ROWS_OF_TILE + 1] = {{ALL_ROWS(bytes_float), ALL_ROWS(bytes_quantized)},
                                                      {ALL_ROWS(nibbles_float), ALL_ROWS(nibbles_quantized)}};

#include "linear_int_rows.h"

/* Rows [first, first + count) are one tile. */
TARGET static void panels(const IntLinear *job, const Prepared *from, void *y, long first, long count, long panel, long end) {
    IntTile tile = tiles[job->bits == 4][job->quantized != 0][count];
    const char *x = from->x + first * from->row_bytes;
    const int32_t *sums = from->sums + first * from->groups;
    const float *scales = from->scales + first * from->groups;
    long ahead = prefetch_distance(job->bits, count);
    size_t stride = int_panel_bytes(job);
    for (; panel < end; panel++) {
        _Alignas(64) float out[ROWS_OF_TILE * INT_PANEL];
        tile(job, x, sums, scales, job->w + (size_t)panel * stride, ahead, out);
        finish_panel(job, out, INT_PANEL, y, first, count, panel);
    }
}

#ifdef WIDE_ROWS
#include "linear_int_wide.h"
#else
#define wide 0
#endif

const IntLevel LEVEL = {ROWS_OF_TILE, prepare, panels, wide};
