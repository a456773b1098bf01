#include "vectors.h"

#include "levels.h"

#if defined(PITLANE_VECTORS)
const Vectors *vectors(void) {
    int allowed = allowed_level();
    if (allowed >= LEVEL_AVX512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return &vectors_avx512;
    return allowed >= LEVEL_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &vectors_avx2 : NULL;
}

int vectors_level(void) {
    const Vectors *best = vectors();
    return best == &vectors_avx512 ? LEVEL_AVX512 : best ? LEVEL_AVX2 : LEVEL_PLAIN;
}
#else
const Vectors *vectors(void) { return NULL; }
int vectors_level(void) { return LEVEL_PLAIN; }
#endif
