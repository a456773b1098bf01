#ifndef PITLANE_OPS_BF16_H
#define PITLANE_OPS_BF16_H

#include <stdint.h>

/* Whether this build and this CPU can run these operations. */
int has_ops_bf16(void);

/* y[rows, dim] = x / sqrt(mean(x^2) + eps) * w per row, computed in float32 and rounded once. w and y are bfloat16; x is float32 with
 * `wide`, else bfloat16. */
void rms_norm_bf16(const void *x, const uint16_t *w, uint16_t *y, int64_t rows, int64_t dim, float eps, int threads, int wide);

/* y[rows, dim] = silu(gate) * up, where x[rows, 2 dim] = gate, up. */
void silu_mul_bf16(const uint16_t *x, uint16_t *y, int64_t rows, int64_t dim, int threads);

#endif
