/* The operations of ops_bf16.h on a row, in vectors. */
#ifndef PITLANE_OPS_ROWS_H
#define PITLANE_OPS_ROWS_H

#include "exponential.h"

TARGET INLINE Floats load_of(const void *x, int64_t at, int64_t dim, int wide) {
    return wide ? load_part((const float *)x + at, dim - at) : widen_part((const uint16_t *)x + at, dim - at);
}

TARGET INLINE void norm_row(const void *x, const uint16_t *w, uint16_t *y, int64_t dim, float eps, int wide) {
    Floats sums[4] = {zeros(), zeros(), zeros(), zeros()};
    for (int64_t at = 0; at < dim; at += LANES) {
        Floats value = load_of(x, at, dim, wide);
        sums[at / LANES % 4] = multiply_add(value, value, sums[at / LANES % 4]);
    }
    float total = sum_of(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    Floats scale = divide(all(1.0f), root(all(total / (float)dim + eps)));
    for (int64_t at = 0; at < dim; at += LANES)
        put_bf16_part(y + at, multiply(multiply(load_of(x, at, dim, wide), scale), widen_part(w + at, dim - at)), dim - at);
}

TARGET static void rms_norm_row(const void *x, const uint16_t *w, uint16_t *y, int64_t dim, float eps, int wide) {
    if (wide)
        norm_row(x, w, y, dim, eps, 1);
    else
        norm_row(x, w, y, dim, eps, 0);
}

TARGET static void silu_mul_row(const uint16_t *gates, const uint16_t *ups, uint16_t *y, int64_t dim) {
    Floats one = all(1.0f);
    for (int64_t at = 0; at < dim; at += LANES) {
        Floats gate = widen_part(gates + at, dim - at), up = widen_part(ups + at, dim - at);
        Floats small = exponential(subtract(zeros(), magnitude(gate))); /* exp(-|gate|): exp(|gate|) may overflow */
        Floats sigmoid = divide(where_negative(gate, small, one), add(one, small));
        put_bf16_part(y + at, multiply(multiply(gate, sigmoid), up), dim - at);
    }
}

#endif
