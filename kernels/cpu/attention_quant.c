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
#define LINE 64   /* bytes */
#define AHEAD 128 /* keys between a key in use and the key prefetched */

TARGET INLINE __m512 scale_of(__m512i pair) { return (__m512)_mm512_slli_epi32(pair, 16); }
TARGET INLINE __m512 zero_of(__m512i pair) { return (__m512)_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)); }

/* Copies of a fixed size: a call of memcpy would take longer than the row. */
INLINE uint32_t word_at(const uint8_t *bytes, long index) {
    uint32_t word;
    memcpy(&word, bytes + 4 * index, 4);
    return word;
}

TARGET INLINE __m512i pair_at(const uint8_t *pairs, long index) { return _mm512_set1_epi32((int)word_at(pairs, index)); }

TARGET INLINE __m512i codes_at(const uint8_t *codes) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes)); }

TARGET INLINE __m512 decoded(__m512i codes, __m512 scale, __m512 zero) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale, zero);
}

TARGET INLINE void put_16(uint16_t *target, __m512 x) { _mm256_storeu_si256((__m256i *)target, (__m256i)_mm512_cvtneps_pbh(x)); }

TARGET INLINE void put_32(uint16_t *target, __m512 low, __m512 high) {
    _mm512_storeu_si512(target, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* Decode `count` rows of keys of one block, which share pairs [dim]: channel by channel, so that the pairs stay in registers. */
TARGET INLINE void decode_keys(const uint8_t *rows, long width, long count, const uint32_t *pairs, int bits, long dim,
                               uint16_t *target) {
    long step = bits == 8 ? 2 * LANES : LANES, other = bits == 8 ? LANES : dim / 2;
    for (long d = 0; d < dim * bits / 8; d += step) {
        __m512i low = _mm512_loadu_si512(pairs + d), high = _mm512_loadu_si512(pairs + d + other);
        __m512 scale = scale_of(low), zero = zero_of(low), high_scale = scale_of(high), high_zero = zero_of(high);
        for (long k = 0; k < count; k++) {
            const uint8_t *row = rows + k * width + d;
            uint16_t *at = target + k * dim + d;
            __m512i codes = codes_at(row);
            if (bits == 8) {
                put_32(at, decoded(codes, scale, zero), decoded(codes_at(row + LANES), high_scale, high_zero));
                continue;
            }
            put_16(at, decoded(_mm512_and_si512(codes, _mm512_set1_epi32(15)), scale, zero));
            put_16(at + other, decoded(_mm512_srli_epi32(codes, 4), high_scale, high_zero));
        }
    }
}

/* Decode `count` rows of values. A row has pairs of 32 channels each, behind its codes. */
TARGET INLINE void decode_values(const uint8_t *rows, long width, long count, int bits, long dim, uint16_t *target) {
    long num_codes = dim * bits / 8;
    for (long k = 0; k < count; k++) {
        const uint8_t *row = rows + k * width;
        uint16_t *at = target + k * dim;
        const uint8_t *pairs = row + num_codes;
        for (long d = 0; bits == 8 && d < dim; d += 2 * LANES) {
            __m512i pair = pair_at(pairs, d / 32);
            __m512 scale = scale_of(pair), zero = zero_of(pair);
            put_32(at + d, decoded(codes_at(row + d), scale, zero), decoded(codes_at(row + d + LANES), scale, zero));
        }
        for (long d = 0; bits == 4 && d < dim / 2; d += LANES) {
            __m512i codes = codes_at(row + d), low = pair_at(pairs, d / 32);
            __m512i high = pair_at(pairs, (d + dim / 2) / 32);
            put_16(at + d, decoded(_mm512_and_si512(codes, _mm512_set1_epi32(15)), scale_of(low), zero_of(low)));
            put_16(at + d + dim / 2, decoded(_mm512_srli_epi32(codes, 4), scale_of(high), zero_of(high)));
        }
    }
}

/* The values of e4m3 without their sign, in bfloat16. */
static const uint16_t E4M3[128] = {
    0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0x3c80, 0x3c90, 0x3ca0, 0x3cb0, 0x3cc0, 0x3cd0, 0x3ce0, 0x3cf0,
    0x3d00, 0x3d10, 0x3d20, 0x3d30, 0x3d40, 0x3d50, 0x3d60, 0x3d70, 0x3d80, 0x3d90, 0x3da0, 0x3db0, 0x3dc0, 0x3dd0, 0x3de0, 0x3df0,
    0x3e00, 0x3e10, 0x3e20, 0x3e30, 0x3e40, 0x3e50, 0x3e60, 0x3e70, 0x3e80, 0x3e90, 0x3ea0, 0x3eb0, 0x3ec0, 0x3ed0, 0x3ee0, 0x3ef0,
    0x3f00, 0x3f10, 0x3f20, 0x3f30, 0x3f40, 0x3f50, 0x3f60, 0x3f70, 0x3f80, 0x3f90, 0x3fa0, 0x3fb0, 0x3fc0, 0x3fd0, 0x3fe0, 0x3ff0,
    0x4000, 0x4010, 0x4020, 0x4030, 0x4040, 0x4050, 0x4060, 0x4070, 0x4080, 0x4090, 0x40a0, 0x40b0, 0x40c0, 0x40d0, 0x40e0, 0x40f0,
    0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0x4180, 0x4190, 0x41a0, 0x41b0, 0x41c0, 0x41d0, 0x41e0, 0x41f0,
    0x4200, 0x4210, 0x4220, 0x4230, 0x4240, 0x4250, 0x4260, 0x4270, 0x4280, 0x4290, 0x42a0, 0x42b0, 0x42c0, 0x42d0, 0x42e0, 0x42f0,
    0x4300, 0x4310, 0x4320, 0x4330, 0x4340, 0x4350, 0x4360, 0x4370, 0x4380, 0x4390, 0x43a0, 0x43b0, 0x43c0, 0x43d0, 0x43e0, 0x43f0,
};

/* Decode `count` rows of fp8: 32 channels at a time, by a look-up in four vectors. */
TARGET INLINE void decode_fp8(const uint8_t *rows, long width, long count, long dim, uint16_t *target) {
    __m512i table[4];
    for (int i = 0; i < 4; i++)
        table[i] = _mm512_loadu_si512(E4M3 + 32 * i);
    for (long k = 0; k < count; k++)
        for (long d = 0; d < dim; d += 32) {
            __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(rows + k * width + d)));
            __m512i low = _mm512_permutex2var_epi16(table[0], codes, table[1]);
            __m512i high = _mm512_permutex2var_epi16(table[2], codes, table[3]);
            __m512i size = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(codes, _mm512_set1_epi16(64)), low, high);
            __m512i sign = _mm512_slli_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x80)), 8);
            _mm512_storeu_si512(target + k * dim + d, _mm512_or_si512(size, sign));
        }
}

