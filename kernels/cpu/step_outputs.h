/* Residual sums in float32; norms of heads and RoPE with the bits of the core's decoder, which computes them with ATen. */
#ifndef PITLANE_STEP_OUTPUTS_H
#define PITLANE_STEP_OUTPUTS_H

#include <string.h>

#include "linear_parts.h"

/* sum[m] = x[m] + y[m] for columns [begin, end) of rows with `stride` columns. */
TARGET static void add_columns(const float *x, const float *y, float *sum, long rows, long stride, long begin, long end) {
    for (long m = 0; m < rows; m++)
        for (long at = begin; at < end; at += LANES) {
            Floats total = add(load_part(x + m * stride + at, end - at), load_part(y + m * stride + at, end - at));
            put_part(sum + m * stride + at, total, end - at);
        }
}

/* 1 / rms of a head, in the order of ATen's sum: vectors of 8, every fourth vector in one of four sums, then lane after lane. */
TARGET static float inverse_rms(const uint16_t *x, long dim, float eps) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    float lanes[8], total = 0;
    for (long at = 0; at < dim; at += 8) { /* dim is a multiple of 32 */
        __m256 value = (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(x + at))), 16);
        sums[at / 8 % 4] = _mm256_add_ps(sums[at / 8 % 4], _mm256_mul_ps(value, value)); /* the square of a bfloat16 is exact */
    }
    _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), sums[2]), sums[3]));
    for (int lane = 0; lane < 8; lane++)
        total += lanes[lane];
    __m128 mean = _mm_set_ss(total / (float)dim + eps);
    return _mm_cvtss_f32(_mm_div_ss(_mm_set_ss(1.0f), _mm_sqrt_ss(mean)));
}

/* Norm a head and rotate it. weight: NULL for no norm. cos, sin: [dim / 2], or NULL for no rotation. As the core's decoder does
 * with ATen, to the bit: round to bfloat16 after the norm, after its weight, after x * cos, and at the end. */
TARGET static void turn_head(const uint16_t *x, uint16_t *y, long dim, const uint16_t *weight, float eps,
                             const uint16_t *cos, const uint16_t *sin) {
    long half = dim / 2;
    uint16_t normed[MAX_DIM];
    if (weight) {
        Floats scale = all(inverse_rms(x, dim, eps));
        for (long at = 0; at < dim; at += LANES) {
            Floats value = round_bf16_exact(multiply(widen(x + at), scale));
            put_bf16_exact(normed + at, multiply(value, widen(weight + at)));
        }
        x = normed;
    }
    if (!cos) {
        memcpy(y, x, (size_t)dim * 2);
        return;
    }
    for (long at = 0; at < half; at += LANES) { /* a product of two bfloat16 numbers is exact in float32 */
        Floats low = widen(x + at), high = widen(x + half + at), c = widen(cos + at), s = widen(sin + at);
        Floats first = round_bf16_exact(multiply(low, c)), second = round_bf16_exact(multiply(high, c));
        put_bf16_exact(y + at, subtract(first, multiply(high, s)));
        put_bf16_exact(y + half + at, add(second, multiply(low, s)));
    }
}

#endif
