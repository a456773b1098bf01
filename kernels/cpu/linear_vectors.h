/* bfloat16 linear by vectors: by AVX-512 BF16's dot products of pairs, or by multiply-adds of float32.
 *
 * A tile is up to 12 rows with AVX-512 (24 of 32 registers hold sums), 6 rows with AVX2 (12 of 16). A load of weights serves all rows,
 * and a broadcast of inputs serves two products. With AVX2, a tile of more than 3 rows computes the two halves of a panel one after
 * the other. An output is one chain of sums over ascending pairs of inputs, for any number of rows. With more rows than a tile has,
 * the weights of a block of inputs are read from memory for the first tile and from the cache for the other tiles. The first two
 * tiles prefetch the weights of the next block.
 *
 * One or two rows read two panels at once, as two streams: at one row 0.94 to 1.04 of a plain read, against 0.86 to 0.92 with one
 * stream (Xeon without AMX, one thread, 8 to 34 MB, in turn on a loaded machine). AMD's CPUs read one stream (two were not measured there).
 * With AVX2, two rows read one stream too, because the sums of two panels would not fit in registers.
 *
 * float32: weights stay pairs in memory; a mask and a shift widen them in registers. `prepare` widens inputs once. A chain adds
 * the second product of a pair before the first, as Intel specifies VDPBF16PS: where no number is subnormal, the sums are equal bit
 * by bit. Two multiply-adds do the work of a dot product. They are faster where VDPBF16PS is slow: 130 against 75 GFLOP/s a core
 * (Intel Xeon without AMX).
 */
#ifndef PITLANE_LINEAR_VECTORS_H
#define PITLANE_LINEAR_VECTORS_H

#include "linear_products.h"

#define FEW_PAIRS 128  /* pairs of inputs in a block, with one or two tiles */
#define MANY_PAIRS 512 /* with more tiles */
#define FEW_ROWS 3     /* up to so many rows, AMD's CPUs prefetch 4 kB ahead into the first cache. Zen 4: 37 to 40 GB/s of 43 at 1 row;
                          second cache: 31 */
#define NEAR 4096
#define FAR 8192       /* bytes between a weight in use and the weight prefetched into the second cache. A Xeon at 1 row: 0.95 of a
                          read of the same bytes; 4 kB and the first cache: 0.90 to 0.93 (one thread, 8 MB, medians of 144) */

typedef void (*Streams)(const uint32_t *x, const char *w, const char *other, long pairs, float *sums, float *other_sums);
typedef void (*Tile)(const uint32_t *x, const char *w, long pairs, float *sums, const char *ahead, long stride, int near);

/* sums [rows][OUTS] += x times w [pairs][OUTS]. WORDS: of x, per row and pair. Prefetches `stride` bytes from `ahead` on per pair;
 * near: into the first cache. */
#define DEFINE_TILE(KIND, WORDS, ROWS)                                                                                               \
    TARGET static void KIND##_##ROWS(const uint32_t *inputs, const char *weights, long pairs, float *sums, const char *ahead,        \
                                     long stride, int near) {                                                                        \
        enum { WIDTH = WIDTH_OF(ROWS) };                                                                                             \
        UNROLLED for (int part = 0; part < COLUMNS; part += WIDTH) {                                                                 \
            Floats totals[ROWS * WIDTH];                                                                                             \
            const uint32_t *x = inputs;                                                                                              \
            const char *w = weights + part * 4 * LANES;                                                                              \
            UNROLLED for (int i = 0; i < ROWS * WIDTH; i++)                                                                          \
                totals[i] = load(sums + i / WIDTH * OUTS + (part + i % WIDTH) * LANES);                                              \
            for (long k = 0; k < pairs; k++, x += WORDS * ROWS, w += PAIR) {                                                         \
                if (part == 0 && ROWS <= FEW_ROWS && near) {                                                                         \
                    _mm_prefetch(ahead, _MM_HINT_T0);                                                                                \
                    _mm_prefetch(ahead + LINE, _MM_HINT_T0);                                                                         \
                } else if (part == 0) {                                                                                              \
                    _mm_prefetch(ahead, _MM_HINT_T1);                                                                                \
                    if (stride > LINE)                                                                                               \
                        _mm_prefetch(ahead + LINE, _MM_HINT_T1);                                                                     \
                }                                                                                                                    \
                ahead += stride;                                                                                                     \
                KIND##_added(ROWS, WIDTH, totals, w, x);                                                                             \
            }                                                                                                                        \
            UNROLLED for (int i = 0; i < ROWS * WIDTH; i++)                                                                          \
                put(sums + i / WIDTH * OUTS + (part + i % WIDTH) * LANES, totals[i]);                                                \
        }                                                                                                                            \
    }
