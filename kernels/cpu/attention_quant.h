#ifndef PITLANE_ATTENTION_QUANT_H
#define PITLANE_ATTENTION_QUANT_H

#include <stdint.h>

/* Quantized keys and values, and keys and values in bfloat16, the open ones. A slot >= first_open is an open slot. */
typedef struct {
    const uint8_t *keys, *values;        /* [kv_heads][slots][row_bytes], heads head_stride bytes apart */
    const uint16_t *open_keys, *open_values; /* [kv_heads][open slots][dim], heads open_stride values apart */
    int64_t row_bytes, head_stride, open_stride, first_open;
    int bits; /* 8 or 4: codes with scales and zero points; 0: fp8 (e4m3) */
} Quantized;

/* The keys and values of one KV head in `slots`. */
typedef struct {
    long head;
    const int32_t *slots;
    long num_keys;
} Slots;

#endif
