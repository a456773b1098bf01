#ifndef PITLANE_ATTENTION_BF16_H
#define PITLANE_ATTENTION_BF16_H

#include <stdint.h>

/* Query tokens over keys and values that lie in slots, in parts: part p is one softmax of a query token over some of a task's keys. */
typedef struct {
    const uint16_t *q; /* [tokens][heads][dim], tokens q_stride apart */
    const uint16_t *keys, *values; /* [kv_heads][slots][dim], heads head_stride apart */
    uint16_t *out; /* [tokens][heads][dim] */
    float *partial; /* [parts][heads][dim + 2]: values weighted, their sum of weights, the largest score */
    const int32_t *slots;
    const int64_t *tasks; /* [num_tasks][4]: first slot of `slots`, number of keys <= 512, first of `members`, number of members */
    const int64_t *members; /* [parts][4]: query token, part, first key of the task that it sees, end of those */
    const int64_t *rows; /* [num_rows][3]: query token, its first part, number of parts; a token's parts follow each other */
    int64_t num_tasks, num_rows, heads, kv_heads, dim, q_stride, head_stride;
    float scale;
} Attention;

/* Whether this build and this CPU can run `attention_bf16` with heads of this size. */
int has_attention_bf16(int64_t dim);

void attention_bf16(const Attention *job, int threads);

#endif
