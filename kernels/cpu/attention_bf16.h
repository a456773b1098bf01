#ifndef PITLANE_ATTENTION_BF16_H
#define PITLANE_ATTENTION_BF16_H

#include <stdint.h>

#include "attention_quant.h"

#define MAX_DIM 256 /* of a head */
#define ATTENTION_BUFFER 589824 /* bytes */

/* Memory of the calling thread, ATTENTION_BUFFER bytes, aligned to 64. */
void *attention_buffer(void);

/* Attention of query tokens over keys and values in slots. A task is a piece of keys and its members, the tokens that see it. A
 * part is the softmax of one member over the keys of the task that it sees. */
typedef struct {
    const uint16_t *q; /* [tokens][heads][dim], tokens q_stride apart */
    const uint16_t *keys, *values; /* [kv_heads][slots][dim], heads head_stride apart */
    uint16_t *out; /* [tokens][heads][dim] */
    float *partial; /* [parts][heads][dim + 2]: the weighted sum of values, the sum of weights, the largest score */
    const int32_t *slots;
    const int64_t *tasks; /* [num_tasks][4]: first slot, number of keys <= 512, first member, number of members */
    const int64_t *members; /* [parts][4]: query token, part, and the keys [begin, end) of the task that the token sees */
    const int64_t *rows; /* [num_rows][3]: query token, its first part, number of parts; the parts of a token are adjacent */
    int64_t num_tasks, num_rows, heads, kv_heads, dim, q_stride, head_stride;
    float scale;
    const Quantized *quantized; /* NULL, or the store of the keys and values, in place of `keys`, `values` and `head_stride` */
} Attention;

/* Whether this build and this CPU can run `attention_bf16` with heads of size dim. */
int has_attention_bf16(int64_t dim);

void attention_bf16(const Attention *job, int threads);

#endif
