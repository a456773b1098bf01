/* The functions that are compiled once for every set of vector instructions: lanes_avx2.h and lanes_avx512.h.
 *
 * PITLANE_VECTORS is defined if this build can compile them. */
#ifndef PITLANE_VECTORS_H
#define PITLANE_VECTORS_H

#include <stdint.h>

#include "attention_bf16.h"
#include "linear_parts.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define PITLANE_VECTORS
#endif

typedef struct Vectors {
    int has_pairs; /* whether `panels` has BY_VECTORS */
    /* linear_vectors.h */
    void (*prepare)(const Job *job, long part);
    void (*panels)(const Job *job, long first, long rows, long panel, long end);
    /* linear_fp8_vectors.h: sums [rows][FP8_PANEL] += x [rows][stride] times `pairs` pairs of a panel */
    void (*fp8_pairs)(const uint32_t *x, long stride, const uint8_t *w, long pairs, long rows, float *sums);
    /* attention_pieces.h */
    void (*attention_item)(const Attention *job, long item, long following);
    void (*attention_merge)(const Attention *job, long index);
    /* ops_rows.h */
    void (*rms_norm_row)(const void *x, const uint16_t *w, uint16_t *y, int64_t dim, float eps, int wide);
    void (*silu_mul_row)(const uint16_t *gates, const uint16_t *ups, uint16_t *y, int64_t dim);
    /* step_outputs.h */
    void (*add_columns)(const float *x, const float *y, float *sum, long rows, long stride, long begin, long end);
    void (*turn_head)(const uint16_t *x, uint16_t *y, long dim, const uint16_t *weight, float eps, const uint16_t *cos,
                      const uint16_t *sin);
} Vectors;

/* The best functions for this CPU, of at most the level that PITLANE_CPU_KERNELS names; NULL: there are none. */
const Vectors *vectors(void);

/* Their level: LEVEL_PLAIN if there are none. */
int vectors_level(void);

#if defined(PITLANE_VECTORS)
#include <immintrin.h>

extern const Vectors vectors_avx2, vectors_avx512;
#endif

#endif
