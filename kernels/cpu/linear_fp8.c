/* The linear of linear_fp8.h. A thread takes a few panels of one block of rows at a time.
 *
 * Vectors: a weight becomes bfloat16 in registers: its exponent and mantissa are shifted into place and the exponent's bias is raised; a
 * table of eight values serves exponent 0, because the product instruction takes subnormals as 0. With more rows than a tile has, a
 * chunk of inputs is widened once, into a buffer that stays in the first cache, and serves all tiles of the block.
 */
#include "linear_fp8.h"
#include "threads.h"
#include "vectors.h"

#include <string.h>

#define ROWS 192    /* of a block */
#define TILE 8      /* largest number of rows of a tile: two accumulators each */
#define CHUNK 128   /* pairs of inputs that are widened at once */
#define AHEAD 4096  /* bytes between a weight in use and the weight prefetched */
#define PANEL FP8_PANEL
#define MAX_PANELS 4 /* that a thread takes at a time */

typedef struct {
    const Fp8Linear *job;
    const void *x;
    void *y;
    long rows, pairs, groups, panels, chunk;
    Phase items;
} Work;

static long minimum(long a, long b) { return a < b ? a : b; }
static long ceil_divide(long a, long b) { return (a + b - 1) / b; }

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* Round to the nearest bfloat16, ties to even. */
static uint16_t to_bf16(float value) {
    uint32_t bits = to_bits(value);
    if (value != value)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float decoded(uint8_t byte) {
    uint32_t sign = (uint32_t)(byte & 0x80) << 24, rest = byte & 0x7f;
    float small = (float)rest * 0.001953125f; /* 2^-9 */
    return from_bits(sign | (rest < 8 ? to_bits(small) : (rest << 20) + (120u << 23)));
}

static void finish_rows(const Work *work, const float *sums, long first, long rows, long panel) {
    const Fp8Linear *job = work->job;
    long begin = panel * PANEL, count = minimum(job->outs - begin, PANEL);
    for (long m = 0; m < rows; m++)
        for (long o = 0; o < count; o++) {
            float value = sums[m * PANEL + o] + (job->bias ? job->bias[begin + o] : 0);
            long at = (first + m) * job->outs + begin + o;
            if (job->wide)
                ((float *)work->y)[at] = value;
            else
                ((uint16_t *)work->y)[at] = to_bf16(value);
        }
}

/* totals [rows][PANEL] += sums [rows][PANEL] * scales [PANEL] */
static void add_scaled(float *totals, const float *sums, const float *scales, long rows) {
    for (long m = 0; m < rows; m++)
        for (long o = 0; o < PANEL; o++)
            totals[m * PANEL + o] += sums[m * PANEL + o] * scales[o];
}

static void plain_chunk(const Work *work, const uint8_t *w, long pair, long pairs, long first, long rows, float *sums) {
    float wide[2 * CHUNK][PANEL];
    for (long k = 0; k < pairs; k++)
        for (long o = 0; o < PANEL; o++) {
            wide[2 * k][o] = decoded(w[k * 2 * PANEL + 2 * o]);
            wide[2 * k + 1][o] = decoded(w[k * 2 * PANEL + 2 * o + 1]);
        }
    for (long m = 0; m < rows; m++) {
        long at = (first + m) * work->job->ins + 2 * pair;
        float *sum = sums + m * PANEL;
        for (long k = 0; k < 2 * pairs; k++) {
            float x = work->job->wide ? ((const float *)work->x)[at + k] : from_bits((uint32_t)((const uint16_t *)work->x)[at + k] << 16);
            for (long o = 0; o < PANEL; o++)
                sum[o] += x * wide[k][o];
        }
    }
}

#if defined(PITLANE_VECTORS)
/* 32 bytes of e4m3 as bfloat16. */
TARGET INLINE __m512i widened_fp8(const uint8_t *w, __m512i small) {
    __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)w));
    __m512i rest = _mm512_and_si512(bytes, _mm512_set1_epi16(0x7f));
    __m512i values = _mm512_add_epi16(_mm512_slli_epi16(rest, 4), _mm512_set1_epi16(120 << 7));
    values = _mm512_mask_permutexvar_epi16(values, _mm512_cmplt_epu16_mask(rest, _mm512_set1_epi16(8)), rest, small);
    __m512i signs = _mm512_slli_epi16(_mm512_and_si512(bytes, _mm512_set1_epi16(0x80)), 8);
    return _mm512_or_si512(values, signs);
}

/* m * 2^-9 for m of 0 to 7 as bfloat16. */
TARGET INLINE __m512i small_values(void) {
    return _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
}

typedef void (*Tile)(const uint32_t *x, long stride, const uint8_t *w, long pairs, float *sums);

