/* Decodes rows of quantized keys and values into bfloat16, for the attention of attention_pieces.h.
 *
 * A block has 32 slots. A row has its codes first: int8, a byte per channel; int4, channel d in the low bits of byte d and channel
 * d + dim / 2 in the high bits; fp8, a byte per channel. Then come bfloat16 pairs (scale, zero) in the rows of int8 and int4, with
 * x = scale * code + zero: for keys, the pairs of channels [t * dim / 32, (t + 1) * dim / 32) in row t of the block, which hold for
 * all rows of the block; for values, a pair for every 32 channels of the row.
 */
#ifndef PITLANE_ATTENTION_DECODED_H
#define PITLANE_ATTENTION_DECODED_H

#include <string.h>

#include "attention_quant.h"
#include "linear_parts.h"

#define TOKENS 32
#define AHEAD 128 /* keys between a key in use and the key prefetched */

/* Copies of a fixed size: a call of memcpy would take longer than the row. */
INLINE uint32_t word_at(const uint8_t *bytes, long index) {
    uint32_t word;
    memcpy(&word, bytes + 4 * index, 4);
    return word;
}

/* The scale and the zero of a pair, for all lanes. */
TARGET INLINE Floats scale_of(uint32_t pair) { return (Floats)all_words(pair << 16); }
TARGET INLINE Floats zero_of(uint32_t pair) { return (Floats)all_words(pair & 0xffff0000); }

TARGET INLINE Floats decoded(Codes codes, Floats scale, Floats zero) { return multiply_add(float_of(codes), scale, zero); }

/* Decode `count` rows of keys of one block, which share pairs [dim]: channel by channel, so that the pairs stay in registers. */
TARGET INLINE void decode_keys(const uint8_t *rows, long width, long count, const uint32_t *pairs, int bits, long dim,
                               uint16_t *target) {
    long step = bits == 8 ? 2 * LANES : LANES, other = bits == 8 ? LANES : dim / 2;
    for (long d = 0; d < dim * bits / 8; d += step) {
        Floats scale = firsts(pairs + d), zero = seconds(pairs + d);
        Floats other_scale = firsts(pairs + d + other), other_zero = seconds(pairs + d + other);
        for (long k = 0; k < count; k++) {
            const uint8_t *row = rows + k * width + d;
            uint16_t *at = target + k * dim + d;
            Codes codes = load_codes(row), others = bits == 8 ? load_codes(row + LANES) : high_nibbles(codes);
            Floats low = decoded(bits == 8 ? codes : low_nibbles(codes), scale, zero);
            Floats high = decoded(others, other_scale, other_zero);
            if (bits == 8) {
                put_bf16_two(at, low, high);
            } else {
                put_bf16(at, low);
                put_bf16(at + other, high);
            }
        }
    }
}

/* Decode `count` rows of values. A row has pairs of 32 channels each, behind its codes. */
TARGET INLINE void decode_values(const uint8_t *rows, long width, long count, int bits, long dim, uint16_t *target) {
    long num_codes = dim * bits / 8;
    for (long k = 0; k < count; k++) {
        const uint8_t *row = rows + k * width, *pairs = row + num_codes;
        uint16_t *at = target + k * dim;
        for (long d = 0; bits == 8 && d < dim; d += 2 * LANES) {
            uint32_t pair = word_at(pairs, d / 32);
            Floats scale = scale_of(pair), zero = zero_of(pair);
            put_bf16_two(at + d, decoded(load_codes(row + d), scale, zero), decoded(load_codes(row + d + LANES), scale, zero));
        }
        for (long d = 0; bits == 4 && d < dim / 2; d += LANES) {
            Codes codes = load_codes(row + d);
            uint32_t low = word_at(pairs, d / 32), high = word_at(pairs, (d + dim / 2) / 32);
            put_bf16(at + d, decoded(low_nibbles(codes), scale_of(low), zero_of(low)));
            put_bf16(at + d + dim / 2, decoded(high_nibbles(codes), scale_of(high), zero_of(high)));
        }
    }
}

TARGET INLINE void decode_fp8(const uint8_t *rows, long width, long count, long dim, uint16_t *target) {
    for (long k = 0; k < count; k++)
        for (long d = 0; d < dim; d += 2 * LANES)
            put_words(target + k * dim + d, widen_fp8(rows + k * width + d));
}

/* How many slots from slots[0] on follow each other in one block, of at most `count`. */
static long run_of(const int32_t *slots, long count) {
    long left = TOKENS - slots[0] % TOKENS, n = 1;
    count = count < left ? count : left;
    while (n < count && slots[n] == slots[0] + n)
        n++;
    return n;
}

/* Prefetch the keys and values of a run of slots from key `at` on, at most `count`, into the second cache. */
INLINE void fetch_run(const Quantized *store, const Slots *piece, long at, long count) {
    count = count < piece->num_keys - at ? count : piece->num_keys - at;
    if (count <= 0 || piece->slots[at] >= store->first_open)
        return;
    long start = piece->head * store->head_stride + piece->slots[at] * store->row_bytes;
    for (long byte = start, stop = start + run_of(piece->slots + at, count) * store->row_bytes; byte < stop; byte += LINE) {
        _mm_prefetch((const char *)store->keys + byte, _MM_HINT_T1);
        _mm_prefetch((const char *)store->values + byte, _MM_HINT_T1);
    }
}

/* Write the keys and values [low, high) of a piece to keys, values [high - low][dim] in bfloat16. next: the piece to prefetch behind
 * the end of this piece. */
TARGET static void decode_keys_values(const Quantized *store, const Slots *piece, const Slots *next, long low, long high, long dim,
                               uint16_t *keys, uint16_t *values) {
    const uint8_t *key_rows = store->keys + piece->head * store->head_stride;
    const uint8_t *value_rows = store->values + piece->head * store->head_stride;
    const uint16_t *open_keys = store->open_keys + piece->head * store->open_stride;
    const uint16_t *open_values = store->open_values + piece->head * store->open_stride;
    const int32_t *slots = piece->slots;
    uint32_t pairs[MAX_DIM];
    long width = store->row_bytes, num_codes = dim * store->bits / 8, share = dim / TOKENS, count;
    for (long k = low; k < high; k += count, keys += count * dim, values += count * dim) {
        long slot = slots[k], ahead = k + AHEAD;
        count = run_of(slots + k, high - k);
        if (ahead < piece->num_keys)
            fetch_run(store, piece, ahead, TOKENS);
        else if (next)
            fetch_run(store, next, ahead - piece->num_keys, TOKENS);
        if (slot >= store->first_open) {
            memcpy(keys, open_keys + (slot - store->first_open) * dim, (size_t)(count * dim) * 2);
            memcpy(values, open_values + (slot - store->first_open) * dim, (size_t)(count * dim) * 2);
            continue;
        }
        const uint8_t *key = key_rows + slot * width, *value = value_rows + slot * width;
        if (store->bits == 0) {
            decode_fp8(key, width, count, dim, keys);
            decode_fp8(value, width, count, dim, values);
            continue;
        }
        for (long t = 0; t < TOKENS; t++)
            for (long i = 0; i < share; i++)
                pairs[t * share + i] = word_at(key_rows + (slot / TOKENS * TOKENS + t) * width + num_codes, i);
        if (store->bits == 8) {
            decode_keys(key, width, count, pairs, 8, dim, keys);
            decode_values(value, width, count, 8, dim, values);
        } else {
            decode_keys(key, width, count, pairs, 4, dim, keys);
            decode_values(value, width, count, 4, dim, values);
        }
    }
}

#endif
