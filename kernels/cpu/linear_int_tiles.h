/* The tiles of one level. The including file defines TARGET, INLINE, UNROLL, ROWS_OF_TILE (2, 4 or 12), LEVEL and these operations on vectors of 16:
 *   VI (int32), VF (float); ints(v), floats(v): all lanes v; line(p): load 64 bytes; halves(p): load 16 float16;
 *   dot(sums, bytes, word): sums += the 4 unsigned bytes of a lane times the 4 signed bytes of word; dot_small: bytes below 16;
 *   low_nibbles(v), high_nibbles(v); byte_value(v, j): byte j - 128 as float; nibble_value(v, j, table): nibble j by a table of VF;
 *   nibble_table(offset): a table of n - offset; to_float(v); fused(a, b, c) = a b + c; add(a, b), times(a, b); save(p, v);
 *   fetch(p), fetch_far(p): prefetch into the first and the second cache; with WIDE_ROWS also dot_vectors(sums, bytes, words), load(p),
 *   save_line(p, v).
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
                fetch_far(w + ahead);                                                                                                \
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
                fetch_far(w + ahead);                                                                                                \
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
    if (job->wide == INT_FLOATS) {
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
    long stride = job->ins * (job->wide == INT_FLOATS ? 4 : 2);
    for (long m = 0; m < count; m++)
        prepare_row(job, (const char *)x + (first + m) * stride, to->x + first * to->row_bytes, to->sums + first * to->groups,
                    to->scales + first * to->groups, m, count);
}

#ifndef finish_panel
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

/* Write the outputs of a panel: sums [count][stride], of the rows from `first` on. */
TARGET INLINE void finish_panel(const IntLinear *job, const float *sums, long stride, void *y, long first, long count, long panel) {
    _Alignas(64) float factors[INT_PANEL], bias[INT_PANEL];
    long from = panel * INT_PANEL, outs = smaller(job->outs - from, INT_PANEL);
    for (long i = 0; i < INT_PANEL; i++) {
        factors[i] = job->bits == 4 ? job->unit : i < outs ? job->scales[from + i] : 0;
        bias[i] = job->bias && i < outs ? job->bias[from + i] : 0;
    }
    for (long m = 0; m < count; m++)
        finish_row(sums + m * stride, factors, job->bias ? bias : 0, outs, job->wide,
                   (char *)y + ((first + m) * job->outs + from) * (job->wide ? 4 : 2));
}
#endif

/* Rows [first, first + count) are one tile. */
TARGET static void panels(const IntLinear *job, const Prepared *from, void *y, long first, long count, long panel, long end) {
    IntTile tile = tiles[job->bits == 4][job->quantized != 0][count];
    const char *x = from->x + first * from->row_bytes;
    const int32_t *sums = from->sums + first * from->groups;
    const float *scales = from->scales + first * from->groups;
    long ahead = prefetch_distance(job->bits, count);
    size_t stride = int_panel_bytes(job);
    for (; panel < end; panel++) {
        _Alignas(64) float out[ROWS_OF_TILE * INT_PANEL];
        tile(job, x, sums, scales, job->w + (size_t)panel * stride, ahead, out);
        finish_panel(job, out, INT_PANEL, y, first, count, panel);
    }
}

#ifdef WIDE_ROWS
/* ---- many rows of quantized inputs
 *
 * A wide tile is two panels times up to WIDE_ROWS rows, so that a broadcast of inputs serves two products. Its totals lie in memory,
 * because its sums fill the registers. The inputs are cut into blocks: a block of two panels stays in the first cache while all
 * tiles of rows read it. The first tile unpacks nibbles to bytes for the tiles after it. The sums of a row and an output are the
 * sums of the other tiles, in the same order. */
enum { BLOCK = 512, BLOCK_LINES = BLOCK / 4, BLOCK_GROUPS = BLOCK / 32 }; /* inputs: a multiple of two groups of every size */

/* A block of two panels: `count` lines of bytes, an even number; of groups of nibbles also the scales and lows [groups][16]. */
typedef struct {
    const uint8_t *w[2], *next; /* packed weights, and weights to prefetch */
    uint8_t *lines[2];
    float *scales[2], *lows[2];
    long count, group_lines;
} Block;

enum { WIDE_BYTES, WIDE_SYMMETRIC, WIDE_LOWS, WIDE_KINDS };

