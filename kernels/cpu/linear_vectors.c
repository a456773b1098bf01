/* bfloat16 linear by AVX-512 BF16's dot products of pairs.
 *
 * Two accumulators for each of up to 12 rows (24 of 32 registers), so one load of weights serves 12 rows and one broadcast of inputs
 * two products. Every output is one chain of sums over ascending pairs of inputs, whatever the number of rows. Of more than 12 rows
 * the weights of a block of inputs are read once from memory and then from cache, and the first two tiles prefetch the blocks to
 * come.
 */
#include "linear_parts.h"

#if defined(PITLANE_VECTORS)
#define TILE 12        /* most rows of a tile */
#define FEW_PAIRS 128  /* pairs of inputs at a time, of one or two tiles */
#define MANY_PAIRS 512
#define FEW_ROWS 3     /* so few leave time to prefetch into the first cache: 37 to 40 GB/s of 43 at 1 row, else 31 */
#define AHEAD(rows) ((rows) > FEW_ROWS ? 8192 : 4096) /* bytes from a weight's use to its prefetch, of one tile */
#define HINT(rows) ((rows) > FEW_ROWS ? _MM_HINT_T1 : _MM_HINT_T0)

typedef void (*Tile)(const uint32_t *x, const char *w, long pairs, float *sums, const char *ahead, long stride);

/* sums [rows][OUTS] += x [pairs][rows] times w [pairs][OUTS]; prefetches `stride` bytes for each pair. */
#define DEFINE_TILE(ROWS)                                                                                                            \
    TARGET static void tile_##ROWS(const uint32_t *x, const char *w, long pairs, float *sums, const char *ahead, long stride) {      \
        __m512 low[ROWS], high[ROWS];                                                                                                \
        UNROLLED for (int m = 0; m < ROWS; m++) {                                                                                    \
            low[m] = _mm512_loadu_ps(sums + m * OUTS);                                                                               \
            high[m] = _mm512_loadu_ps(sums + m * OUTS + 16);                                                                         \
        }                                                                                                                            \
        for (; pairs > 0; pairs--, x += ROWS, w += PAIR, ahead += stride) {                                                          \
            _mm_prefetch(ahead, HINT(ROWS));                                                                                         \
            if (stride > LINE)                                                                                                       \
                _mm_prefetch(ahead + LINE, HINT(ROWS));                                                                              \
            __m512bh first = (__m512bh)_mm512_loadu_si512(w), second = (__m512bh)_mm512_loadu_si512(w + LINE);                       \
            UNROLLED for (int m = 0; m < ROWS; m++) {                                                                                \
                __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[m]);                                                              \
                low[m] = _mm512_dpbf16_ps(low[m], first, pair);                                                                      \
                high[m] = _mm512_dpbf16_ps(high[m], second, pair);                                                                   \
            }                                                                                                                        \
        }                                                                                                                            \
        UNROLLED for (int m = 0; m < ROWS; m++) {                                                                                    \
            _mm512_storeu_ps(sums + m * OUTS, low[m]);                                                                               \
            _mm512_storeu_ps(sums + m * OUTS + 16, high[m]);                                                                         \
        }                                                                                                                            \
    }
DEFINE_TILE(1)
DEFINE_TILE(2)
DEFINE_TILE(3)
DEFINE_TILE(4)
DEFINE_TILE(5)
DEFINE_TILE(6)
DEFINE_TILE(7)
DEFINE_TILE(8)
DEFINE_TILE(9)
DEFINE_TILE(10)
DEFINE_TILE(11)
DEFINE_TILE(12)
static const Tile tiles[TILE + 1] = {0,      tile_1, tile_2, tile_3, tile_4,  tile_5, tile_6,
                                     tile_7, tile_8, tile_9, tile_10, tile_11, tile_12};

/* Tile i of a block of rows: rows from share(rows, n, i) to share(rows, n, i + 1). */
static long share(long rows, long n, long i) { return rows * i / n; }

void pack_rows(const Job *job, long part) {
    long begin = share(job->pairs, job->parts, part), end = share(job->pairs, job->parts, part + 1);
    for (long block = 0; block < job->rows; block += job->block) {
        long rows = least(job->rows - block, job->block), n = divided(rows, TILE);
        for (long i = 0; i < n; i++) {
            long first = block + share(rows, n, i), count = block + share(rows, n, i + 1) - first;
            uint32_t *target = job->packed + first * job->pairs;
            for (long m = 0; m < count; m++)
                for (long k = begin; k < end; k++)
                    target[k * count + m] = job->x[(first + m) * job->pairs + k];
        }
    }
}

TARGET static void by_panel(const Job *job, long block, long rows, long panel) {
    const uint32_t *x = job->packed ? job->packed : job->x;
    const char *w = job->w + panel * job->pairs * PAIR;
    long n = divided(rows, TILE), most = n > 2 ? MANY_PAIRS : FEW_PAIRS;
    float sums[VECTOR_ROWS * OUTS];
    for (long i = 0; i < rows * OUTS; i++)
        sums[i] = 0;
    for (long k = 0; k < job->pairs; k += most) {
        long pairs = least(job->pairs - k, most);
        const char *here = w + k * PAIR;
        for (long i = 0; i < n; i++) {
            long first = share(rows, n, i), count = share(rows, n, i + 1) - first;
            const char *ahead = n == 1 ? here + AHEAD(count) : here + pairs * PAIR + (i < 2 ? i * pairs * LINE : 0);
            tiles[count](x + (block + first) * job->pairs + k * count, here, pairs, sums + first * OUTS, ahead,
                         n == 1 ? PAIR : i < 2 ? LINE : 0);
        }
    }
    for (long m = 0; m < rows; m++)
        store(job, sums + m * OUTS, block + m, panel);
}

void by_vectors(const Job *job, long first, long rows, long panel, long end) {
    for (; panel < end; panel++)
        by_panel(job, first, rows, panel);
}

#endif
