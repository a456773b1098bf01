/* Tiles of linear_int.h in plain C, for any CPU. */
#include "linear_int_parts.h"

#include <string.h>

#define TARGET
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif
#define UNROLL
#define ROWS_OF_TILE 2
#define LEVEL int_plain
#define fetch(p) ((void)(p))
#define fetch_far fetch
#define EACH for (int i = 0; i < 16; i++)

typedef struct {
    int32_t v[16];
} VI;
typedef struct {
    float v[16];
} VF;

INLINE VI ints(int32_t v) {
    VI r;
    EACH r.v[i] = v;
    return r;
}
INLINE VF floats(float v) {
    VF r;
    EACH r.v[i] = v;
    return r;
}
INLINE VI line(const uint8_t *p) {
    VI r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
/* A float16 moved to the bits of a float32 is 2^112 times too small. */
INLINE VF halves(const uint8_t *p) {
    VF r;
    EACH {
        uint16_t half;
        memcpy(&half, p + 2 * i, sizeof half);
        uint32_t bits = ((uint32_t)half & 0x7fff) << 13 | ((uint32_t)half & 0x8000) << 16;
        memcpy(&r.v[i], &bits, sizeof bits);
        r.v[i] *= 0x1p112f;
    }
    return r;
}
/* Byte b of a lane is bits 8 b to 8 b + 7 of the 32-bit number, on little-endian CPUs. */
INLINE VI dot(VI sums, VI bytes, uint32_t word) {
    for (int b = 0; b < 4; b++) {
        int32_t x = (int8_t)(word >> (8 * b));
        EACH sums.v[i] += (int32_t)((uint32_t)bytes.v[i] >> (8 * b) & 255) * x;
    }
    return sums;
}
#define dot_small dot
INLINE VI masked(VI v, int shift, uint32_t mask) {
    EACH v.v[i] = (int32_t)((uint32_t)v.v[i] >> shift & mask);
    return v;
}
INLINE VI low_nibbles(VI v) { return masked(v, 0, 0x0f0f0f0f); }
INLINE VI high_nibbles(VI v) { return masked(v, 4, 0x0f0f0f0f); }
INLINE VF to_float(VI v) {
    VF r;
    EACH r.v[i] = (float)v.v[i];
    return r;
}
INLINE VF add(VF a, VF b) {
    EACH a.v[i] += b.v[i];
    return a;
}
INLINE VF times(VF a, VF b) {
    EACH a.v[i] *= b.v[i];
    return a;
}
INLINE VF byte_value(VI v, int j) { return add(to_float(masked(v, 8 * j, 255)), floats(-128)); }
INLINE VF nibble_table(float offset) { return floats(-offset); }
INLINE VF nibble_value(VI v, int j, VF table) { return add(to_float(masked(v, 8 * (j % 4) + j / 4 * 4, 15)), table); }
INLINE VF fused(VF a, VF b, VF c) {
    EACH c.v[i] += a.v[i] * b.v[i];
    return c;
}
INLINE void save(float *p, VF v) { memcpy(p, v.v, sizeof v.v); }

#include "linear_int_tiles.h"
