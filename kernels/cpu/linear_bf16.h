#ifndef PITLANE_LINEAR_BF16_H
#define PITLANE_LINEAR_BF16_H

#include <stdint.h>

/* Whether this build and this CPU can run `linear_bf16`, and whether with AMX. */
int has_linear_bf16(void);
int has_amx_bf16(void);

/* y[rows, outs] = x[rows, ins] w^T + bias, all bfloat16, sums in float32; ins is even, with AMX a multiple of 32.
 * w: [ceil(outs / 32)][ins / 2][2][16][2], zeros beyond outs. bias: [outs] or NULL. scratch: rows * ins bfloat16, unused for one row
 * and with AMX. */
void linear_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, uint16_t *y, uint16_t *scratch, long rows, long outs,
                 long ins, int amx, int threads);

#endif
