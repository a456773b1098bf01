/* Tiles of linear_int.h by AVX-512 and VNNI: a vector is a panel. */
#include "linear_int_parts.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ROWS_OF_TILE 12
#define WIDE_ROWS 12
#define WIDE_MIN_ROWS 6
#define LEVEL int_avx512

typedef __m512i VI;
typedef __m512 VF;

TARGET INLINE VI ints(int32_t v) { return _mm512_set1_epi32(v); }
TARGET INLINE VF floats(float v) { return _mm512_set1_ps(v); }
TARGET INLINE VI line(const uint8_t *p) { return _mm512_loadu_si512(p); }
TARGET INLINE VF halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
/* As assembly, because gcc 12 keeps the sums of the intrinsic on the stack. */
TARGET INLINE VI dot_vectors(VI sums, VI bytes, VI words) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(words));
    return sums;
}
TARGET INLINE VI dot(VI sums, VI bytes, uint32_t word) { return dot_vectors(sums, bytes, ints((int32_t)word)); }
#define dot_small dot
TARGET INLINE VI low_nibbles(VI v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
TARGET INLINE VI high_nibbles(VI v) { return _mm512_and_si512(_mm512_srli_epi32(v, 4), _mm512_set1_epi8(15)); }
/* 2^23 + byte has the byte in its last bits. */
TARGET INLINE VF byte_value(VI v, int j) {
    VI shifted = j ? _mm512_srli_epi32(v, (unsigned)(8 * j)) : v;
    VI bits = _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi32(0xff), _mm512_set1_epi32(0x4b000000), 0xea); /* a & b | c */
    return _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(8388608.0f + 128.0f));
}
TARGET INLINE VF nibble_table(float offset) {
    VF n = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_sub_ps(n, _mm512_set1_ps(offset));
}
/* A permutation reads the last 4 bits of an index. */
TARGET INLINE VF nibble_value(VI v, int j, VF table) {
    return _mm512_permutexvar_ps(j ? _mm512_srli_epi32(v, (unsigned)(8 * (j % 4) + j / 4 * 4)) : v, table);
}
TARGET INLINE VF to_float(VI v) { return _mm512_cvtepi32_ps(v); }
TARGET INLINE VF fused(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
TARGET INLINE void fetch(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
TARGET INLINE VF times(VF a, VF b) { return _mm512_mul_ps(a, b); }
TARGET INLINE VF add(VF a, VF b) { return _mm512_add_ps(a, b); }
TARGET INLINE void fetch_far(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
TARGET INLINE VF load(const float *p) { return _mm512_loadu_ps(p); }
TARGET INLINE void save_line(uint8_t *p, VI v) { _mm512_storeu_si512(p, v); }
TARGET INLINE void save(float *p, VF v) { _mm512_storeu_ps(p, v); }

/* bfloat16 is rounded half to even; NaN stays NaN. */
#define finish_panel int_finish_panel
TARGET void int_finish_panel(const IntLinear *job, const float *sums, long stride, void *y, long first, long count, long panel) {
    long from = panel * INT_PANEL, left = job->outs - from;
    __mmask16 mask = left < INT_PANEL ? (__mmask16)((1 << left) - 1) : 0xffff;
    VF scales = job->bits == 4 ? floats(job->unit) : _mm512_maskz_loadu_ps(mask, job->scales + from);
    VF bias = job->bias ? _mm512_maskz_loadu_ps(mask, job->bias + from) : floats(0);
    for (long m = 0; m < count; m++, sums += stride) {
        VF value = times(load(sums), scales);
        long at = (first + m) * job->outs + from;
        if (job->bias)
            value = add(value, bias);
        if (job->wide) {
            _mm512_mask_storeu_ps((float *)y + at, mask, value);
            continue;
        }
        VI bits = _mm512_castps_si512(value), high = _mm512_srli_epi32(bits, 16);
        VI even = _mm512_add_epi32(_mm512_add_epi32(bits, ints(0x7fff)), _mm512_and_si512(high, ints(1)));
        VI rounded = _mm512_mask_or_epi32(_mm512_srli_epi32(even, 16), _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), high, ints(64));
        _mm512_mask_cvtepi32_storeu_epi16((uint16_t *)y + at, mask, rounded);
    }
}

#include "linear_int_tiles.h"
#endif
