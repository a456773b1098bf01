#include "vectors.h"

#include <stdlib.h>
#include <string.h>

#if defined(PITLANE_VECTORS)
const Vectors *vectors(void) {
    const char *forced = getenv("PITLANE_CPU_KERNELS");
    if (forced && strcmp(forced, "plain") == 0)
        return NULL;
    int is_limited = forced && strcmp(forced, "avx2") == 0;
    if (!is_limited && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return &vectors_avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &vectors_avx2 : NULL;
}
#else
const Vectors *vectors(void) { return NULL; }
#endif