/* Add the products of a line of two panels and of a word of every row to sums a and b. */
TARGET INLINE void multiply_line(int rows, VI *a, VI *b, VI first, VI second, const uint32_t *x) {
    UNROLL for (int m = 0; m < rows; m++) {
        VI word = ints((int32_t)x[m]);
        a[m] = dot_vectors(a[m], first, word);
        b[m] = dot_vectors(b[m], second, word);
    }
}

/* Add the sums of a group to a panel's totals [rows][2][16]. */
TARGET INLINE void add_group(int rows, int kind, const VI *acc, VF scale, VF low, const float *scales, const float *sums,
                             float *totals) {
    UNROLL for (int m = 0; m < rows; m++) {
        VF sum = to_float(acc[m]);
        sum = fused(kind == WIDE_BYTES ? sum : times(sum, scale), floats(scales[m]), load(totals + 32 * m));
        save(totals + 32 * m, kind == WIDE_LOWS ? fused(low, floats(sums[m]), sum) : sum);
    }
}

/* Add the products of a block to totals [rows][2][16]. sums, scales: of the inputs, [groups of the block][rows]. unpacks: read
 * nibbles from w, and write the block's lines, scales and lows. */
TARGET INLINE void wide_tile(int rows, int kind, int unpacks, const Block *block, const uint32_t *x, const int32_t *sums,
                             const float *scales, float *totals) {
    const long header = kind == WIDE_LOWS ? 128 : 64, step = kind == WIDE_BYTES ? 128 : 80;
    const uint8_t *w = block->w[0], *w2 = block->w[1], *head = w, *head2 = w2, *next = block->next;
    uint8_t *lines = block->lines[0], *lines2 = block->lines[1];
    for (long left = block->count, g = 0; left > 0; left -= block->group_lines, sums += rows, scales += rows, g++) {
        VI a[WIDE_ROWS], b[WIDE_ROWS];
        const int32_t *sums2 = sums;
        __asm__("" : "+r"(totals), "+r"(sums2)); /* else gcc keeps totals on the stack over all groups, and copies a to b */
        UNROLL for (int m = 0; m < rows; m++) a[m] = ints(kind == WIDE_LOWS ? 0 : sums[m]);
        UNROLL for (int m = 0; m < rows; m++) b[m] = ints(kind == WIDE_LOWS ? 0 : sums2[m]);
        if (unpacks && g % 2 == 0)
            head = w, head2 = w2, w += header, w2 += header;
        long count = smaller(left, block->group_lines);
        do {
            fetch_far(next);
            if (step == 128)
                fetch_far(next + 64);
            if (unpacks) {
                VI both = line(w), both2 = line(w2), first = low_nibbles(both), second = low_nibbles(both2);
                save_line(lines, first);
                save_line(lines2, second);
                multiply_line(rows, a, b, first, second, x);
                first = high_nibbles(both), second = high_nibbles(both2);
                save_line(lines + 64, first);
                save_line(lines2 + 64, second);
                multiply_line(rows, a, b, first, second, x + rows);
                w += 64, w2 += 64;
            } else {
                multiply_line(rows, a, b, line(lines), line(lines2), x);
                multiply_line(rows, a, b, line(lines + 64), line(lines2 + 64), x + rows);
            }
            x += 2 * rows, lines += 128, lines2 += 128, next += step;
        } while ((count -= 2) > 0);
        for (int panel = 0; panel < 2; panel++) {
            const uint8_t *half = (panel ? head2 : head) + g % 2 * 32;
            float *to = block->scales[panel] + 16 * g, *to_low = block->lows[panel] + 16 * g;
            VF scale = floats(0), low = scale;
            if (kind != WIDE_BYTES)
                scale = unpacks ? halves(half) : load(to);
            if (kind == WIDE_LOWS)
                low = unpacks ? halves(half + 64) : load(to_low);
            if (unpacks)
                save(to, scale);
            if (unpacks && kind == WIDE_LOWS)
                save(to_low, low);
            add_group(rows, kind, panel ? b : a, scale, low, scales, (const float *)sums, totals + 16 * panel);
        }
    }
}

typedef void (*WideTile)(const Block *block, const uint32_t *x, const int32_t *sums, const float *scales, float *totals);

#define DEFINE_WIDE(ROWS, KIND, UNPACKS)                                                                                             \
    TARGET static void wide_##ROWS##_##KIND##_##UNPACKS(const Block *block, const uint32_t *x, const int32_t *sums,                  \
                                                        const float *scales, float *totals) {                                        \
        wide_tile(ROWS, KIND, UNPACKS, block, x, sums, scales, totals);                                                              \
    }
