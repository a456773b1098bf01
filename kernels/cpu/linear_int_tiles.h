/* The tiles of one level. The including file defines TARGET, INLINE, UNROLL, ROWS_OF_TILE (2, 4 or 12), LEVEL and these operations on vectors of 16:
 *   VI (int32), VF (float); ints(v), floats(v): all lanes v; line(p): load 64 bytes; halves(p): load 16 float16;
 *   dot(sums, bytes, word): sums += the 4 unsigned bytes of a lane times the 4 signed bytes of word; dot_small: bytes below 16;
 *   low_nibbles(v), high_nibbles(v); byte_value(v, j): byte j - 128 as float; nibble_value(v, j, table): nibble j by a table of VF;
 *   nibble_table(offset): a table of n - offset; to_float(v); fused(a, b, c) = a b + c; add(a, b), times(a, b); save(p, v); fetch(p): prefetch.
 *
 * A tile is a few rows of inputs times a panel. Sums within a group are integers if inputs are quantized, else chains over a group (4
 * bits) or over 32 inputs (8 bits); they are added in the order of the groups. The processor works on several chains at once. The loops test
 * their end last: with a loop that may run zero times, gcc 12 copies all sums in every turn.
 */
#include "linear_int_parts.h"

#include <string.h>

#define CHAIN 8 /* lines in a chain, with 8 bits */

INLINE long smaller(long a, long b) { return a < b ? a : b; }

