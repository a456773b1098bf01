/* Linear with weights in float8 (e4m3): y [rows, outs] = x [rows, ins] W^T + bias.
 *
 * e4m3: a sign, 4 bits of exponent (bias 7), 3 bits of mantissa; exponent 0 is m * 2^-9; no infinity; 0x7f and 0xff are no numbers and
 * must not occur. A panel is 32 outputs: w [panels][ins / 2][32][2], so 32 bytes widen to the bfloat16 pairs of 16 outputs. The inputs
 * are cut into groups: W = scale * e4m3, with scales [panels][groups][32].
 *
 * A sum of a group is one chain over ascending inputs, and the scaled sums of the groups are added in ascending order. So a row's
 * result has the same bits for any number of rows and threads. The two levels differ in the order inside a pair of inputs.
 */
#ifndef PITLANE_LINEAR_FP8_H
#define PITLANE_LINEAR_FP8_H

#include <stdint.h>

enum { FP8_PLAIN, FP8_VECTORS };
enum { FP8_PANEL = 32, FP8_CHUNK = 128 /* pairs of inputs that are widened at once */ };

typedef struct {
    const uint8_t *w;
    const float *scales;
    const float *bias; /* [outs] or NULL */
    long outs, ins;    /* ins: even */
    long group;        /* inputs of a group: even; the last group may be smaller */
    int wide, wide_outputs; /* whether x is float32, and y; else bfloat16 */
    int level;         /* FP8_VECTORS: bfloat16 alone, on a CPU with AVX2 */
} Fp8Linear;

int has_fp8_vectors(void);
void fp8_linear(const Fp8Linear *job, const void *x, void *y, long rows, int threads);

#endif