#define DEFINE_WIDES(KIND, UNPACKS)                                                                                                  \
    DEFINE_WIDE(6, KIND, UNPACKS)                                                                                                    \
    DEFINE_WIDE(7, KIND, UNPACKS)                                                                                                    \
    DEFINE_WIDE(8, KIND, UNPACKS)                                                                                                    \
    DEFINE_WIDE(9, KIND, UNPACKS)                                                                                                    \
    DEFINE_WIDE(10, KIND, UNPACKS)                                                                                                   \
    DEFINE_WIDE(11, KIND, UNPACKS)                                                                                                   \
    DEFINE_WIDE(12, KIND, UNPACKS)                                                                                                   \
    static const WideTile wide_##KIND##_##UNPACKS[] = {wide_6_##KIND##_##UNPACKS, wide_7_##KIND##_##UNPACKS,                         \
                                                       wide_8_##KIND##_##UNPACKS, wide_9_##KIND##_##UNPACKS,                         \
                                                       wide_10_##KIND##_##UNPACKS, wide_11_##KIND##_##UNPACKS,                       \
                                                       wide_12_##KIND##_##UNPACKS};
DEFINE_WIDES(WIDE_BYTES, 0)
DEFINE_WIDES(WIDE_SYMMETRIC, 0)
DEFINE_WIDES(WIDE_SYMMETRIC, 1)
DEFINE_WIDES(WIDE_LOWS, 0)
DEFINE_WIDES(WIDE_LOWS, 1)

/* By kind, and by whether the tile unpacks; entry i is for WIDE_MIN_ROWS + i rows. */
static const WideTile *const wide_tiles[WIDE_KINDS][2] = {{wide_WIDE_BYTES_0, wide_WIDE_BYTES_0},
                                                          {wide_WIDE_SYMMETRIC_0, wide_WIDE_SYMMETRIC_1},
                                                          {wide_WIDE_LOWS_0, wide_WIDE_LOWS_1}};

/* The panels [panel, end), an even number, for the tiles [tile, last) of `tiles` tiles of all rows. */
TARGET static void wide(const IntLinear *job, const Prepared *from, void *y, long rows, long tiles, long tile, long last, long panel,
                        long end) {
    _Alignas(64) float totals[WIDE_TILES * WIDE_ROWS * 32], scales[2][BLOCK_GROUPS * 16], lows[2][BLOCK_GROUPS * 16];
    _Alignas(64) uint8_t bytes[2][BLOCK_LINES * 64];
    long stride = (long)int_panel_bytes(job), words = (job->ins + 3) / 4, size = job->group;
    long block_bytes = job->bits == 8 ? BLOCK_LINES * 64 : BLOCK * 8 + BLOCK / size / 2 * (job->symmetric ? 64 : 128);
    int kind = job->bits == 8 ? WIDE_BYTES : job->symmetric ? WIDE_SYMMETRIC : WIDE_LOWS;
    long start = share(rows, tiles, tile), count = share(rows, tiles, last) - start;
    for (; panel < end; panel += 2) {
        const uint8_t *w = job->w + panel * stride;
        memset(totals, 0, (size_t)count * 32 * sizeof(float));
        for (long k = 0; k < words; k += BLOCK_LINES, w += block_bytes) {
            const uint8_t *next = k + BLOCK_LINES < words ? w + block_bytes : job->w + (panel + 2) * stride;
            Block block = {.w = {w, w + stride}, .lines = {bytes[0], bytes[1]}, .count = smaller(words - k, BLOCK_LINES)};
            block.group_lines = size / 4;
            for (int i = 0; i < 2; i++) {
                block.scales[i] = scales[i], block.lows[i] = lows[i];
                if (kind == WIDE_BYTES)
                    block.lines[i] = (uint8_t *)w + i * stride;
            }
            for (long i = tile; i < last; i++) {
                long first = share(rows, tiles, i), height = share(rows, tiles, i + 1) - first, at = k * 4 / size * height;
                block.next = i - tile < 2 ? next + (i - tile) * stride : block.lines[0];
                wide_tiles[kind][i == tile][height - WIDE_MIN_ROWS](
                    &block, (const uint32_t *)(from->x + first * from->row_bytes) + k * height, from->sums + first * from->groups + at,
                    from->scales + first * from->groups + at, totals + (first - start) * 32);
            }
        }
        for (int i = 0; i < 2; i++)
            finish_panel(job, totals + 16 * i, 32, y, start, count, panel + i);
    }
}
#else
#define wide 0
#endif

const IntLevel LEVEL = {ROWS_OF_TILE, prepare, panels, wide};
