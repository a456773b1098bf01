#ifndef PITLANE_LINEAR_BF16_H
#define PITLANE_LINEAR_BF16_H

#include <stddef.h>
#include <stdint.h>

/* Whether this process may use AMX's products of bfloat16, and of bytes. */
int has_amx_bf16(void);
int has_amx_int8(void);

/* The instructions that multiply: AVX-512 BF16's dot products of pairs, AMX's tiles, or float32 multiply-adds of AVX-512 or AVX2. */
enum { BY_VECTORS, BY_TILES, BY_FLOATS };

/* Whether this process may use these products for linears of `ins` inputs. */
int has_products(int64_t products, int64_t ins);

/* Bytes of `scratch` for each row; 0: `scratch` may be NULL. */
size_t scratch_bytes_bf16(int products, long rows, long ins);

/* y[rows, outs] = x[rows, ins] w^T + bias, all bfloat16, with float32 sums; with `wide`, y is float32: the sums are not rounded. ins
 * must be even, with BY_TILES a multiple of 32. w: packed [ceil(outs / 32)][ins / 2][2][16][2], with zeros for outputs beyond outs. bias: [outs] or NULL. */
void linear_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, void *y, void *scratch, long rows, long outs, long ins,
                 int products, int threads, int wide);

#endif
