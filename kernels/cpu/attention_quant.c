/* Decodes rows of quantized keys and values into bfloat16, for the attention of attention_bf16.c.
 *
 * A block has 32 slots. A row has its codes first: int8, a byte per channel; int4, channel d in the low bits of byte d and channel
 * d + dim / 2 in the high bits; fp8, a byte per channel. Then come bfloat16 pairs (scale, zero) in the rows of int8 and int4, with
 * x = scale * code + zero: for keys, the pairs of channels [t * dim / 32, (t + 1) * dim / 32) in row t of the block, which hold for
 * all rows of the block; for values, a pair for every 32 channels of the row.
 */
#include "attention_quant.h"
#include "vectors.h"

#if defined(PITLANE_VECTORS)
#include <string.h>
#define TOKENS 32
#define MAX_DIM 256

TARGET INLINE __m512 scale_of(__m512i pair) { return (__m512)_mm512_slli_epi32(pair, 16); }
TARGET INLINE __m512 zero_of(__m512i pair) { return (__m512)_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)); }

TARGET INLINE void put(uint16_t *target, __m512 x) { _mm256_storeu_si256((__m256i *)target, (__m256i)_mm512_cvtneps_pbh(x)); }

TARGET INLINE void decode_codes(__m512i codes, __m512i pairs, uint16_t *target) {
    put(target, _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale_of(pairs), zero_of(pairs)));
}

/* The pairs [dim] of a row with codes of 8 or 4 bits: of one channel each, or with `each` = 32 of 32 channels each. */
TARGET INLINE __m512i pairs_at(const uint32_t *pairs, long d, int each) {
    return each == 1 ? _mm512_loadu_si512(pairs + d) : _mm512_set1_epi32((int)pairs[d / each]);
}

TARGET INLINE void decode_row(const uint8_t *row, const uint32_t *pairs, int each, int bits, long dim, uint16_t *target) {
    if (bits == 8) {
        for (long d = 0; d < dim; d += LANES)
            decode_codes(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(row + d))), pairs_at(pairs, d, each), target + d);
        return;
    }
    for (long d = 0; d < dim / 2; d += LANES) {
        __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(row + d)));
        decode_codes(_mm512_and_si512(codes, _mm512_set1_epi32(15)), pairs_at(pairs, d, each), target + d);
        decode_codes(_mm512_srli_epi32(codes, 4), pairs_at(pairs, d + dim / 2, each), target + d + dim / 2);
    }
}

/* e4m3 has a bias of 7: as the upper bits of a float, a value is too small by 2^-120. */
TARGET INLINE void decode_fp8(const uint8_t *row, long dim, uint16_t *target) {
    for (long d = 0; d < dim; d += LANES) {
        __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(row + d)));
        __m512i size = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x7f)), 20);
        __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
        __m512 x = _mm512_mul_ps((__m512)size, _mm512_set1_ps(0x1p120f));
        put(target + d, (__m512)_mm512_or_si512((__m512i)x, sign));
    }
}

TARGET void decode_piece(const Quantized *store, long head, const int32_t *slots, long low, long high, long dim, uint16_t *keys,
                         uint16_t *values) {
    const uint8_t *key_rows = store->keys + head * store->head_stride, *value_rows = store->values + head * store->head_stride;
    const uint16_t *open_keys = store->open_keys + head * store->open_stride;
    const uint16_t *open_values = store->open_values + head * store->open_stride;
    uint32_t pairs[MAX_DIM], value_pairs[MAX_DIM / 32];
    long width = store->row_bytes, num_codes = dim * store->bits / 8, share = dim / TOKENS * 4, block = -1;
    for (long k = low; k < high; k++) {
        long slot = slots[k];
        if (slot >= store->first_open) {
            memcpy(keys + k * dim, open_keys + (slot - store->first_open) * dim, (size_t)dim * 2);
            memcpy(values + k * dim, open_values + (slot - store->first_open) * dim, (size_t)dim * 2);
            continue;
        }
        const uint8_t *key = key_rows + slot * width, *value = value_rows + slot * width;
        if (store->bits == 0) {
            decode_fp8(key, dim, keys + k * dim);
            decode_fp8(value, dim, values + k * dim);
            continue;
        }
        if (slot / TOKENS != block) {
            block = slot / TOKENS;
            for (long t = 0; t < TOKENS; t++)
                memcpy((uint8_t *)pairs + t * share, key_rows + (block * TOKENS + t) * width + num_codes, (size_t)share);
        }
        memcpy(value_pairs, value + num_codes, (size_t)share);
        if (store->bits == 8) {
            decode_row(key, pairs, 1, 8, dim, keys + k * dim);
            decode_row(value, value_pairs, 32, 8, dim, values + k * dim);
        } else {
            decode_row(key, pairs, 1, 4, dim, keys + k * dim);
            decode_row(value, value_pairs, 32, 4, dim, values + k * dim);
        }
    }
}

#else

void decode_piece(const Quantized *store, long head, const int32_t *slots, long low, long high, long dim, uint16_t *keys,
                  uint16_t *values) {
    (void)store, (void)head, (void)slots, (void)low, (void)high, (void)dim, (void)keys, (void)values;
}

#endif
