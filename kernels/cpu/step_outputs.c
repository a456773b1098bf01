/* Residual sums in float32; norms of heads and RoPE with the bits of the core's decoder, which computes them with ATen. */
#include <string.h>

#include "step.h"
#include "vectors.h"

#if defined(PITLANE_VECTORS)

/* Floats to bfloat16, to nearest even; ATen keeps subnormal numbers, which the CPU's instruction turns into 0. */
TARGET INLINE __m256i rounded(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_nan, _mm512_set1_epi32(0x7fc0)));
}

TARGET INLINE __m512 wide(__m256i value) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(value), 16); }

TARGET INLINE __m512 once_rounded(__m512 value) { return wide(rounded(value)); }

TARGET void add_columns(const float *x, const float *y, float *sum, long rows, long stride, long begin, long end) {
    for (long m = 0; m < rows; m++)
        for (long at = begin; at < end; at += LANES) {
            __mmask16 mask = end - at < LANES ? (__mmask16)((1u << (end - at)) - 1) : (__mmask16)0xffff;
            __m512 a = _mm512_maskz_loadu_ps(mask, x + m * stride + at), b = _mm512_maskz_loadu_ps(mask, y + m * stride + at);
            _mm512_mask_storeu_ps(sum + m * stride + at, mask, _mm512_add_ps(a, b));
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

TARGET void turn_head(const uint16_t *x, uint16_t *y, long dim, const uint16_t *weight, float eps, const uint16_t *cos,
               const uint16_t *sin) {
    long half = dim / 2;
    uint16_t normed[256];
    if (weight) {
        __m512 scale = _mm512_set1_ps(inverse_rms(x, dim, eps));
        for (long at = 0; at < dim; at += LANES) {
            __m512 value = once_rounded(_mm512_mul_ps(widened(x + at), scale));
            _mm256_storeu_si256((__m256i *)(normed + at), rounded(_mm512_mul_ps(value, widened(weight + at))));
        }
        x = normed;
    }
    if (!cos) {
        memcpy(y, x, (size_t)dim * 2);
        return;
    }
    for (long at = 0; at < half; at += LANES) { /* a product of two bfloat16 numbers is exact in float32 */
        __m512 low = widened(x + at), high = widened(x + half + at), c = widened(cos + at), s = widened(sin + at);
        __m512 first = once_rounded(_mm512_mul_ps(low, c)), second = once_rounded(_mm512_mul_ps(high, c));
        _mm256_storeu_si256((__m256i *)(y + at), rounded(_mm512_sub_ps(first, _mm512_mul_ps(high, s))));
        _mm256_storeu_si256((__m256i *)(y + half + at), rounded(_mm512_add_ps(second, _mm512_mul_ps(low, s))));
    }
}

#else

void turn_head(const uint16_t *x, uint16_t *y, long dim, const uint16_t *weight, float eps, const uint16_t *cos,
               const uint16_t *sin) {
    (void)x, (void)y, (void)dim, (void)weight, (void)eps, (void)cos, (void)sin;
}

#endif
