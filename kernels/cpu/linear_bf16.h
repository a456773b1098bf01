#ifndef PITLANE_LINEAR_BF16_H
#define PITLANE_LINEAR_BF16_H

#include <stdint.h>

/* Whether this build and this CPU can run `linear_bf16`, and whether they can run it with AMX. */
int has_linear_bf16(void);
int has_amx_bf16(void);

/* Whether this process may use AMX's products of bytes. */
int has_amx_int8(void);

/* y[rows, outs] = x[rows, ins] w^T + bias, all bfloat16, with float32 sums; with `wide`, y is float32: the sums as they are. ins must be even, with AMX a multiple of 32.
 * w: packed [ceil(outs / 32)][ins / 2][2][16][2], with zeros for outputs beyond outs. bias: [outs] or NULL. scratch: rows * ins
 * bfloat16; not used for one row or with AMX. */
void linear_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, void *y, uint16_t *scratch, long rows, long outs, long ins,
                 int amx, int threads, int wide);

#endif
