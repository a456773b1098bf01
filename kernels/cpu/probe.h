/* Limits of the machine, for `pitlane bench kernels`. */
#ifndef PITLANE_PROBE_H
#define PITLANE_PROBE_H

#include <stddef.h>
#include <stdint.h>

/* Read all bytes: each thread its own contiguous share. Returns a sum, so that no read is left out. */
uint64_t read_bytes(const void *bytes, size_t size, int threads);

/* Operations per second (2 per multiply-add) of all threads on registers alone, measured for about `seconds`. kind: 0 float32, 1 bf16
 * pairs, 2 int8 quads. 0 if the CPU lacks AVX-512 with the instruction. */
double ceiling(int kind, int threads, double seconds);

#endif
