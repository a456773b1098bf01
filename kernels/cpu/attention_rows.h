/* The rows of a piece of keys and values: scores, weights, and weighted sums of values, in vectors. Part of attention_pieces.h. */
#ifndef PITLANE_ATTENTION_ROWS_H
#define PITLANE_ATTENTION_ROWS_H

#include "exponential.h"
#include "linear_products.h"

#define MAX_KEYS 512
#define KEYS OUTS /* keys scored at a time */
#define BROAD 4   /* largest number of vectors of values that a row sums at a time */
#define ROWS MAX_TILE /* scored at a time */
#define SUMMED (HAS_PAIRS ? 6 : 2) /* rows whose values are summed at a time, with BROAD sums each */

/* Products of queries and keys: dot products of pairs where the CPU has them. WORDS: of a query, per pair of dimensions. */
#if HAS_PAIRS
#define scores_added pairs_added
#define WORDS 1
#else
#define scores_added floats_added
#define WORDS 2
#endif

/* The keys and values of one task and KV head. */
typedef struct {
    const uint16_t *keys, *values;
    const int32_t *slots;
    long num_keys;
} Piece;

/* One query head of a member, which sees the keys [low, high) of the piece. */
typedef struct {
    const uint32_t *q;
    float *sums; /* [dim] weighted sums of values, then the sum of weights, then the largest score */
    long low, high;
} Row;

typedef void (*Score)(const uint32_t *q, const uint32_t *keys, long pairs, float *scores, float scale);

/* scores [rows][MAX_KEYS], of 32 keys: scale times q [pairs][WORDS][rows] times keys [pairs][32]. */
#define DEFINE_SCORE(COUNT)                                                                                                          \
    TARGET static void score_##COUNT(const uint32_t *queries, const uint32_t *keys, long pairs, float *scores, float scale) {        \
        enum { WIDTH = WIDTH_OF(COUNT) };                                                                                            \
        UNROLLED for (int part = 0; part < COLUMNS; part += WIDTH) {                                                                 \
            Floats sums[COUNT * WIDTH];                                                                                              \
            const uint32_t *q = queries;                                                                                             \
            const char *k = (const char *)keys + part * 4 * LANES;                                                                   \
            UNROLLED for (int i = 0; i < COUNT * WIDTH; i++)                                                                         \
                sums[i] = zeros();                                                                                                   \
            for (long pair = 0; pair < pairs; pair++, q += WORDS * COUNT, k += PAIR)                                                 \
                scores_added(COUNT, WIDTH, sums, k, q);                                                                              \
            UNROLLED for (int i = 0; i < COUNT * WIDTH; i++)                                                                         \
                put(scores + i / WIDTH * MAX_KEYS + (part + i % WIDTH) * LANES, multiply(sums[i], all(scale)));                      \
        }                                                                                                                            \
    }
EACH_ROW(DEFINE_SCORE)
#define SCORE(COUNT) score_##COUNT,
static const Score score[ROWS + 1] = {0, EACH_ROW(SCORE)};

/* The keys [at, at + LANES) that a row sees. */
TARGET INLINE Lanes seen(const Row *row, long at) {
    return lanes_between(minimum(maximum(row->low - at, 0), LANES), minimum(maximum(row->high - at, 0), LANES));
}

/* Replace the scores of keys [low, high) by weights exp(score - largest score), or 0 for keys that the row does not see. Store the
 * sum of the weights and the largest score in the row. */
TARGET static void weigh(float *scores, const Row *row, long low, long high, long dim) {
    Floats top = all(-__builtin_inff()), sum = zeros();
    for (long at = low; at < high; at += LANES)
        top = largest(seen(row, at), top, load(scores + at));
    row->sums[dim + 1] = largest_of(top);
    top = all(row->sums[dim + 1]);
    for (long at = low; at < high; at += LANES) {
        Floats weight = kept(seen(row, at), exponential(subtract(load(scores + at), top)));
        sum = add(sum, weight);
        put(scores + at, weight);
    }
    row->sums[dim] = sum_of(sum);
}

typedef void (*Sum)(const float *weights, const Piece *piece, long low, long high, long dim, long d, const Row *rows);

/* Weighted sums of the values [low, high), key after key: WIDTH vectors of dimensions from d on. weights: [rows][MAX_KEYS]. */
#define DEFINE_SUM(COUNT, WIDTH)                                                                                                     \
    TARGET static void sum_##COUNT##_##WIDTH(const float *weights, const Piece *piece, long low, long high, long dim, long d,        \
                                             const Row *rows) {                                                                      \
        Floats sum[COUNT][WIDTH];                                                                                                    \
        UNROLLED for (int i = 0; i < COUNT * WIDTH; i++)                                                                             \
            sum[i / WIDTH][i % WIDTH] = zeros();                                                                                     \
        for (long k = low; k < high; k++) {                                                                                          \
            const uint16_t *value = piece->values + (long)piece->slots[k] * dim + d;                                                 \
            Floats part[WIDTH]; /* even dimensions, odd dimensions, ... */                                                           \
            UNROLLED for (int i = 0; i < WIDTH; i += 2) {                                                                            \
                part[i] = firsts(value + i * LANES);                                                                                 \
                part[i + 1] = seconds(value + i * LANES);                                                                            \
            }                                                                                                                        \
            UNROLLED for (int i = 0; i < COUNT * WIDTH; i++)                                                                         \
                sum[i / WIDTH][i % WIDTH] =                                                                                          \
                    multiply_add(part[i % WIDTH], all(weights[i / WIDTH * MAX_KEYS + k]), sum[i / WIDTH][i % WIDTH]);                \
        }                                                                                                                            \
        UNROLLED for (int r = 0; r < COUNT; r++)                                                                                     \
            UNROLLED for (int i = 0; i < WIDTH; i += 2)                                                                              \
                put_in_turn(rows[r].sums + d + i * LANES, sum[r][i], sum[r][i + 1]);                                                 \
    }
#if LANES == 16
#define DEFINE_SUMS(COUNT) DEFINE_SUM(COUNT, 2) DEFINE_SUM(COUNT, 4)
DEFINE_SUMS(1)
DEFINE_SUMS(2)
DEFINE_SUMS(3)
DEFINE_SUMS(4)
DEFINE_SUMS(5)
DEFINE_SUMS(6)
static const Sum narrow[SUMMED + 1] = {0, sum_1_2, sum_2_2, sum_3_2, sum_4_2, sum_5_2, sum_6_2};
static const Sum broad[SUMMED + 1] = {0, sum_1_4, sum_2_4, sum_3_4, sum_4_4, sum_5_4, sum_6_4};
#else
DEFINE_SUM(1, 4)
DEFINE_SUM(2, 4)
static const Sum broad[SUMMED + 1] = {0, sum_1_4, sum_2_4};
#define narrow broad /* dimensions are a multiple of 32 */
#endif

TARGET static void sum_values(const float *weights, const Piece *piece, long low, long high, long dim, const Row *rows, long count) {
    for (long d = 0; d < dim; d += BROAD * LANES)
        (dim - d < BROAD * LANES ? narrow : broad)[count](weights, piece, low, high, dim, d, rows);
}

#endif
