/* bfloat16 linear by AVX-512 BF16's dot products of pairs.
 *
 * A panel is 32 outputs: two accumulators for each of up to 12 rows (24 of 32 registers), so one load of weights serves 12 rows
 * and one broadcast of inputs two products. Every output is one chain of sums over ascending pairs of inputs, whatever the number
 * of rows: a row's result does not depend on its batch. Of more than 12 rows the weights of a block of inputs are read once from
 * memory and then from cache, and the first two tiles prefetch the blocks to come.
 */
#include "linear_bf16.h"
#include "threads.h"
#include "vectors.h"

#if defined(PITLANE_VECTORS)
#define OUTS 32        /* outputs of a panel */
#define LINE 64        /* bytes */
#define STEP (2 * LINE) /* of weights, for one pair of inputs */
#define TILE 12        /* most rows of a tile */
#define BLOCK 192      /* most rows whose sums are kept at a time */
#define FEW_PAIRS 128  /* pairs of inputs at a time, of one or two tiles */
#define MANY_PAIRS 512
#define FEW_ROWS 3     /* so few leave time to prefetch into the first cache: 37 to 40 GB/s of 43 at 1 row, else 31 */
#define AHEAD(rows) ((rows) > FEW_ROWS ? 8192 : 4096) /* bytes from a weight's use to its prefetch, of one tile */
#define HINT(rows) ((rows) > FEW_ROWS ? _MM_HINT_T1 : _MM_HINT_T0)
#define CHUNK 8        /* panels that a thread takes at a time, at most */

typedef void (*Tile)(const uint32_t *x, const char *w, long pairs, float *sums, const char *ahead, long stride);

/* sums [rows][OUTS] += x [pairs][rows] times w [pairs][OUTS]; prefetches `stride` bytes for each pair. */
#define DEFINE_TILE(ROWS)                                                                                                            \
    TARGET static void tile_##ROWS(const uint32_t *x, const char *w, long pairs, float *sums, const char *ahead, long stride) {      \
        __m512 low[ROWS], high[ROWS];                                                                                                \
        UNROLLED for (int m = 0; m < ROWS; m++) {                                                                                    \
            low[m] = _mm512_loadu_ps(sums + m * OUTS);                                                                               \
            high[m] = _mm512_loadu_ps(sums + m * OUTS + 16);                                                                         \
        }                                                                                                                            \
        for (; pairs > 0; pairs--, x += ROWS, w += STEP, ahead += stride) {                                                          \
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

typedef struct {
    const uint32_t *x; /* as tiles take it: of each tile [pairs][its rows] */
    const uint32_t *rows_of_x;
    const char *w;
    const uint16_t *bias;
    uint16_t *y;
    uint32_t *packed;
    long rows, outs, pairs, panels, chunk;
    atomic_int arrived;
    atomic_long next;
} Job;

static long least(long a, long b) { return a < b ? a : b; }
static long divided(long a, long b) { return (a + b - 1) / b; }

/* Tile i of a block of rows: rows from share(rows, n, i) to share(rows, n, i + 1). */
static long share(long rows, long n, long i) { return rows * i / n; }

/* Turn rows of pairs into pairs of rows, for the worker's part of the inputs. */
static void pack_rows(Job *job, Worker worker) {
    long begin = share(job->pairs, worker.count, worker.index), end = share(job->pairs, worker.count, worker.index + 1);
    for (long block = 0; block < job->rows; block += BLOCK) {
        long rows = least(job->rows - block, BLOCK), n = divided(rows, TILE);
        for (long i = 0; i < n; i++) {
            long first = block + share(rows, n, i), count = block + share(rows, n, i + 1) - first;
            uint32_t *target = job->packed + first * job->pairs;
            for (long m = 0; m < count; m++)
                for (long k = begin; k < end; k++)
                    target[k * count + m] = job->rows_of_x[(first + m) * job->pairs + k];
        }
    }
}

TARGET static void store(const Job *job, const float *sums, long row, long panel) {
    long left = job->outs - panel * OUTS;
    __mmask32 mask = left < OUTS ? ((__mmask32)1 << left) - 1 : ~(__mmask32)0;
    __m512 low = _mm512_loadu_ps(sums), high = _mm512_loadu_ps(sums + 16);
    if (job->bias) {
        __m512i bias = _mm512_maskz_loadu_epi16(mask, job->bias + panel * OUTS);
        low = _mm512_add_ps(low, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bias)), 16));
        high = _mm512_add_ps(high, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bias, 1)), 16));
    }
    _mm512_mask_storeu_epi16(job->y + row * job->outs + panel * OUTS, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

TARGET static void one_panel(const Job *job, long block, long rows, long panel) {
    const char *w = job->w + panel * job->pairs * STEP;
    long n = divided(rows, TILE), most = n > 2 ? MANY_PAIRS : FEW_PAIRS;
    float sums[BLOCK * OUTS];
    for (long i = 0; i < rows * OUTS; i++)
        sums[i] = 0;
    for (long k = 0; k < job->pairs; k += most) {
        long pairs = least(job->pairs - k, most);
        const char *here = w + k * STEP;
        for (long i = 0; i < n; i++) {
            long first = share(rows, n, i), count = share(rows, n, i + 1) - first;
            const char *ahead = n == 1 ? here + AHEAD(count) : here + pairs * STEP + (i < 2 ? i * pairs * LINE : 0);
            tiles[count](job->x + (block + first) * job->pairs + k * count, here, pairs, sums + first * OUTS, ahead,
                         n == 1 ? STEP : i < 2 ? LINE : 0);
        }
    }
    for (long m = 0; m < rows; m++)
        store(job, sums + m * OUTS, block + m, panel);
}

static void work(void *arg, Worker worker) {
    Job *job = arg;
    if (job->packed) {
        pack_rows(job, worker);
        wait_for_all(&job->arrived, worker.count);
    }
    long chunks = divided(job->panels, job->chunk), items = chunks * divided(job->rows, BLOCK);
    for (long item = atomic_fetch_add(&job->next, 1); item < items; item = atomic_fetch_add(&job->next, 1)) {
        long block = item / chunks * BLOCK, panel = item % chunks * job->chunk;
        for (long end = least(panel + job->chunk, job->panels); panel < end; panel++)
            one_panel(job, block, least(job->rows - block, BLOCK), panel);
    }
}

int has_linear_bf16(void) { return has_vectors(); }

void linear_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, uint16_t *y, uint16_t *scratch, long rows, long outs,
                 long ins, int threads) {
    Job job = {.rows_of_x = (const uint32_t *)x, .w = (const char *)w, .bias = bias, .y = y, .rows = rows, .outs = outs};
    job.packed = rows > 1 ? (uint32_t *)scratch : 0;
    job.x = job.packed ? job.packed : job.rows_of_x;
    job.pairs = ins / 2;
    job.panels = divided(outs, OUTS);
    job.chunk = least(CHUNK, divided(job.panels, 4 * threads));
    run_parallel(work, &job, threads);
}

#else

int has_linear_bf16(void) { return 0; }

void linear_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, uint16_t *y, uint16_t *scratch, long rows, long outs,
                 long ins, int threads) {
    (void)x, (void)w, (void)bias, (void)y, (void)scratch, (void)rows, (void)outs, (void)ins, (void)threads;
}

#endif
