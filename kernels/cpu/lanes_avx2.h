/* Vectors of 8 numbers by AVX2 and FMA; lanes.h explains them. */
#ifndef PITLANE_LANES_H
#define PITLANE_LANES_H

#include <string.h>

#include "lanes.h"

#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define HAS_PAIRS 0
#define MAX_SUMS 12 /* vectors of sums in registers */
#define EACH_ROW(X) X(1) X(2) X(3) X(4) X(5) X(6) /* of a tile, up to MAX_TILE */
#define VECTORS vectors_avx2

typedef __m256 Floats;

TARGET INLINE Floats all(float x) { return _mm256_set1_ps(x); }
TARGET INLINE Floats zeros(void) { return _mm256_setzero_ps(); }
TARGET INLINE Floats load(const float *x) { return _mm256_loadu_ps(x); }
TARGET INLINE void put(float *y, Floats x) { _mm256_storeu_ps(y, x); }
TARGET INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
TARGET INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
TARGET INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
TARGET INLINE Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
TARGET INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
TARGET INLINE Floats root(Floats x) { return _mm256_sqrt_ps(x); }
TARGET INLINE Floats magnitude(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
TARGET INLINE float lane_0(Floats x) { return _mm256_cvtss_f32(x); }

TARGET INLINE float sum_of(Floats x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

TARGET INLINE float largest_of(Floats x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

TARGET INLINE Floats where_negative(Floats x, Floats a, Floats b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
}

typedef __m256 Lanes;
TARGET INLINE Lanes lanes_between(long from, long to) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i is_after = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32((int)from - 1));
    return (Lanes)_mm256_and_si256(is_after, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)to), lane));
}
TARGET INLINE Lanes lanes_below(long count) { return lanes_between(0, count < LANES ? count : LANES); }
TARGET INLINE Floats kept(Lanes lanes, Floats x) { return _mm256_and_ps(lanes, x); }
TARGET INLINE Floats largest(Lanes lanes, Floats a, Floats b) { return _mm256_blendv_ps(a, _mm256_max_ps(a, b), lanes); }

TARGET INLINE Floats load_part(const float *x, long count) { return _mm256_maskload_ps(x, (__m256i)lanes_below(count)); }
TARGET INLINE void put_part(float *y, Floats x, long count) { _mm256_maskstore_ps(y, (__m256i)lanes_below(count), x); }

TARGET INLINE __m256i widen_bits(__m128i x) { return _mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16); }
TARGET INLINE Floats widen(const uint16_t *x) { return (__m256)widen_bits(_mm_loadu_si128((const __m128i *)x)); }
TARGET INLINE Floats widen_part(const uint16_t *x, long count) {
    uint16_t part[LANES] = {0};
    if (count >= LANES)
        return widen(x);
    memcpy(part, x, (size_t)count * 2);
    return widen(part);
}

