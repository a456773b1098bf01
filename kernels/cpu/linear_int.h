/* Linear with weights of 8 or 4 bits: y [rows, outs] = x [rows, ins] W^T + bias.
 *
 * A panel is 16 outputs. A line is 64 bytes: 16 outputs times 4 (8 bits) or 8 (4 bits) consecutive inputs. So a vector lane owns an
 * output, an input is broadcast to all lanes, and a thread reads its weights in one stream.
 *
 * 8 bits: w [panels][ceil(ins / 4)][16][4], a byte is q + 128; W = q * scales[output].
 * 4 bits: the inputs are cut into groups. A panel holds its groups in pairs; the last pair may have a single group. A pair is a line
 * of float16 scales [2][16], with `symmetric` 0 a line of float16 lows [2][16], and the nibbles [group / 8 lines][16][4] of each
 * group. The low nibbles of a line are inputs 0 to 3, the high nibbles inputs 4 to 7. A nibble n stands for
 * W = unit * scale * (n - 8), or with `symmetric` 0 for W = unit * (scale * n + low).
 *
 * A row's result has the same bits for any number of rows and threads: its sums are added in a fixed order.
 */
#ifndef PITLANE_LINEAR_INT_H
#define PITLANE_LINEAR_INT_H

#include <stddef.h>
#include <stdint.h>

#include "levels.h"

enum { INT_PANEL = 16 };
enum { INT_BF16, INT_FLOATS, INT_FLOAT_OUTPUTS }; /* x and y: bfloat16; float32; bfloat16 and float32 */

typedef struct {
    const uint8_t *w;    /* 64-byte aligned is faster */
    const float *scales; /* [outs] with 8 bits, else NULL */
    const float *bias;   /* [outs] or NULL */
    long outs, ins;      /* ins: with 4 bits a multiple of `group`; at most MAX_INT_INPUTS */
    int bits, group;     /* 8 or 4; inputs per group: 32, 64 or 128. With 8 bits only the scales of x have groups */
    int symmetric;       /* with 4 bits: no lows are stored */
    int quantized;       /* 1: x is rounded to 8 bits, with a scale per row and group. 0: x is used in float32 */
    int wide;            /* INT_...: the types of x and y */
    int level;           /* LEVEL_...: at most `int_level()` */
    float unit;
} IntLinear;

#define MAX_INT_INPUTS 1048576

/* The best level that this CPU and the environment variable PITLANE_CPU_KERNELS (plain, avx2, avx512, amx) allow. */
int int_level(void);

/* A message on sizes that `int_linear` cannot run, or NULL. */
const char *int_fault(const IntLinear *job);

/* Bytes of a panel of w, and of the prepared inputs of some rows. */
size_t int_panel_bytes(const IntLinear *job);
size_t int_scratch_bytes(const IntLinear *job, long rows);

/* The whole linear, on up to `threads` threads. scratch: int_scratch_bytes, any alignment of 4. */
void int_linear(const IntLinear *job, const void *x, void *y, void *scratch, long rows, int threads);

/* Rows of a weight of 8 bits, for an embedding: y [count, ins] = W[index], float32. */
void int_rows(const uint8_t *w, const float *scales, const int64_t *index, float *y, long count, long ins);

/* The parts of `int_linear` for callers with threads of their own: write the prepared inputs, then compute panels [panel, end). */
void int_prepare(const IntLinear *job, const void *x, void *scratch, long rows);
void int_panels(const IntLinear *job, void *y, const void *scratch, long rows, long panel, long end);

#endif
