/* Products of inputs in bfloat16 and weights in e4m3, for linear_fp8.c, in vectors.
 *
 * A weight becomes bfloat16: its exponent and mantissa are shifted into place and the exponent's bias is raised; a table of eight
 * values serves exponent 0. A few rows (AVX2: one row) widen weights as they use them. For more rows, a chunk of inputs is widened once,
 * into a buffer that stays in the first cache, and serves all tiles of the block.
 */
#ifndef PITLANE_LINEAR_FP8_VECTORS_H
#define PITLANE_LINEAR_FP8_VECTORS_H

#include "linear_fp8.h"
#include "linear_products.h"

#define FP8_AHEAD 4096 /* bytes between a weight in use and the weight prefetched */
#define FP8_TILE (HAS_PAIRS ? 8 : 3) /* largest number of rows of a tile */

typedef void (*Fp8Tile)(const uint32_t *x, long stride, const uint8_t *w, long pairs, float *sums);

/* Add the products of a pair of inputs of each row, `stride` pairs apart, and the weights of FP8_PANEL outputs to the sums. is_wide: w is
 * bfloat16, widened before. */
TARGET INLINE void fp8_added(int rows, Floats *sums, const uint8_t *w, int is_wide, const uint32_t *x, long stride) {
    uint32_t inputs[2 * FP8_TILE];
#if HAS_PAIRS
    UNROLLED for (int m = 0; m < rows; m++)
        inputs[m] = x[m * stride];
    if (is_wide)
        pairs_added(rows, COLUMNS, sums, (const char *)w, inputs);
    else
        dots_added(rows, sums, widen_fp8(w), widen_fp8(w + 2 * LANES), inputs);
#else
    _Alignas(LINE) char weights[PAIR];
    UNROLLED for (int m = 0; m < rows; m++) {
        inputs[m] = x[m * stride] & 0xffff0000;
        inputs[rows + m] = x[m * stride] << 16;
    }
    UNROLLED for (int i = 0; !is_wide && i < COLUMNS; i++)
        put_words(weights + i * 4 * LANES, widen_fp8(w + i * 2 * LANES));
    floats_added(rows, COLUMNS, sums, is_wide ? (const char *)w : weights, inputs);
#endif
}

/* sums [COUNT][FP8_PANEL] += x [COUNT][pairs] times w. */
#define DEFINE_FP8(COUNT, IS_WIDE, NAME)                                                                                             \
    TARGET static void NAME##COUNT(const uint32_t *x, long stride, const uint8_t *w, long pairs, float *sums) {                      \
        Floats totals[COUNT * COLUMNS];                                                                                              \
        UNROLLED for (int i = 0; i < COUNT * COLUMNS; i++)                                                                           \
            totals[i] = load(sums + i * LANES);                                                                                      \
        for (long k = 0; k < pairs; k++, w += (IS_WIDE ? 4 : 2) * FP8_PANEL) {                                                       \
            if (!IS_WIDE)                                                                                                            \
                _mm_prefetch((const char *)w + FP8_AHEAD, _MM_HINT_T0);                                                              \
            fp8_added(COUNT, totals, w, IS_WIDE, x + k, stride);                                                                     \
        }                                                                                                                            \
        UNROLLED for (int i = 0; i < COUNT * COLUMNS; i++)                                                                           \
            put(sums + i * LANES, totals[i]);                                                                                        \
    }
DEFINE_FP8(1, 0, direct_)
DEFINE_FP8(1, 1, buffered_)
DEFINE_FP8(2, 1, buffered_)
DEFINE_FP8(3, 1, buffered_)
#if HAS_PAIRS
DEFINE_FP8(2, 0, direct_)
DEFINE_FP8(3, 0, direct_)
DEFINE_FP8(4, 0, direct_)
DEFINE_FP8(5, 0, direct_)
DEFINE_FP8(6, 0, direct_)
DEFINE_FP8(7, 0, direct_)
DEFINE_FP8(8, 0, direct_)
DEFINE_FP8(4, 1, buffered_)
DEFINE_FP8(5, 1, buffered_)
DEFINE_FP8(6, 1, buffered_)
DEFINE_FP8(7, 1, buffered_)
DEFINE_FP8(8, 1, buffered_)
static const Fp8Tile direct[] = {0, direct_1, direct_2, direct_3, direct_4, direct_5, direct_6, direct_7, direct_8};
static const Fp8Tile buffered[] = {0, buffered_1, buffered_2, buffered_3, buffered_4, buffered_5, buffered_6, buffered_7, buffered_8};
#else
static const Fp8Tile direct[] = {0, direct_1};
static const Fp8Tile buffered[] = {0, buffered_1, buffered_2, buffered_3};
#endif
enum { DIRECT_ROWS = sizeof direct / sizeof direct[0] - 1 };

/* sums [rows][FP8_PANEL] += x [rows], `stride` pairs apart, times up to FP8_CHUNK pairs of a panel. */
TARGET static void fp8_pairs(const uint32_t *x, long stride, const uint8_t *w, long pairs, long rows, float *sums) {
    _Alignas(64) uint8_t buffer[FP8_CHUNK * 4 * FP8_PANEL];
    if (rows <= DIRECT_ROWS) {
        direct[rows](x, stride, w, pairs, sums);
        return;
    }
    for (long at = 0; at < pairs * 2 * FP8_PANEL; at += 2 * LANES)
        put_words(buffer + 2 * at, widen_fp8(w + at));
    for (long m = 0; m < rows; m += FP8_TILE)
        buffered[minimum(rows - m, FP8_TILE)](x + m * stride, stride, buffer, pairs, sums + m * FP8_PANEL);
}

#endif
