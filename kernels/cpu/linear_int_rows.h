/* Rounds and lays out the rows of inputs before the tiles, and writes rows of outputs after them. Part of linear_int_tiles.h. */

/* The inputs [begin, end) of a row as floats. */
TARGET INLINE void read_inputs(const IntLinear *job, const void *x, long begin, long end, float *to) {
    if (job->wide == INT_FLOATS) {
        memcpy(to, (const float *)x + begin, (size_t)(end - begin) * sizeof(float));
        return;
    }
    const uint16_t *from = (const uint16_t *)x + begin;
    for (long k = 0; k < end - begin; k++) {
        uint32_t bits = (uint32_t)from[k] << 16;
        memcpy(to + k, &bits, sizeof bits);
    }
}

/* The largest absolute value. Compares the bits as integers, so that NaN is larger than all numbers. */
TARGET INLINE float largest(const float *values, long count) {
    uint32_t maximum = 0;
    float value;
    for (long k = 0; k < count; k++) {
        uint32_t bits;
        memcpy(&bits, values + k, sizeof bits);
        bits &= 0x7fffffff;
        maximum = bits > maximum ? bits : maximum;
    }
    memcpy(&value, &maximum, sizeof value);
    return value;
}

enum { PIECE = 1024 }; /* inputs converted at a time: a multiple of every group size */

/* Round a group to bytes. Returns the sum of the bytes. */
TARGET INLINE int32_t quantize(const float *values, long count, int8_t *bytes, float *scale) {
    float maximum = largest(values, count), factor = maximum > 1e-30f ? 127.0f / maximum : 0.0f;
    int32_t sum = 0;
    *scale = maximum / 127.0f;
    for (long k = 0; k < count; k++) { /* adding 1.5 * 2^23 rounds to the nearest integer, half to even */
        float rounded = values[k] * factor + 12582912.0f;
        int32_t bits;
        memcpy(&bits, &rounded, sizeof bits);
        bytes[k] = (int8_t)bits;
    }
    for (long k = 0; k < count; k++)
        sum += bytes[k];
    return sum;
}

/* Write row m of a tile of n rows. */
TARGET static void prepare_row(const IntLinear *job, const void *x, char *to, int32_t *sums, float *scales, long m, long n) {
    float values[PIECE];
    int8_t bytes[PIECE];
    long group = job->group;
    int lows = job->bits == 4 && !job->symmetric;
    for (long begin = 0; begin < job->ins; begin += PIECE) {
        long count = smaller(job->ins - begin, PIECE), padded = (count + 3) / 4 * 4;
        read_inputs(job, x, begin, begin + count, values);
        for (long k = count; k < padded; k++)
            values[k] = 0;
        for (long k = 0; k < padded; k += group) {
            long size = smaller(group, padded - k), at = (begin + k) / group * n + m;
            float sum = 0;
            if (job->quantized) {
                int32_t whole = quantize(values + k, size, bytes + k, scales + at);
                sum = (float)whole * scales[at];
                sums[at] = whole * (job->bits == 8 ? -128 : -8);
            } else if (lows)
                for (long i = 0; i < size; i++)
                    sum += values[k + i];
            if (lows)
                memcpy(sums + at, &sum, sizeof sum);
        }
        if (job->quantized) {
            uint32_t *target = (uint32_t *)to + begin / 4 * n + m, word;
            for (long k = 0; k < padded; k += 4) {
                memcpy(&word, bytes + k, sizeof word);
                target[k / 4 * n] = word;
            }
        } else {
            float *target = (float *)to + begin * n + m;
            for (long k = 0; k < padded; k++)
                target[k * n] = values[k];
        }
    }
}

TARGET static void prepare(const IntLinear *job, const Prepared *to, const void *x, long first, long count) {
    long stride = job->ins * (job->wide == INT_FLOATS ? 4 : 2);
    for (long m = 0; m < count; m++)
        prepare_row(job, (const char *)x + (first + m) * stride, to->x + first * to->row_bytes, to->sums + first * to->groups,
                    to->scales + first * to->groups, m, count);
}

#ifndef finish_panel
/* Write the first `count` of 16 outputs of a row: sums * scales + bias, where bias may be NULL. The compiler turns loops of 16 turns
 * into vectors; gcc 12 does so with the rounding only if it does not unroll that loop first. In vectors, a linear of 8 bits with 576
 * inputs takes 0.6 to 0.85 of the time for 8 to 64 rows (Xeon, one thread). */
TARGET INLINE void finish_row(const float *restrict sums, const float *restrict scales, const float *restrict bias, long count,
                              int wide, void *restrict y) {
    float values[INT_PANEL];
    uint32_t bits[INT_PANEL];
    uint16_t halves_[INT_PANEL];
    for (int i = 0; i < INT_PANEL; i++)
        values[i] = sums[i] * scales[i];
    if (bias)
        for (int i = 0; i < INT_PANEL; i++)
            values[i] += bias[i];
    if (wide) {
        memcpy(y, values, (size_t)count * sizeof(float));
        return;
    }
    memcpy(bits, values, sizeof bits);
    _Pragma("GCC unroll 1") for (int i = 0; i < INT_PANEL; i++) { /* round to bfloat16, half to even; NaN stays NaN */
        uint32_t even = (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16, nan = bits[i] >> 16 | 64;
        halves_[i] = (uint16_t)((bits[i] & 0x7fffffff) > 0x7f800000 ? nan : even);
    }
    if (count == INT_PANEL)
        memcpy(y, halves_, sizeof halves_);
    else
        memcpy(y, halves_, (size_t)count * sizeof(uint16_t));
}

/* Write the outputs of a panel: sums [count][stride], of the rows from `first` on. */
TARGET INLINE void finish_panel(const IntLinear *job, const float *sums, long stride, void *y, long first, long count, long panel) {
    _Alignas(64) float factors[INT_PANEL], bias[INT_PANEL];
    long from = panel * INT_PANEL, outs = smaller(job->outs - from, INT_PANEL);
    for (long i = 0; i < INT_PANEL; i++) {
        factors[i] = job->bits == 4 ? job->unit : i < outs ? job->scales[from + i] : 0;
        bias[i] = job->bias && i < outs ? job->bias[from + i] : 0;
    }
    for (long m = 0; m < count; m++)
        finish_row(sums + m * stride, factors, job->bias ? bias : 0, outs, job->wide,
                   (char *)y + ((first + m) * job->outs + from) * (job->wide ? 4 : 2));
}
#endif