#define DEFINE_FLOATS(ROWS) DEFINE_TILE(floats, 2, ROWS)
#define FLOATS(ROWS) floats_##ROWS,
EACH_ROW(DEFINE_FLOATS)
static const Tile floats_tiles[MAX_TILE + 1] = {0, EACH_ROW(FLOATS)};
#if HAS_PAIRS
#define DEFINE_PAIRS(ROWS) DEFINE_TILE(pairs, 1, ROWS)
#define PAIRS(ROWS) pairs_##ROWS,
EACH_ROW(DEFINE_PAIRS)
static const Tile pairs_tiles[MAX_TILE + 1] = {0, EACH_ROW(PAIRS)};
#endif

/* One or two rows and two panels: a stream of weights per panel. The sums of a panel are those of KIND_1 and KIND_2. */
#define DEFINE_STREAMS(KIND, WORDS, ROWS)                                                                                            \
    TARGET static void KIND##_streams_##ROWS(const uint32_t *x, const char *w, const char *other, long pairs, float *sums,           \
                                             float *other_sums) {                                                                    \
        Floats totals[ROWS * COLUMNS], other_totals[ROWS * COLUMNS];                                                                 \
        UNROLLED for (int i = 0; i < ROWS * COLUMNS; i++)                                                                            \
            totals[i] = other_totals[i] = zeros();                                                                                   \
        for (; pairs > 0; pairs--, x += WORDS * ROWS, w += PAIR, other += PAIR) {                                                    \
            _mm_prefetch(w + FAR, _MM_HINT_T1);                                                                                      \
            _mm_prefetch(w + FAR + LINE, _MM_HINT_T1);                                                                               \
            _mm_prefetch(other + FAR, _MM_HINT_T1);                                                                                  \
            _mm_prefetch(other + FAR + LINE, _MM_HINT_T1);                                                                           \
            KIND##_added(ROWS, COLUMNS, totals, w, x);                                                                               \
            KIND##_added(ROWS, COLUMNS, other_totals, other, x);                                                                     \
        }                                                                                                                            \
        UNROLLED for (int i = 0; i < ROWS * COLUMNS; i++) {                                                                          \
            put(sums + i * LANES, totals[i]);                                                                                        \
            put(other_sums + i * LANES, other_totals[i]);                                                                            \
        }                                                                                                                            \
    }
DEFINE_STREAMS(floats, 2, 1)
#if HAS_PAIRS
DEFINE_STREAMS(floats, 2, 2)
DEFINE_STREAMS(pairs, 1, 1)
DEFINE_STREAMS(pairs, 1, 2)
static const Streams floats_streams[] = {floats_streams_1, floats_streams_2}, pairs_streams[] = {pairs_streams_1, pairs_streams_2};
#else
static const Streams floats_streams[] = {floats_streams_1};
#endif
enum { NUM_STREAMS = sizeof floats_streams / sizeof floats_streams[0] };

/* Divide rows into n shares of about equal size: share i is [rows_before(rows, n, i), rows_before(rows, n, i + 1)). */
static long rows_before(long rows, long n, long i) { return rows * i / n; }