#define DEFINE_TILES(ROWS)                                                                                                           \
    TARGET static void bytes_quantized_##ROWS(const IntLinear *job, const void *inputs, const void *group_sums,                      \
                                              const float *scales, const uint8_t *w, long ahead, float *out) {                       \
        const uint32_t *x = inputs;                                                                                                  \
        const int32_t *sums = group_sums;                                                                                            \
        VF total[ROWS];                                                                                                              \
        UNROLL for (int m = 0; m < ROWS; m++) total[m] = floats(0);                                                                  \
        for (long left = (job->ins + 3) / 4, lines = job->group / 4; left > 0; left -= lines, sums += ROWS, scales += ROWS) {        \
            VI acc[ROWS];                                                                                                            \
            UNROLL for (int m = 0; m < ROWS; m++) acc[m] = ints(sums[m]);                                                            \
            long end = smaller(left, lines);                                                                                         \
            do {                                                                                                                     \
                VI bytes = line(w);                                                                                                  \
                fetch(w + ahead);                                                                                                    \
                UNROLL for (int m = 0; m < ROWS; m++) acc[m] = dot(acc[m], bytes, x[m]);                                             \
                x += ROWS, w += 64;                                                                                                  \
            } while (--end > 0);                                                                                                     \
            UNROLL for (int m = 0; m < ROWS; m++) total[m] = fused(to_float(acc[m]), floats(scales[m]), total[m]);                   \
        }                                                                                                                            \
        UNROLL for (int m = 0; m < ROWS; m++) save(out + 16 * m, total[m]);                                                          \
    }                                                                                                                                \
    TARGET static void bytes_float_##ROWS(const IntLinear *job, const void *inputs, const void *group_sums,                          \
                                              const float *scales, const uint8_t *w, long ahead, float *out) {                       \
        const float *x = inputs;                                                                                                     \
        VF total[ROWS];                                                                                                              \
        (void)group_sums, (void)scales;                                                                                              \
        UNROLL for (int m = 0; m < ROWS; m++) total[m] = floats(0);                                                                  \
        for (long left = (job->ins + 3) / 4; left > 0; left -= CHAIN) {                                                              \
            VF acc[ROWS];                                                                                                            \
            UNROLL for (int m = 0; m < ROWS; m++) acc[m] = floats(0);                                                                \
            long end = smaller(left, CHAIN);                                                                                         \
            do {                                                                                                                     \
                VI bytes = line(w);                                                                                                  \
                fetch(w + ahead);                                                                                                    \
                UNROLL for (int j = 0; j < 4; j++) {                                                                                 \
                    VF value = byte_value(bytes, j);                                                                                 \
                    UNROLL for (int m = 0; m < ROWS; m++) acc[m] = fused(value, floats(x[j * ROWS + m]), acc[m]);                    \
                }                                                                                                                    \
                x += 4 * ROWS, w += 64;                                                                                              \
            } while (--end > 0);                                                                                                     \
            UNROLL for (int m = 0; m < ROWS; m++) total[m] = add(total[m], acc[m]);                                                  \
        }                                                                                                                            \
        UNROLL for (int m = 0; m < ROWS; m++) save(out + 16 * m, total[m]);                                                          \
    }                                                                                                                                \
    TARGET static void nibbles_quantized_##ROWS(const IntLinear *job, const void *inputs, const void *group_sums,                    \
                                              const float *scales, const uint8_t *w, long ahead, float *out) {                       \
        const uint32_t *x = inputs;                                                                                                  \
        const int32_t *sums = group_sums;                                                                                            \
        const uint8_t *halves_ = w;                                                                                                  \
        long groups = job->ins / job->group, lines = job->group / 8, header = job->symmetric ? 64 : 128;                             \
        VF total[ROWS];                                                                                                              \
        UNROLL for (int m = 0; m < ROWS; m++) total[m] = floats(0);                                                                  \
        for (long g = 0; g < groups; g++, sums += ROWS, scales += ROWS) {                                                            \
            VI acc[ROWS];                                                                                                            \
            if (g % 2 == 0)                                                                                                          \
                halves_ = w, w += header;                                                                                            \
            UNROLL for (int m = 0; m < ROWS; m++) acc[m] = ints(job->symmetric ? sums[m] : 0);                                       \
            long i = lines;                                                                                                          \
            do {                                                                                                                     \
                VI both = line(w), low = low_nibbles(both), high = high_nibbles(both);                                               \
                fetch(w + ahead);                                                                                                    \
                UNROLL for (int m = 0; m < ROWS; m++) acc[m] = dot_small(acc[m], low, x[m]);                                         \
                UNROLL for (int m = 0; m < ROWS; m++) acc[m] = dot_small(acc[m], high, x[ROWS + m]);                                 \
                x += 2 * ROWS, w += 64;                                                                                              \
            } while (--i > 0);                                                                                                       \
            VF scale = halves(halves_ + g % 2 * 32);                                                                                 \
            UNROLL for (int m = 0; m < ROWS; m++) total[m] = fused(times(to_float(acc[m]), scale), floats(scales[m]), total[m]);     \
            if (!job->symmetric) {                                                                                                   \
                VF low = halves(halves_ + 64 + g % 2 * 32);                                                                          \
                UNROLL for (int m = 0; m < ROWS; m++) total[m] = fused(low, floats(((const float *)sums)[m]), total[m]);             \
            }                                                                                                                        \
        }                                                                                                                            \
        UNROLL for (int m = 0; m < ROWS; m++) save(out + 16 * m, total[m]);                                                          \
    }                                                                                                                                \
    TARGET static void nibbles_float_##ROWS(const IntLinear *job, const void *inputs, const void *group_sums,                        \
                                              const float *scales, const uint8_t *w, long ahead, float *out) {                       \
        const float *x = inputs, *sums = group_sums;                                                                                 \
        const uint8_t *halves_ = w;                                                                                                  \
        long groups = job->ins / job->group, lines = job->group / 8, header = job->symmetric ? 64 : 128;                             \
        (void)scales;                                                                                                                \
        VF total[ROWS], table = nibble_table(job->symmetric ? 8.0f : 0.0f);                                                          \
        UNROLL for (int m = 0; m < ROWS; m++) total[m] = floats(0);                                                                  \
        for (long g = 0; g < groups; g++, sums += ROWS) {                                                                            \
            VF acc[ROWS];                                                                                                            \
            if (g % 2 == 0)                                                                                                          \
                halves_ = w, w += header;                                                                                            \
            UNROLL for (int m = 0; m < ROWS; m++) acc[m] = floats(0);                                                                \
            long i = lines;                                                                                                          \
            do {                                                                                                                     \
                VI both = line(w);                                                                                                   \
                fetch(w + ahead);                                                                                                    \
                UNROLL for (int j = 0; j < 8; j++) {                                                                                 \
                    VF value = nibble_value(both, j, table);                                                                         \
                    UNROLL for (int m = 0; m < ROWS; m++) acc[m] = fused(value, floats(x[j * ROWS + m]), acc[m]);                    \
                }                                                                                                                    \
                x += 8 * ROWS, w += 64;                                                                                              \
            } while (--i > 0);                                                                                                       \
            VF scale = halves(halves_ + g % 2 * 32);                                                                                 \
            UNROLL for (int m = 0; m < ROWS; m++) total[m] = fused(acc[m], scale, total[m]);                                         \
            if (!job->symmetric) {                                                                                                   \
                VF low = halves(halves_ + 64 + g % 2 * 32);                                                                          \
                UNROLL for (int m = 0; m < ROWS; m++) total[m] = fused(low, floats(sums[m]), total[m]);                              \
            }                                                                                                                        \
        }                                                                                                                            \
        UNROLL for (int m = 0; m < ROWS; m++) save(out + 16 * m, total[m]);                                                          \
    }

