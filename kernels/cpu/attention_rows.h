/* The rows of a piece of keys and values: scores, weights, and weighted sums of values, in vectors. Part of attention_bf16.c. */
#ifndef PITLANE_ATTENTION_ROWS_H
#define PITLANE_ATTENTION_ROWS_H

#include "vectors.h"

#if defined(PITLANE_VECTORS)
#define MAX_KEYS 512
#define ROWS 12     /* rows scored at a time, with two accumulators each */
#define SUMMED 6    /* rows whose values are summed at a time, with four accumulators each */
#define KEYS 32     /* keys scored at a time */

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

static long minimum(long a, long b) { return a < b ? a : b; }
static long maximum(long a, long b) { return a > b ? a : b; }

typedef void (*Score)(const uint32_t *q, const uint32_t *keys, long pairs, float *scores, float scale);

/* scores [rows][MAX_KEYS], of 32 keys: scale times q [pairs][rows] times keys [pairs][32]. */
#define DEFINE_SCORE(COUNT)                                                                                                          \
    TARGET static void score_##COUNT(const uint32_t *q, const uint32_t *keys, long pairs, float *scores, float scale) {              \
        __m512 low[COUNT], high[COUNT];                                                                                              \
        UNROLLED for (int r = 0; r < COUNT; r++) {                                                                                   \
            low[r] = _mm512_setzero_ps();                                                                                            \
            high[r] = _mm512_setzero_ps();                                                                                           \
        }                                                                                                                            \
        for (; pairs > 0; pairs--, q += COUNT, keys += KEYS) {                                                                       \
            __m512bh first = (__m512bh)_mm512_load_si512(keys), second = (__m512bh)_mm512_load_si512(keys + LANES);                  \
            UNROLLED for (int r = 0; r < COUNT; r++) {                                                                               \
                __m512bh pair = (__m512bh)_mm512_set1_epi32((int)q[r]);                                                              \
                low[r] = _mm512_dpbf16_ps(low[r], first, pair);                                                                      \
                high[r] = _mm512_dpbf16_ps(high[r], second, pair);                                                                   \
            }                                                                                                                        \
        }                                                                                                                            \
        UNROLLED for (int r = 0; r < COUNT; r++) {                                                                                   \
            _mm512_store_ps(scores + r * MAX_KEYS, _mm512_mul_ps(low[r], _mm512_set1_ps(scale)));                                    \
            _mm512_store_ps(scores + r * MAX_KEYS + LANES, _mm512_mul_ps(high[r], _mm512_set1_ps(scale)));                           \
        }                                                                                                                            \
    }
DEFINE_SCORE(1)
DEFINE_SCORE(2)
DEFINE_SCORE(3)
DEFINE_SCORE(4)
DEFINE_SCORE(5)
DEFINE_SCORE(6)
DEFINE_SCORE(7)
DEFINE_SCORE(8)
DEFINE_SCORE(9)
DEFINE_SCORE(10)
DEFINE_SCORE(11)
DEFINE_SCORE(12)
static const Score score[ROWS + 1] = {0,       score_1, score_2, score_3,  score_4,  score_5, score_6,
                                      score_7, score_8, score_9, score_10, score_11, score_12};

/* A mask of the keys [at, at + LANES) that a row sees. */
INLINE __mmask16 seen(const Row *row, long at) {
    uint32_t from = (uint32_t)minimum(maximum(row->low - at, 0), LANES), to = (uint32_t)minimum(maximum(row->high - at, 0), LANES);
    return (__mmask16)(((1u << to) - 1) & ~((1u << from) - 1));
}

/* Replace the scores of keys [low, high) by weights exp(score - largest score), or 0 for keys that the row does not see. Store the
 * sum of the weights and the largest score in the row. */