/* Transpose [rows][pairs] to [pairs][rows], per tile of rows. BY_FLOATS: to float32 [pairs][2][rows]. */
static void prepare(const Job *job, long part) {
    long begin = rows_before(job->pairs, job->parts, part), end = rows_before(job->pairs, job->parts, part + 1);
    long words = job->products == BY_FLOATS ? 2 : 1;
    for (long block = 0; job->packed && block < job->rows; block += job->block) {
        long rows = minimum(job->rows - block, job->block), n = ceil_divide(rows, MAX_TILE);
        for (long i = 0; i < n; i++) {
            long first = block + rows_before(rows, n, i), count = block + rows_before(rows, n, i + 1) - first;
            uint32_t *target = job->packed + first * job->pairs * words;
            for (long m = 0; m < count; m++) {
                const uint32_t *x = job->x + (first + m) * job->pairs;
                if (words == 1)
                    for (long k = begin; k < end; k++)
                        target[k * count + m] = x[k];
                else
                    for (long k = begin; k < end; k++) {
                        target[2 * k * count + m] = x[k] & 0xffff0000;
                        target[(2 * k + 1) * count + m] = x[k] << 16;
                    }
            }
        }
    }
}

TARGET static void by_panel(const Job *job, long block, long rows, long panel) {
    const uint32_t *x = job->packed ? job->packed : job->x;
    const char *w = job->w + panel * job->pairs * PAIR;
    const Tile *tiles = floats_tiles;
    long words = job->products == BY_FLOATS ? 2 : 1;
#if HAS_PAIRS
    tiles = job->products == BY_FLOATS ? floats_tiles : pairs_tiles;
#endif
    long n = ceil_divide(rows, MAX_TILE), chunk = n > 2 ? MANY_PAIRS : FEW_PAIRS;
    int near = rows <= FEW_ROWS && __builtin_cpu_is("amd");
    float sums[VECTOR_ROWS * OUTS];
    for (long i = 0; i < rows * OUTS; i++)
        sums[i] = 0;
    for (long k = 0; k < job->pairs; k += chunk) {
        long pairs = minimum(job->pairs - k, chunk);
        const char *here = w + k * PAIR;
        for (long i = 0; i < n; i++) {
            long first = rows_before(rows, n, i), count = rows_before(rows, n, i + 1) - first;
            const char *ahead = n == 1 ? here + (near ? NEAR : FAR) : here + pairs * PAIR + (i < 2 ? i * pairs * LINE : 0);
            tiles[count](x + ((block + first) * job->pairs + k * count) * words, here, pairs, sums + first * OUTS, ahead,
                         n == 1 ? PAIR : i < 2 ? LINE : 0, near);
        }
    }
    for (long m = 0; m < rows; m++)
        put_outputs(job, sums + m * OUTS, block + m, panel);
}

/* Panels [panel, panel + 2) for up to STREAM_ROWS rows. */
TARGET static void by_streams(const Job *job, long block, long rows, long panel) {
    const uint32_t *x = job->packed ? job->packed : job->x;
    const char *w = job->w + panel * job->pairs * PAIR;
    const Streams *streams = floats_streams;
    float sums[2][STREAM_ROWS * OUTS];
    x += block * job->pairs * (job->products == BY_FLOATS ? 2 : 1);
#if HAS_PAIRS
    streams = job->products == BY_FLOATS ? floats_streams : pairs_streams;
#endif
    streams[rows - 1](x, w, w + job->pairs * PAIR, job->pairs, sums[0], sums[1]);
    for (int i = 0; i < 2; i++)
        for (long m = 0; m < rows; m++)
            put_outputs(job, sums[i] + m * OUTS, block + m, panel + i);
}

static void panels(const Job *job, long first, long rows, long panel, long end) {
    if (rows <= NUM_STREAMS && !__builtin_cpu_is("amd"))
        for (; panel + 1 < end; panel += 2)
            by_streams(job, first, rows, panel);
    for (; panel < end; panel++)
        by_panel(job, first, rows, panel);
}

#endif
