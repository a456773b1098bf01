/* Shared by the files of the bfloat16 linear: the job, and the conversion of sums into outputs. */
#ifndef PITLANE_LINEAR_PARTS_H
#define PITLANE_LINEAR_PARTS_H

#include "linear_bf16.h"
#include "threads.h"
#include "vectors.h"

#if defined(PITLANE_VECTORS)
#define OUTS 32 /* outputs of a panel */
#define LINE 64 /* bytes */
#define PAIR (2 * LINE) /* bytes of a panel's weights for one pair of inputs */

typedef struct {
    const uint32_t *x; /* pairs of inputs [rows][pairs] */
    const char *w;
    const uint16_t *bias;
    void *y;
    uint32_t *packed; /* x as `prepare_rows` writes it, or NULL */
    long rows, outs, pairs, panels;
    long chunk, block; /* largest numbers of panels and of rows that a thread takes at a time */
    long parts; /* number of parts of the inputs; a call of `prepare_rows` packs one part */
    int products; /* BY_VECTORS, BY_TILES or BY_FLOATS */
    int wide; /* y is float32, else bfloat16 */
    Phase packing, multiplying;
} Job;

/* Compute the outputs of panels [panel, end) for rows [first, first + rows), by the products of the job. */
void multiply_panels(const Job *job, long first, long rows, long panel, long end);
enum { STREAM_ROWS = 2, VECTOR_ROWS = 192, VECTOR_PANELS = 8, TILE_ROWS = 512, TILE_PANELS = 4 };

/* Write a part of the inputs to `packed` if the products need it. */
void prepare_rows(const Job *job, long part);

/* `multiply_panels` by AVX-512's vectors (BY_VECTORS, BY_FLOATS), and by AMX's tiles, up to TILE_PANELS panels at a time. */
void by_vectors(const Job *job, long first, long rows, long panel, long end);
void by_tiles(const Job *job, long first, long rows, long panel, long end);

INLINE long minimum(long a, long b) { return a < b ? a : b; }
INLINE long ceil_divide(long a, long b) { return (a + b - 1) / b; }

/* Add the bias to a row's sums [OUTS] of one panel and write them as outputs. */
TARGET INLINE void store(const Job *job, const float *sums, long row, long panel) {
    long left = job->outs - panel * OUTS;
    __mmask32 mask = left < OUTS ? ((__mmask32)1 << left) - 1 : ~(__mmask32)0;
    __m512 low = _mm512_loadu_ps(sums), high = _mm512_loadu_ps(sums + 16);
    if (job->bias) {
        __m512i bias = _mm512_maskz_loadu_epi16(mask, job->bias + panel * OUTS);
        low = _mm512_add_ps(low, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bias)), 16));
        high = _mm512_add_ps(high, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bias, 1)), 16));
    }
    long at = row * job->outs + panel * OUTS;
    if (job->wide) {
        _mm512_mask_storeu_ps((float *)job->y + at, (__mmask16)mask, low);
        _mm512_mask_storeu_ps((float *)job->y + at + 16, (__mmask16)(mask >> 16), high);
        return;
    }
    _mm512_mask_storeu_epi16((uint16_t *)job->y + at, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

#endif
#endif
