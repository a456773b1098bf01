/* Shared by lanes_avx2.h and lanes_avx512.h, which define the same types and functions for vectors of LANES numbers:
 *
 * Floats: LANES float32. all(x), zeros(); load(x), put(y, v): LANES floats in memory; load_part, put_part: the first `count` of them,
 * where others are read as 0 and are not written. multiply_add(a, b, c) = a * b + c. at_least(v, low), nearest(v): the nearest
 * integers; times_power(v, n) = v * 2^n for integers n. sum_of, largest_of, lane_0: one number of a vector. where_negative(v, a, b): a
 * where v < 0, else b. accumulate_two(sums, weights, x): sums[i] += weights[i] * *x for two sums, with the bits of a float in *x.
 * Lanes: a set of lanes. lanes_between(from, to), lanes_below(count). kept(lanes, v): v there, 0 elsewhere; largest(lanes, a, b): the
 * larger of a and b there, a elsewhere.
 * bfloat16: widen(x), widen_part; put_bf16(y, v), put_bf16_part, put_bf16_two: rounded to nearest even, where AVX-512 turns subnormal
 * numbers into 0. put_bf16_exact, round_bf16_exact: they keep subnormal numbers. firsts(pairs), seconds(pairs): the first and the
 * second numbers of LANES pairs of bfloat16.
 * Words: LANES words of 32 bits. load_words, put_words, all_words(x). put_transposed(x, y, stride): LANES vectors of words, transposed, to
 * rows of y that lie `stride` words apart; y is aligned to a vector. put_in_turn(y, even, odd): the numbers of two vectors in turn.
 * Codes: LANES codes of a byte or half a byte, a word each. load_codes, low_nibbles, high_nibbles, float_of. widen_fp8(x): 2 LANES
 * bytes of e4m3 as LANES pairs of bfloat16. */
#ifndef PITLANE_LANES_SHARED_H
#define PITLANE_LANES_SHARED_H

#include "vectors.h"

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 32")
#endif

/* m * 2^-9 for m of 0 to 7 in bfloat16: the numbers of e4m3 with exponent 0. */
static const uint16_t SMALL_E4M3[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};

#endif
