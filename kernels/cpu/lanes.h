/* Shared by lanes_avx2.h and lanes_avx512.h. */
#ifndef PITLANE_LANES_SHARED_H
#define PITLANE_LANES_SHARED_H

#include "vectors.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 32")

/* m * 2^-9 for m of 0 to 7 in bfloat16: the numbers of e4m3 with exponent 0. */
static const uint16_t SMALL_E4M3[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};

#endif
