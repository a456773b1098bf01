/* Limits of the machine, for `pitlane bench kernels`. */
#ifndef PITLANE_PROBE_H
#define PITLANE_PROBE_H

#include <stddef.h>
#include <stdint.h>

/* Read all bytes: each thread its own contiguous share. Returns a sum, so that no read is left out. */
uint64_t read_bytes(const void *bytes, size_t size, int threads);

/* Operations per second (2 per multiply-add) of all threads on registers alone, measured for about `seconds`. kind: 0 float32, 1 bf16
 * pairs, 2 int8 quads. By AVX-512 if the CPU has the instruction, else by AVX2, which has no pairs. 0: by neither. */
double ceiling(int kind, int threads, double seconds);

#endif