TARGET static void weigh(float *scores, const Row *row, long low, long high, long dim) {
    __m512 largest = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
    for (long at = low; at < high; at += LANES)
        largest = _mm512_mask_max_ps(largest, seen(row, at), largest, _mm512_load_ps(scores + at));
    float top = _mm512_reduce_max_ps(largest);
    for (long at = low; at < high; at += LANES) {
        __m512 weight = exponential(_mm512_sub_ps(_mm512_load_ps(scores + at), _mm512_set1_ps(top)));
        weight = _mm512_maskz_mov_ps(seen(row, at), weight);
        sum = _mm512_add_ps(sum, weight);
        _mm512_store_ps(scores + at, weight);
    }
    row->sums[dim] = _mm512_reduce_add_ps(sum);
    row->sums[dim + 1] = top;
}

typedef void (*Sum)(const float *weights, const Piece *piece, long low, long high, long dim, long d, const Row *rows);

/* Write 32 sums from those of even and those of odd dimensions. */
TARGET INLINE void put_pairs(float *target, __m512 even, __m512 odd) {
    __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    _mm512_storeu_ps(target, _mm512_permutex2var_ps(even, low, odd));
    _mm512_storeu_ps(target + LANES, _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
}

/* Weighted sums of the values [low, high), key after key: WIDTH vectors of dimensions from d on. weights: [rows][MAX_KEYS]. */
#define DEFINE_SUM(COUNT, WIDTH)                                                                                                     \
    TARGET static void sum_##COUNT##_##WIDTH(const float *weights, const Piece *piece, long low, long high, long dim, long d,        \
                                             const Row *rows) {                                                                      \
        __m512 sum[COUNT][WIDTH];                                                                                                    \
        UNROLLED for (int r = 0; r < COUNT; r++)                                                                                     \
            UNROLLED for (int i = 0; i < WIDTH; i++)                                                                                 \
                sum[r][i] = _mm512_setzero_ps();                                                                                     \
        for (long k = low; k < high; k++) {                                                                                          \
            const uint16_t *value = piece->values + (long)piece->slots[k] * dim + d;                                                 \
            __m512 part[WIDTH]; /* even dimensions, odd dimensions, ... */                                                           \
            UNROLLED for (int i = 0; i < WIDTH; i += 2) {                                                                            \
                __m512i both = _mm512_loadu_si512(value + i * LANES);                                                                \
                part[i] = (__m512)_mm512_slli_epi32(both, 16);                                                                       \
                part[i + 1] = (__m512)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));                                    \
            }                                                                                                                        \
            UNROLLED for (int r = 0; r < COUNT; r++) {                                                                               \
                __m512 weight = _mm512_set1_ps(weights[r * MAX_KEYS + k]);                                                           \
                UNROLLED for (int i = 0; i < WIDTH; i++)                                                                             \
                    sum[r][i] = _mm512_fmadd_ps(part[i], weight, sum[r][i]);                                                         \
            }                                                                                                                        \
        }                                                                                                                            \
        UNROLLED for (int r = 0; r < COUNT; r++)                                                                                     \
            UNROLLED for (int i = 0; i < WIDTH; i += 2)                                                                              \
                put_pairs(rows[r].sums + d + i * LANES, sum[r][i], sum[r][i + 1]);                                                   \
    }
#define DEFINE_SUMS(COUNT) DEFINE_SUM(COUNT, 2) DEFINE_SUM(COUNT, 4)
DEFINE_SUMS(1)
DEFINE_SUMS(2)
DEFINE_SUMS(3)
DEFINE_SUMS(4)
DEFINE_SUMS(5)
DEFINE_SUMS(6)
static const Sum narrow[SUMMED + 1] = {0, sum_1_2, sum_2_2, sum_3_2, sum_4_2, sum_5_2, sum_6_2};
static const Sum wide[SUMMED + 1] = {0, sum_1_4, sum_2_4, sum_3_4, sum_4_4, sum_5_4, sum_6_4};

TARGET static void sum_values(const float *weights, const Piece *piece, long low, long high, long dim, const Row *rows, long count) {
    for (long d = 0; d < dim; d += 4 * LANES)
        (dim - d < 4 * LANES ? narrow : wide)[count](weights, piece, low, high, dim, d, rows);
}

#endif
#endif
