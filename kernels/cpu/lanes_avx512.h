/* Vectors of 16 numbers by AVX-512 with BF16; lanes.h explains them. */
#ifndef PITLANE_LANES_H
#define PITLANE_LANES_H

#include "lanes.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define LANES 16
#define HAS_PAIRS 1
#define MAX_SUMS 24 /* vectors of sums in registers */
#define EACH_ROW(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) /* of a tile, up to MAX_TILE */
#define VECTORS vectors_avx512

typedef __m512 Floats;

TARGET INLINE Floats all(float x) { return _mm512_set1_ps(x); }
TARGET INLINE Floats zeros(void) { return _mm512_setzero_ps(); }
TARGET INLINE Floats load(const float *x) { return _mm512_loadu_ps(x); }
TARGET INLINE void put(float *y, Floats x) { _mm512_storeu_ps(y, x); }
TARGET INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
TARGET INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
TARGET INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
TARGET INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
TARGET INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
TARGET INLINE Floats root(Floats x) { return _mm512_sqrt_ps(x); }
TARGET INLINE Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
TARGET INLINE float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
TARGET INLINE float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }
TARGET INLINE float lane_0(Floats x) { return _mm512_cvtss_f32(x); }

TARGET INLINE Floats where_negative(Floats x, Floats a, Floats b) {
    return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), a);
}

typedef __mmask16 Lanes;
TARGET INLINE Lanes lanes_between(long from, long to) { return (Lanes)(((1u << to) - 1) & ~((1u << from) - 1)); }
TARGET INLINE Lanes lanes_below(long count) { return count < LANES ? (Lanes)((1u << count) - 1) : (Lanes)0xffff; }
TARGET INLINE Floats kept(Lanes lanes, Floats x) { return _mm512_maskz_mov_ps(lanes, x); }
TARGET INLINE Floats largest(Lanes lanes, Floats a, Floats b) { return _mm512_mask_max_ps(a, lanes, a, b); }

TARGET INLINE Floats load_part(const float *x, long count) { return _mm512_maskz_loadu_ps(lanes_below(count), x); }
TARGET INLINE void put_part(float *y, Floats x, long count) { _mm512_mask_storeu_ps(y, lanes_below(count), x); }

TARGET INLINE Floats widen(const uint16_t *x) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
}
TARGET INLINE Floats widen_part(const uint16_t *x, long count) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes_below(count), x)), 16);
}
TARGET INLINE void put_bf16(uint16_t *y, Floats x) { _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(x)); }
TARGET INLINE void put_bf16_part(uint16_t *y, Floats x, long count) {
    _mm256_mask_storeu_epi16(y, lanes_below(count), (__m256i)_mm512_cvtneps_pbh(x));
}

TARGET INLINE void put_bf16_two(uint16_t *y, Floats low, Floats high) {
    _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

TARGET INLINE __m256i rounded_all(Floats x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_nan, _mm512_set1_epi32(0x7fc0)));
}
TARGET INLINE void put_bf16_exact(uint16_t *y, Floats x) { _mm256_storeu_si256((__m256i *)y, rounded_all(x)); }
TARGET INLINE Floats round_bf16_exact(Floats x) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded_all(x)), 16); }

TARGET INLINE Floats firsts(const void *pairs) { return (__m512)_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16); }
TARGET INLINE Floats seconds(const void *pairs) { return (__m512)_mm512_maskz_loadu_epi16((__mmask32)0xaaaaaaaa, pairs); }

TARGET INLINE void accumulate_two(Floats *sums, const Floats *weights, const uint32_t *x) {
    Floats factor = (__m512)_mm512_set1_epi32((int)*x);
    sums[0] = multiply_add(weights[0], factor, sums[0]);
    sums[1] = multiply_add(weights[1], factor, sums[1]);
}

TARGET INLINE Floats at_least(Floats x, float low) { return _mm512_max_ps(x, _mm512_set1_ps(low)); }
TARGET INLINE Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }
TARGET INLINE Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

/* ---- attention */

TARGET INLINE void put_in_turn(float *y, Floats even, Floats odd) {
    __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    _mm512_storeu_ps(y, _mm512_permutex2var_ps(even, low, odd));
    _mm512_storeu_ps(y + LANES, _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
}

typedef __m512i Words;
TARGET INLINE Words all_words(uint32_t x) { return _mm512_set1_epi32((int)x); }
TARGET INLINE Words load_words(const void *x) { return _mm512_loadu_si512(x); }
TARGET INLINE void put_words(void *y, Words x) { _mm512_storeu_si512(y, x); }

TARGET INLINE void put_transposed(const Words *x, uint32_t *y, long stride) {
    __m512i a[16], b[16];
    UNROLLED for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    UNROLLED for (int i = 0; i < 16; i += 4) { /* lane L (128 bits) of b[i + c]: word 4 L + c of vectors i to i + 3 */
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    UNROLLED for (int c = 0; c < 4; c++) {
        __m512i even = _mm512_shuffle_i32x4(b[c], b[c + 4], 0x88), more_even = _mm512_shuffle_i32x4(b[c + 8], b[c + 12], 0x88);
        __m512i odd = _mm512_shuffle_i32x4(b[c], b[c + 4], 0xdd), more_odd = _mm512_shuffle_i32x4(b[c + 8], b[c + 12], 0xdd);
        _mm512_store_si512(y + c * stride, _mm512_shuffle_i32x4(even, more_even, 0x88));
        _mm512_store_si512(y + (4 + c) * stride, _mm512_shuffle_i32x4(odd, more_odd, 0x88));
        _mm512_store_si512(y + (8 + c) * stride, _mm512_shuffle_i32x4(even, more_even, 0xdd));
        _mm512_store_si512(y + (12 + c) * stride, _mm512_shuffle_i32x4(odd, more_odd, 0xdd));
    }
}

/* ---- quantized keys, values and weights */

typedef __m512i Codes;
TARGET INLINE Codes load_codes(const uint8_t *x) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)x)); }
TARGET INLINE Codes low_nibbles(Codes x) { return _mm512_and_si512(x, _mm512_set1_epi32(15)); }
TARGET INLINE Codes high_nibbles(Codes x) { return _mm512_srli_epi32(x, 4); }
TARGET INLINE Floats float_of(Codes x) { return _mm512_cvtepi32_ps(x); }

TARGET INLINE Words widen_fp8(const uint8_t *x) {
    __m512i small = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)SMALL_E4M3));
    __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)x));
    __m512i rest = _mm512_and_si512(bytes, _mm512_set1_epi16(0x7f));
    __m512i values = _mm512_add_epi16(_mm512_slli_epi16(rest, 4), _mm512_set1_epi16(120 << 7));
    values = _mm512_mask_permutexvar_epi16(values, _mm512_cmplt_epu16_mask(rest, _mm512_set1_epi16(8)), rest, small);
    __m512i signs = _mm512_slli_epi16(_mm512_and_si512(bytes, _mm512_set1_epi16(0x80)), 8);
    return _mm512_or_si512(values, signs);
}

#endif
