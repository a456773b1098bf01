/* bfloat16 linear by AVX-512 BF16's dot products of pairs.
 *
 * A tile is up to 12 rows with two accumulators each (24 of 32 registers): a load of weights serves 12 rows, and a broadcast of
 * inputs serves two products. An output is one chain of sums over ascending pairs of inputs, for any number of rows. With more than
 * 12 rows, the weights of a block of inputs are read from memory for the first tile and from the cache for the other tiles. The
 * first two tiles prefetch the weights of the next block.
 */
#include "linear_parts.h"

#if defined(PITLANE_VECTORS)
#define TILE 12        /* largest number of rows in a tile */
#define FEW_PAIRS 128  /* pairs of inputs in a block, with one or two tiles */
#define MANY_PAIRS 512 /* with more tiles */
#define FEW_ROWS 3     /* up to so many rows, AMD's Zen 4 prefetches 4 kB ahead into the first cache: 37 to 40 GB/s of 43 at 1 row;
                          second cache: 31 */
#define NEAR 4096
#define FAR 8192       /* bytes between a weight in use and the weight prefetched into the second cache. A Xeon at 1 row: 0.95 of a
                          read of the same bytes; 4 kB and the first cache: 0.90 to 0.93 (one thread, 8 MB, medians of 144) */

typedef void (*Tile)(const uint32_t *x, const char *w, long pairs, float *sums, const char *ahead, long stride, int near);

/* sums [rows][OUTS] += x [pairs][rows] times w [pairs][OUTS]. Prefetches `stride` bytes from `ahead` on per pair; near: into the
 * first cache. */
#define DEFINE_TILE(ROWS)                                                                                                            \
    TARGET static void tile_##ROWS(const uint32_t *x, const char *w, long pairs, float *sums, const char *ahead, long stride,        \
                                   int near) {                                                                                       \
        __m512 low[ROWS], high[ROWS];                                                                                                \
        UNROLLED for (int m = 0; m < ROWS; m++) {                                                                                    \
            low[m] = _mm512_loadu_ps(sums + m * OUTS);                                                                               \
            high[m] = _mm512_loadu_ps(sums + m * OUTS + 16);                                                                         \
        }                                                                                                                            \
        for (; pairs > 0; pairs--, x += ROWS, w += PAIR, ahead += stride) {                                                          \
            if (ROWS <= FEW_ROWS && near)                                                                                            \
                _mm_prefetch(ahead, _MM_HINT_T0);                                                                                    \
            else                                                                                                                     \
                _mm_prefetch(ahead, _MM_HINT_T1);                                                                                    \
            if (ROWS <= FEW_ROWS && near)                                                                                            \
                _mm_prefetch(ahead + LINE, _MM_HINT_T0);                                                                             \
            else if (stride > LINE)                                                                                                  \
                _mm_prefetch(ahead + LINE, _MM_HINT_T1);                                                                             \
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

/* Divide rows into n shares of about equal size: share i is [share(rows, n, i), share(rows, n, i + 1)). */
static long share(long rows, long n, long i) { return rows * i / n; }

void pack_rows(const Job *job, long part) {
    long begin = share(job->pairs, job->parts, part), end = share(job->pairs, job->parts, part + 1);
    for (long block = 0; block < job->rows; block += job->block) {
        long rows = minimum(job->rows - block, job->block), n = ceil_divide(rows, TILE);
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
    long n = ceil_divide(rows, TILE), chunk = n > 2 ? MANY_PAIRS : FEW_PAIRS;
    int near = rows <= FEW_ROWS && __builtin_cpu_is("amd");
    float sums[VECTOR_ROWS * OUTS];
    for (long i = 0; i < rows * OUTS; i++)
        sums[i] = 0;
    for (long k = 0; k < job->pairs; k += chunk) {
        long pairs = minimum(job->pairs - k, chunk);
        const char *here = w + k * PAIR;
        for (long i = 0; i < n; i++) {
            long first = share(rows, n, i), count = share(rows, n, i + 1) - first;
            const char *ahead = n == 1 ? here + (near ? NEAR : FAR) : here + pairs * PAIR + (i < 2 ? i * pairs * LINE : 0);
            tiles[count](x + (block + first) * job->pairs + k * count, here, pairs, sums + first * OUTS, ahead,
                         n == 1 ? PAIR : i < 2 ? LINE : 0, near);
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
