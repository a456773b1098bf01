/* Shared by the files of the bfloat16 linear: the job, and the sizes of panels and blocks. */
#ifndef PITLANE_LINEAR_PARTS_H
#define PITLANE_LINEAR_PARTS_H

#include "linear_bf16.h"
#include "threads.h"

#define OUTS 32 /* outputs of a panel */
#define LINE 64 /* bytes */
#define PAIR (2 * LINE) /* bytes of a panel's weights for one pair of inputs */

struct Vectors;

typedef struct {
    const struct Vectors *vectors;
    const uint32_t *x; /* pairs of inputs [rows][pairs] */
    const char *w;
    const uint16_t *bias;
    void *y;
    uint32_t *packed; /* x as `prepare` of the vectors writes it, or NULL */
    long rows, outs, pairs, panels;
    long chunk, block; /* largest numbers of panels and of rows that a thread takes at a time */
    long parts; /* number of parts of the inputs; a call of `prepare` packs one part */
    int products; /* BY_VECTORS, BY_TILES or BY_FLOATS */
    int wide; /* y is float32, else bfloat16 */
    Phase packing, multiplying;
} Job;

/* Compute the outputs of panels [panel, end) for rows [first, first + rows), by the products of the job. */
void multiply_panels(const Job *job, long first, long rows, long panel, long end);
enum { STREAM_ROWS = 2, VECTOR_ROWS = 192, VECTOR_PANELS = 8, TILE_ROWS = 512, TILE_PANELS = 4 };

/* `multiply_panels` by AMX's tiles, up to TILE_PANELS panels at a time. */
void by_tiles(const Job *job, long first, long rows, long panel, long end);

static inline long minimum(long a, long b) { return a < b ? a : b; }
static inline long maximum(long a, long b) { return a > b ? a : b; }
static inline long ceil_divide(long a, long b) { return (a + b - 1) / b; }

#endif
