#ifndef PITLANE_PROBE_H
#define PITLANE_PROBE_H

#include <stdint.h>

/* Read memory as a decode step reads weights: each thread loads its own contiguous part. Returns a sum of what it read. */
uint64_t memory_read(const char *memory, int64_t bytes, int threads);

#endif
