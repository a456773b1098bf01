/* Tiles of linear_int.h by AVX2: two vectors are a panel. Bytes are multiplied as 16-bit numbers, so that no sum saturates. */
#include "linear_int_parts.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ROWS_OF_TILE 4
#define LEVEL int_avx2

typedef struct {
    __m256i a, b;
} VI;
typedef struct {
    __m256 a, b;
} VF;

TARGET INLINE VI ints(int32_t v) { return (VI){_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
TARGET INLINE VF floats(float v) { return (VF){_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
TARGET INLINE VI line(const uint8_t *p) {
    return (VI){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))};
}
TARGET INLINE VF halves(const uint8_t *p) {
    return (VF){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 16)))};
}
TARGET INLINE __m256i dot_half(__m256i sums, __m256i bytes, __m256i word) {
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(word, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(bytes, 8), _mm256_srai_epi16(word, 8));
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
}
TARGET INLINE VI dot(VI sums, VI bytes, uint32_t word) {
    __m256i x = _mm256_set1_epi32((int)word);
    return (VI){dot_half(sums.a, bytes.a, x), dot_half(sums.b, bytes.b, x)};
}
/* 2 * 15 * 127 fits 16 bits. */
TARGET INLINE __m256i dot_small_half(__m256i sums, __m256i bytes, __m256i word) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, word), _mm256_set1_epi16(1)));
}
TARGET INLINE VI dot_small(VI sums, VI bytes, uint32_t word) {
    __m256i x = _mm256_set1_epi32((int)word);
    return (VI){dot_small_half(sums.a, bytes.a, x), dot_small_half(sums.b, bytes.b, x)};
}
TARGET INLINE VI low_nibbles(VI v) {
    __m256i mask = _mm256_set1_epi8(15);
    return (VI){_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
}
TARGET INLINE VI shifted_right(VI v, int bits) { return (VI){_mm256_srli_epi32(v.a, bits), _mm256_srli_epi32(v.b, bits)}; }
TARGET INLINE VI high_nibbles(VI v) { return low_nibbles(shifted_right(v, 4)); }
TARGET INLINE VF to_float(VI v) { return (VF){_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
TARGET INLINE void fetch(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
TARGET INLINE void fetch_far(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
TARGET INLINE VF times(VF a, VF b) { return (VF){_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
TARGET INLINE VF add(VF a, VF b) { return (VF){_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
TARGET INLINE VF masked_value(VI v, int shift, int mask, VF offset) {
    __m256i bits = _mm256_set1_epi32(mask);
    VI moved = shifted_right(v, shift);
    return add(to_float((VI){_mm256_and_si256(moved.a, bits), _mm256_and_si256(moved.b, bits)}), offset);
}
TARGET INLINE VF byte_value(VI v, int j) { return masked_value(v, 8 * j, 255, floats(-128)); }
TARGET INLINE VF nibble_table(float offset) { return floats(-offset); }
TARGET INLINE VF nibble_value(VI v, int j, VF table) { return masked_value(v, 8 * (j % 4) + j / 4 * 4, 15, table); }
TARGET INLINE VF fused(VF a, VF b, VF c) { return (VF){_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
TARGET INLINE void save(float *p, VF v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }

#include "linear_int_tiles.h"
#endif
