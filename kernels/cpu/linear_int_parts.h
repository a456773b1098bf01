/* Shared by linear_int.c and the tiles of each level: what a level gives, and the layout of the prepared inputs. */
#ifndef PITLANE_LINEAR_INT_PARTS_H
#define PITLANE_LINEAR_INT_PARTS_H

#include "linear_int.h"

/* The prepared inputs of all rows. Rows come in tiles; a tile of n rows that starts at row r begins at r times the size of a row.
 * x: quantized: [ceil(ins / 4)][n] words of 4 signed bytes; else float [ins][n]. Zeros follow the last input.
 * sums: [groups][n] sums of a group's inputs, as the tiles want them: int32, or float with `symmetric` 0. scales: [rows]. */
typedef struct {
    char *x;
    int32_t *sums;
    float *scales;
    long row_bytes, groups;
} Prepared;

/* Compute the sums [n][16] of a panel for a tile of n rows. */
typedef void (*IntTile)(const IntLinear *job, const void *x, const void *sums, const uint8_t *w, float *out);

typedef struct {
    int rows; /* largest number of rows in a tile */
    void (*prepare)(const IntLinear *job, const Prepared *to, const void *x, long first, long count);
    void (*panels)(const IntLinear *job, const Prepared *from, void *y, long first, long count, long panel, long end);
} IntLevel;

extern const IntLevel int_plain, int_avx2, int_avx512;

#endif