TARGET INLINE __m256i rounded_words(Floats x) {
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i high = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    return _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc0), (__m256i)_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
TARGET INLINE __m128i rounded(Floats x) {
    __m256i words = rounded_words(x);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
TARGET INLINE void put_bf16(uint16_t *y, Floats x) { _mm_storeu_si128((__m128i *)y, rounded(x)); }
TARGET INLINE void put_bf16_two(uint16_t *y, Floats low, Floats high) {
    __m256i halves = _mm256_packus_epi32(rounded_words(low), rounded_words(high)); /* packs each half of 128 bits */
    _mm256_storeu_si256((__m256i *)y, _mm256_permute4x64_epi64(halves, 0xd8));
}
TARGET INLINE void put_bf16_part(uint16_t *y, Floats x, long count) {
    uint16_t part[LANES];
    put_bf16(count < LANES ? part : y, x);
    if (count < LANES)
        memcpy(y, part, (size_t)count * 2);
}
TARGET INLINE void put_bf16_exact(uint16_t *y, Floats x) { put_bf16(y, x); }
TARGET INLINE Floats round_bf16_exact(Floats x) { return (__m256)widen_bits(rounded(x)); }

/* As assembly that reads memory: gcc 12 would keep words and mask in registers that the sums of a tile need. */
typedef const char (*Vector)[4 * LANES];
TARGET INLINE Floats firsts(const void *pairs) {
    Floats numbers;
    __asm__ volatile("vmovdqu %1, %0\n vpslld $16, %0, %0" : "=x"(numbers) : "m"(*(Vector)pairs));
    return numbers;
}
TARGET INLINE Floats seconds(const void *pairs) {
    static const uint32_t mask[LANES] __attribute__((aligned(32))) = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                                      0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
    Floats numbers;
    __asm__ volatile("vmovdqa %2, %0\n vpand %1, %0, %0" : "=x"(numbers) : "m"(*(Vector)pairs), "m"(mask));
    return numbers;
}

/* As assembly, because gcc 12 copies sums of intrinsics between registers and keeps some of them on the stack. */
TARGET INLINE void accumulate_two(Floats *sums, const Floats *weights, const uint32_t *x) {
    Floats factor;
    __asm__ volatile("vbroadcastss %5, %2\n vfmadd231ps %2, %3, %0\n vfmadd231ps %2, %4, %1"
                     : "+&x"(sums[0]), "+&x"(sums[1]), "=&x"(factor)
                     : "x"(weights[0]), "x"(weights[1]), "m"(*x));
}

TARGET INLINE Floats at_least(Floats x, float low) { return _mm256_max_ps(x, _mm256_set1_ps(low)); }
TARGET INLINE Floats nearest(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* In two halves, because 2^n may be smaller than every normal number. */
TARGET INLINE Floats times_power(Floats x, Floats n) {
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), one = _mm256_set1_epi32(127);
    Floats first = (__m256)_mm256_slli_epi32(_mm256_add_epi32(half, one), 23);
    Floats second = (__m256)_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), one), 23);
    return _mm256_mul_ps(_mm256_mul_ps(x, first), second);
}

/* ---- attention */

TARGET INLINE void put_in_turn(float *y, Floats even, Floats odd) {
    __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    _mm256_storeu_ps(y, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(y + LANES, _mm256_permute2f128_ps(low, high, 0x31));
}

typedef __m256i Words;
TARGET INLINE Words all_words(uint32_t x) { return _mm256_set1_epi32((int)x); }
TARGET INLINE Words load_words(const void *x) { return _mm256_loadu_si256(x); }
TARGET INLINE void put_words(void *y, Words x) { _mm256_storeu_si256(y, x); }

TARGET INLINE void put_transposed(const Words *x, uint32_t *y, long stride) {
    __m256i a[8], b[8];
    UNROLLED for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
    }
    UNROLLED for (int i = 0; i < 8; i += 4) { /* lane L (128 bits) of b[i + c]: word 4 L + c of vectors i to i + 3 */
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    UNROLLED for (int c = 0; c < 4; c++) {
        put_words(y + c * stride, _mm256_permute2x128_si256(b[c], b[c + 4], 0x20));
        put_words(y + (4 + c) * stride, _mm256_permute2x128_si256(b[c], b[c + 4], 0x31));
    }
}

/* ---- quantized keys, values and weights */

typedef __m256i Codes;
TARGET INLINE Codes load_codes(const uint8_t *x) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)x)); }
TARGET INLINE Codes low_nibbles(Codes x) { return _mm256_and_si256(x, _mm256_set1_epi32(15)); }
TARGET INLINE Codes high_nibbles(Codes x) { return _mm256_srli_epi32(x, 4); }
TARGET INLINE Floats float_of(Codes x) { return _mm256_cvtepi32_ps(x); }

TARGET INLINE Words widen_fp8(const uint8_t *x) {
    __m256i small = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)SMALL_E4M3));
    __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)x));
    __m256i rest = _mm256_and_si256(bytes, _mm256_set1_epi16(0x7f));
    __m256i values = _mm256_add_epi16(_mm256_slli_epi16(rest, 4), _mm256_set1_epi16(120 << 7));
    __m256i twice = _mm256_add_epi16(rest, rest); /* the first byte of entry `rest` of the table; the second byte follows */
    __m256i index = _mm256_add_epi16(_mm256_or_si256(twice, _mm256_slli_epi16(twice, 8)), _mm256_set1_epi16(0x100));
    __m256i is_small = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), rest);
    values = _mm256_blendv_epi8(values, _mm256_shuffle_epi8(small, index), is_small);
    __m256i signs = _mm256_slli_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0x80)), 8);
    return _mm256_or_si256(values, signs);
}

#endif
