/* Products of pairs of inputs with a panel, shared by linears and attention scores. Also writes the outputs of a linear. */
#ifndef PITLANE_LINEAR_PRODUCTS_H
#define PITLANE_LINEAR_PRODUCTS_H

#include "linear_parts.h"

#define COLUMNS (OUTS / LANES) /* vectors of the sums of a row */
/* Vectors of a row that a loop over the inputs computes: all, or half of them if the sums of all would not fit in registers. */
#define WIDTH_OF(rows) ((rows) * COLUMNS <= MAX_SUMS ? COLUMNS : COLUMNS / 2)
#define MAX_TILE (MAX_SUMS / 2) /* rows */

/* Add the products of a pair of inputs and the weights of `width` vectors of outputs to the sums [rows][width]. w: the pairs of these
 * outputs. x: [2][rows] float32, the second numbers of the pairs first. */
TARGET INLINE void floats_added(int rows, int width, Floats *sums, const char *w, const uint32_t *x) {
    const uint32_t *second = x, *first = x + rows;
    UNROLLED for (int i = 0; i < width; i += 2) {
        Floats weights[2] = {seconds(w + i * 4 * LANES), seconds(w + (i + 1) * 4 * LANES)};
        UNROLLED for (int m = 0; m < rows; m++)
            accumulate_two(sums + m * width + i, weights, second + m);
    }
    UNROLLED for (int i = 0; i < width; i += 2) {
        Floats weights[2] = {firsts(w + i * 4 * LANES), firsts(w + (i + 1) * 4 * LANES)};
        UNROLLED for (int m = 0; m < rows; m++)
            accumulate_two(sums + m * width + i, weights, first + m);
    }
}

#if HAS_PAIRS
/* The same by dot products, with x: [rows] pairs. first, second: the pairs of 16 outputs each. */
TARGET INLINE void dots_added(int rows, Floats *sums, Words first, Words second, const uint32_t *x) {
    UNROLLED for (int m = 0; m < rows; m++) {
        __m512bh pair = (__m512bh)all_words(x[m]);
        sums[2 * m] = _mm512_dpbf16_ps(sums[2 * m], (__m512bh)first, pair);
        sums[2 * m + 1] = _mm512_dpbf16_ps(sums[2 * m + 1], (__m512bh)second, pair);
    }
}

TARGET INLINE void pairs_added(int rows, int width, Floats *sums, const char *w, const uint32_t *x) {
    (void)width;
    dots_added(rows, sums, load_words(w), load_words(w + LINE), x);
}
#endif

/* Add the bias to a row's sums [OUTS] of one panel and write them as outputs. */
TARGET INLINE void put_outputs(const Job *job, const float *sums, long row, long panel) {
    for (long out = panel * OUTS, end = minimum(out + OUTS, job->outs); out < end; out += LANES, sums += LANES) {
        Floats value = load(sums);
        if (job->bias)
            value = add(value, widen_part(job->bias + out, end - out));
        if (job->wide)
            put_part((float *)job->y + row * job->outs + out, value, end - out);
        else
            put_bf16_part((uint16_t *)job->y + row * job->outs + out, value, end - out);
    }
}

#endif