/* How many slots from slots[0] on follow each other in one block, of at most `count`. */
static long run_of(const int32_t *slots, long count) {
    long left = TOKENS - slots[0] % TOKENS, n = 1;
    count = count < left ? count : left;
    while (n < count && slots[n] == slots[0] + n)
        n++;
    return n;
}

/* Prefetch `count` rows of keys and of values into the second cache. */
INLINE void fetch_rows(const uint8_t *keys, const uint8_t *values, long count, long width) {
    for (long at = 0; at < count * width; at += LINE) {
        _mm_prefetch((const char *)keys + at, _MM_HINT_T1);
        _mm_prefetch((const char *)values + at, _MM_HINT_T1);
    }
}

TARGET void decode_piece(const Quantized *store, long head, const int32_t *slots, long low, long high, long dim, uint16_t *keys,
                         uint16_t *values) {
    const uint8_t *key_rows = store->keys + head * store->head_stride, *value_rows = store->values + head * store->head_stride;
    const uint16_t *open_keys = store->open_keys + head * store->open_stride;
    const uint16_t *open_values = store->open_values + head * store->open_stride;
    uint32_t pairs[MAX_DIM];
    long width = store->row_bytes, num_codes = dim * store->bits / 8, share = dim / TOKENS, count;
    for (long k = low; k < high; k += count) {
        long slot = slots[k];
        count = run_of(slots + k, high - k);
        if (slot >= store->first_open) {
            memcpy(keys + k * dim, open_keys + (slot - store->first_open) * dim, (size_t)(count * dim) * 2);
            memcpy(values + k * dim, open_values + (slot - store->first_open) * dim, (size_t)(count * dim) * 2);
            continue;
        }
        const uint8_t *key = key_rows + slot * width, *value = value_rows + slot * width;
        long ahead = k + AHEAD;
        if (ahead < high && slots[ahead] < store->first_open)
            fetch_rows(key_rows + slots[ahead] * width, value_rows + slots[ahead] * width, run_of(slots + ahead, high - ahead), width);
        if (store->bits == 0) {
            decode_fp8(key, width, count, dim, keys + k * dim);
            decode_fp8(value, width, count, dim, values + k * dim);
            continue;
        }
        for (long t = 0; t < TOKENS; t++)
            for (long i = 0; i < share; i++)
                pairs[t * share + i] = word_at(key_rows + (slot / TOKENS * TOKENS + t) * width + num_codes, i);
        if (store->bits == 8) {
            decode_keys(key, width, count, pairs, 8, dim, keys + k * dim);
            decode_values(value, width, count, 8, dim, values + k * dim);
        } else {
            decode_keys(key, width, count, pairs, 4, dim, keys + k * dim);
            decode_values(value, width, count, 4, dim, values + k * dim);
        }
    }
}

#else

void decode_piece(const Quantized *store, long head, const int32_t *slots, long low, long high, long dim, uint16_t *keys,
                  uint16_t *values) {
    (void)store, (void)head, (void)slots, (void)low, (void)high, (void)dim, (void)keys, (void)values;
}

#endif
