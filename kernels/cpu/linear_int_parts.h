/* Shared by linear_int.c and the tiles of each level: what a level gives, and the layout of the prepared inputs. */
#ifndef PITLANE_LINEAR_INT_PARTS_H
#define PITLANE_LINEAR_INT_PARTS_H

#include "linear_int.h"

/* The prepared inputs of all rows. Rows come in tiles; a tile of n rows that starts at row r begins at r times the size of a row.
 * x: quantized: [ceil(ins / 4)][n] words of 4 signed bytes; else float [ins][n]. Zeros follow the last input.
 * sums: [groups][n] what a group's sum starts with, int32: -128 or -8 times the sum of its inputs; with `symmetric` 0 instead the
 * sum of the group's inputs, float. scales: [groups][n], if quantized. */
typedef struct {
    char *x;
    int32_t *sums;
    float *scales;
    long row_bytes, groups;
} Prepared;

enum { WIDE_TILES = 16 };

/* Divide `all` into n shares of about equal size: share i is [share(all, n, i), share(all, n, i + 1)). */
static inline long share(long all, long n, long i) { return all * i / n; }

/* Compute the sums [n][16] of a panel for a tile of n rows. */
typedef void (*IntTile)(const IntLinear *job, const void *x, const void *sums, const float *scales, const uint8_t *w, long ahead,
                        float *out);

/* Bytes between the weights in use and the weights prefetched, for a tile of some rows. Weights of 8 bits are prefetched into the second
 * cache, of 4 bits into the first. */
long prefetch_distance(int bits, long rows);

typedef struct {
    int rows; /* largest number of rows in a tile */
    void (*prepare)(const IntLinear *job, const Prepared *to, const void *x, long first, long count);
    void (*panels)(const IntLinear *job, const Prepared *from, void *y, long first, long count, long panel, long end);
    /* NULL, or the same for the tiles [tile, last) of `tiles` tiles of all rows: 2 to WIDE_TILES tiles of quantized inputs, a multiple
     * of 8 inputs, an even number of panels. */
    void (*wide)(const IntLinear *job, const Prepared *from, void *y, long rows, long tiles, long tile, long last, long panel, long end);
} IntLevel;

extern const IntLevel int_plain, int_avx2, int_avx512, int_amx;

/* Whether AMX's tiles compute a job with some rows; AVX-512 computes the other jobs of its level, to the same bits. */
int int_amx_serves(const IntLinear *job, long rows);

/* Write the outputs of a panel, sums * scales + bias: sums [count][stride], of the rows from `first` on. By AVX-512. */
void int_finish_panel(const IntLinear *job, const float *sums, long stride, void *y, long first, long count, long panel);

#endif