DEFINE_TILES(1)
DEFINE_TILES(2)
#if ROWS_OF_TILE > 2
DEFINE_TILES(3)
DEFINE_TILES(4)
#endif
#if ROWS_OF_TILE > 4
DEFINE_TILES(5)
DEFINE_TILES(6)
DEFINE_TILES(7)
DEFINE_TILES(8)
DEFINE_TILES(9)
DEFINE_TILES(10)
DEFINE_TILES(11)
DEFINE_TILES(12)
#define ALL_ROWS(kind)                                                                                                               \
    {0, kind##_1, kind##_2, kind##_3, kind##_4, kind##_5, kind##_6, kind##_7, kind##_8, kind##_9, kind##_10, kind##_11, kind##_12}
#elif ROWS_OF_TILE == 4
#define ALL_ROWS(kind) {0, kind##_1, kind##_2, kind##_3, kind##_4}
#else
#define ALL_ROWS(kind) {0, kind##_1, kind##_2}
#endif

/* By whether the weights are nibbles and whether the inputs are quantized. */
static const IntTile tiles[2][2][ROWS_OF_TILE + 1] = {{ALL_ROWS(bytes_float), ALL_ROWS(bytes_quantized)},
                                                      {ALL_ROWS(nibbles_float), ALL_ROWS(nibbles_quantized)}};

/* The inputs [begin, end) of a row as floats. */
TARGET INLINE void read_inputs(const IntLinear *job, const void *x, long begin, long end, float *to) {
    if (job->wide) {
        memcpy(to, (const float *)x + begin, (size_t)(end - begin) * sizeof(float));
        return;
    }
    const uint16_t *from = (const uint16_t *)x + begin;
    for (long k = 0; k < end - begin; k++) {
        uint32_t bits = (uint32_t)from[k] << 16;
        memcpy(to + k, &bits, sizeof bits);
    }
}

/* The largest absolute value. Compares the bits as integers, so that NaN is larger than all numbers. */
TARGET INLINE float largest(const float *values, long count) {
    uint32_t maximum = 0;
    float value;
    for (long k = 0; k < count; k++) {
        uint32_t bits;
        memcpy(&bits, values + k, sizeof bits);
        bits &= 0x7fffffff;
        maximum = bits > maximum ? bits : maximum;
    }
    memcpy(&value, &maximum, sizeof value);
    return value;
}

enum { PIECE = 1024 }; /* inputs converted at a time: a multiple of every group size */

/* Round a group to bytes. Returns the sum of the bytes. */
TARGET INLINE int32_t quantize(const float *values, long count, int8_t *bytes, float *scale) {
    float maximum = largest(values, count), factor = maximum > 1e-30f ? 127.0f / maximum : 0.0f;
    int32_t sum = 0;
    *scale = maximum / 127.0f;
    for (long k = 0; k < count; k++) { /* adding 1.5 * 2^23 rounds to the nearest integer, half to even */
        float rounded = values[k] * factor + 12582912.0f;
        int32_t bits;
        memcpy(&bits, &rounded, sizeof bits);
        bytes[k] = (int8_t)bits;
    }
    for (long k = 0; k < count; k++)
        sum += bytes[k];
    return sum;
}

/* Write row m of a tile of n rows. */
TARGET static void prepare_row(const IntLinear *job, const void *x, char *to, int32_t *sums, float *scales, long m, long n) {
    float values[PIECE];
    int8_t bytes[PIECE];
    long group = job->group;
    int lows = job->bits == 4 && !job->symmetric;
    for (long begin = 0; begin < job->ins; begin += PIECE) {
        long count = smaller(job->ins - begin, PIECE), padded = (count + 3) / 4 * 4;
        read_inputs(job, x, begin, begin + count, values);
        for (long k = count; k < padded; k++)
            values[k] = 0;
        for (long k = 0; k < padded; k += group) {
            long size = smaller(group, padded - k), at = (begin + k) / group * n + m;
            float sum = 0;
            if (job->quantized) {
                int32_t whole = quantize(values + k, size, bytes + k, scales + at);
                sum = (float)whole * scales[at];
                sums[at] = whole * (job->bits == 8 ? -128 : -8);
            } else if (lows)
                for (long i = 0; i < size; i++)
                    sum += values[k + i];
            if (lows)
                memcpy(sums + at, &sum, sizeof sum);
        }
        if (job->quantized) {
            uint32_t *target = (uint32_t *)to + begin / 4 * n + m, word;
            for (long k = 0; k < padded; k += 4) {
                memcpy(&word, bytes + k, sizeof word);
                target[k / 4 * n] = word;
            }
        } else {
            float *target = (float *)to + begin * n + m;
            for (long k = 0; k < padded; k++)
                target[k * n] = values[k];
        }
    }
}

TARGET static void prepare(const IntLinear *job, const Prepared *to, const void *x, long first, long count) {
    long stride = job->ins * (job->wide ? 4 : 2);
    for (long m = 0; m < count; m++)
        prepare_row(job, (const char *)x + (first + m) * stride, to->x + first * to->row_bytes, to->sums + first * to->groups,
                    to->scales + first * to->groups, m, count);
}

/* Write the first `count` of 16 outputs of a row: sums * scales + bias, where bias may be NULL. The compiler turns loops of 16 turns
 * into vectors; gcc 12 does so with the rounding only if it does not unroll that loop first. In vectors, a linear of 8 bits with 576
 * inputs takes 0.6 to 0.85 of the time for 8 to 64 rows (Xeon, one thread). */
TARGET INLINE void finish_row(const float *restrict sums, const float *restrict scales, const float *restrict bias, long count,
                              int wide, void *restrict y) {
    float values[INT_PANEL];
    uint32_t bits[INT_PANEL];
    uint16_t halves_[INT_PANEL];
    for (int i = 0; i < INT_PANEL; i++)
        values[i] = sums[i] * scales[i];
    if (bias)
        for (int i = 0; i < INT_PANEL; i++)
            values[i] += bias[i];
    if (wide) {
        memcpy(y, values, (size_t)count * sizeof(float));
        return;
    }
    memcpy(bits, values, sizeof bits);
    _Pragma("GCC unroll 1") for (int i = 0; i < INT_PANEL; i++) { /* round to bfloat16, half to even; NaN stays NaN */
        uint32_t even = (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16, nan = bits[i] >> 16 | 64;
        halves_[i] = (uint16_t)((bits[i] & 0x7fffffff) > 0x7f800000 ? nan : even);
    }
    if (count == INT_PANEL)
        memcpy(y, halves_, sizeof halves_);
    else
        memcpy(y, halves_, (size_t)count * sizeof(uint16_t));
}

/* Rows [first, first + count) are one tile. */
TARGET static void panels(const IntLinear *job, const Prepared *from, void *y, long first, long count, long panel, long end) {
    IntTile tile = tiles[job->bits == 4][job->quantized != 0][count];
    const char *x = from->x + first * from->row_bytes;
    const int32_t *sums = from->sums + first * from->groups;
    const float *scales = from->scales + first * from->groups;
    long ahead = prefetch_distance(count);
    size_t stride = int_panel_bytes(job);
    for (; panel < end; panel++) {
        _Alignas(64) float out[ROWS_OF_TILE * INT_PANEL], factors[INT_PANEL], bias[INT_PANEL];
        long from = panel * INT_PANEL, outs = smaller(job->outs - from, INT_PANEL);
        for (long i = 0; i < INT_PANEL; i++) {
            factors[i] = job->bits == 4 ? job->unit : i < outs ? job->scales[from + i] : 0;
            bias[i] = job->bias && i < outs ? job->bias[from + i] : 0;
        }
        tile(job, x, sums, scales, job->w + (size_t)panel * stride, ahead, out);
        for (long m = 0; m < count; m++)
            finish_row(out + m * INT_PANEL, factors, job->bias ? bias : 0, outs, job->wide,
                       (char *)y + ((first + m) * job->outs + from) * (job->wide ? 4 : 2));
    }
}

const IntLevel LEVEL = {ROWS_OF_TILE, prepare, panels};