/* sums [ROWS_][PANEL] += x [ROWS_][pairs] times w. IS_WIDE: w is bfloat16, widened before. */
#define DEFINE_TILE(ROWS_, IS_WIDE, NAME)                                                                          \
    TARGET static void NAME##ROWS_(const uint32_t *x, long stride, const uint8_t *w, long pairs, float *sums) {    \
        __m512 low[ROWS_], high[ROWS_];                                                                            \
        __m512i small = small_values();                                                                            \
        UNROLLED for (int m = 0; m < ROWS_; m++) {                                                                 \
            low[m] = _mm512_loadu_ps(sums + m * PANEL);                                                            \
            high[m] = _mm512_loadu_ps(sums + m * PANEL + 16);                                                      \
        }                                                                                                          \
        for (long k = 0; k < pairs; k++, w += (IS_WIDE ? 4 : 2) * PANEL) {                                         \
            __m512i first = IS_WIDE ? _mm512_loadu_si512(w) : widened_fp8(w, small);                               \
            __m512i second = IS_WIDE ? _mm512_loadu_si512(w + 2 * PANEL) : widened_fp8(w + PANEL, small);          \
            if (!IS_WIDE)                                                                                          \
                _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);                                                \
            UNROLLED for (int m = 0; m < ROWS_; m++) {                                                             \
                __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[m * stride + k]);                               \
                low[m] = _mm512_dpbf16_ps(low[m], (__m512bh)first, pair);                                          \
                high[m] = _mm512_dpbf16_ps(high[m], (__m512bh)second, pair);                                       \
            }                                                                                                      \
        }                                                                                                          \
        UNROLLED for (int m = 0; m < ROWS_; m++) {                                                                 \
            _mm512_storeu_ps(sums + m * PANEL, low[m]);                                                            \
            _mm512_storeu_ps(sums + m * PANEL + 16, high[m]);                                                      \
        }                                                                                                          \
    }
#define DEFINE_TILES(IS_WIDE, NAME)                                                                                \
    DEFINE_TILE(1, IS_WIDE, NAME)                                                                                  \
    DEFINE_TILE(2, IS_WIDE, NAME)                                                                                  \
    DEFINE_TILE(3, IS_WIDE, NAME)                                                                                  \
    DEFINE_TILE(4, IS_WIDE, NAME)                                                                                  \
    DEFINE_TILE(5, IS_WIDE, NAME)                                                                                  \
    DEFINE_TILE(6, IS_WIDE, NAME)                                                                                  \
    DEFINE_TILE(7, IS_WIDE, NAME)                                                                                  \
    DEFINE_TILE(8, IS_WIDE, NAME)                                                                                  \
    static const Tile NAME##tiles[TILE + 1] = {0,       NAME##1, NAME##2, NAME##3, NAME##4,                        \
                                               NAME##5, NAME##6, NAME##7, NAME##8};
DEFINE_TILES(0, direct_)
DEFINE_TILES(1, buffered_)

TARGET static void vector_chunk(const Work *work, const uint8_t *w, long pair, long pairs, long first, long rows, float *sums) {
    const uint32_t *x = (const uint32_t *)work->x + first * work->pairs + pair;
    if (rows <= TILE) {
        direct_tiles[rows](x, work->pairs, w, pairs, sums);
        return;
    }
    uint8_t buffer[CHUNK * 4 * PANEL] __attribute__((aligned(64)));
    __m512i small = small_values();
    for (long i = 0; i < 2 * pairs; i++)
        _mm512_store_si512(buffer + i * 2 * PANEL, widened_fp8(w + i * PANEL, small));
    for (long m = 0; m < rows; m += TILE)
        buffered_tiles[minimum(rows - m, TILE)](x + m * work->pairs, work->pairs, buffer, pairs, sums + m * PANEL);
}

int has_fp8_vectors(void) { return has_vectors(); }
#else
int has_fp8_vectors(void) { return 0; }
#endif

static void by_panel(const Work *work, long first, long rows, long panel) {
    const Fp8Linear *job = work->job;
    const uint8_t *w = job->w + panel * work->pairs * 2 * PANEL;
    const float *scales = job->scales + panel * work->groups * PANEL;
    float totals[ROWS * PANEL], sums[ROWS * PANEL];
    memset(totals, 0, sizeof(float) * (size_t)(rows * PANEL));
    for (long begin = 0; begin < work->pairs; begin += job->group / 2, scales += PANEL) {
        long end = minimum(begin + job->group / 2, work->pairs);
        memset(sums, 0, sizeof(float) * (size_t)(rows * PANEL));
        for (long pair = begin; pair < end; pair += CHUNK) {
            long pairs = minimum(end - pair, CHUNK);
#if defined(PITLANE_VECTORS)
            if (job->level == FP8_VECTORS) {
                vector_chunk(work, w + pair * 2 * PANEL, pair, pairs, first, rows, sums);
                continue;
            }
#endif
            plain_chunk(work, w + pair * 2 * PANEL, pair, pairs, first, rows, sums);
        }
        add_scaled(totals, sums, scales, rows);
    }
    finish_rows(work, totals, first, rows, panel);
}

static void help(void *arg) {
    Work *work = arg;
    long chunks = ceil_divide(work->panels, work->chunk), items = chunks * ceil_divide(work->rows, ROWS);
    for (long item; (item = take(&work->items, items)) < items;) {
        long first = item / chunks * ROWS, panel = item % chunks * work->chunk;
        for (long end = minimum(panel + work->chunk, work->panels); panel < end; panel++)
            by_panel(work, first, minimum(work->rows - first, ROWS), panel);
    }
}

void fp8_linear(const Fp8Linear *job, const void *x, void *y, long rows, int threads) {
    Work work = {.job = job, .x = x, .y = y, .rows = rows, .pairs = job->ins / 2};
    work.groups = ceil_divide(job->ins, job->group);
    work.panels = ceil_divide(job->outs, PANEL);
    work.chunk = minimum(MAX_PANELS, ceil_divide(work.panels, 4 * threads));
    run_parallel(help, &work, threads);
}
