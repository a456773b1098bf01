/* The linear of linear_int.h: chooses a level, and divides rows and panels among threads.
 *
 * A thread takes chunks of panels from its own contiguous share of the weights, then from the shares of the other threads. So each
 * thread reads one stream. With more rows than a tile has, a chunk of panels stays in the second cache for all tiles of a block.
 */
#include "linear_bf16.h"
#include "linear_int_parts.h"
#include "threads.h"


#define CHUNK_BYTES 262144 /* largest weights of a chunk, if a chunk has several panels */
#define CHUNKS 8           /* smallest number of chunks per thread, if there are as many panels */
#define MAX_SHARES 64

typedef struct {
    const IntLinear *job;
    Prepared prepared;
    const void *x;
    void *y;
    long rows, tiles, panels, chunk, chunks, items, shares;
    atomic_long joined;
    Phase preparing, products[MAX_SHARES];
} Work;

static int supported(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return has_amx_int8() ? LEVEL_AMX : LEVEL_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return LEVEL_AVX2;
#endif
    return LEVEL_PLAIN;
}

int int_level(void) {
    int best = supported(), allowed = allowed_level();
    return best < allowed ? best : allowed;
}

const char *int_fault(const IntLinear *job) {
    if (job->outs <= 0 || job->ins <= 0 || job->ins > MAX_INT_INPUTS)
        return "needs outs > 0, 0 < ins <= 2^20";
    if ((job->group != 32 && job->group != 64 && job->group != 128) || (job->bits != 8 && job->bits != 4) ||
        (job->bits == 8 ? !job->scales : job->ins % job->group != 0))
        return "needs a group of 32, 64 or 128, and bits = 8 and scales, or bits = 4 and a group that divides ins";
    return job->level < 0 || job->level > int_level() ? "this CPU cannot run this level" : NULL;
}

/* On Intel, weights from memory then arrive in 0.65 to 0.9 of the time, for 1 to 16 rows. Bytes: 8 kB ahead into the second cache reads
 * at 0.95 of a plain read at 1 row, 4 kB ahead into the first cache at 0.85; nibbles: 0.79 and 0.81 (Xeon, one thread, 8 MB, medians of
 * 48). Prototypes on AMD's Zen 4 took 1.05 to 1.15 of the time with up to 4 rows, and 0.75 to 0.86 with 16. */
long prefetch_distance(int bits, long rows) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (rows <= 4 && __builtin_cpu_is("amd"))
        return 0;
#endif
    (void)rows;
    return bits == 8 ? 8192 : 4096;
}

static const IntLevel *level_of(const IntLinear *job, long rows) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (job->level == LEVEL_AMX && int_amx_serves(job, rows))
        return &int_amx;
    if (job->level >= LEVEL_AVX512)
        return &int_avx512;
    if (job->level == LEVEL_AVX2)
        return &int_avx2;
#endif
    (void)job, (void)rows;
    return &int_plain;
}

static long ceil_divide(long a, long b) { return (a + b - 1) / b; }
static long minimum(long a, long b) { return a < b ? a : b; }

size_t int_panel_bytes(const IntLinear *job) {
    if (job->bits == 8)
        return (size_t)ceil_divide(job->ins, 4) * 64;
    long groups = job->ins / job->group;
    return (size_t)(ceil_divide(groups, 2) * (job->symmetric ? 64 : 128) + groups * job->group * 8);
}

static Prepared prepared_at(const IntLinear *job, void *scratch, long rows) {
    Prepared at = {.row_bytes = ceil_divide(job->ins, 4) * (job->quantized ? 4 : 16), .groups = ceil_divide(job->ins, job->group)};
    at.x = scratch;
    at.sums = (int32_t *)(at.x + rows * at.row_bytes);
    at.scales = (float *)(at.sums + rows * at.groups);
    return at;
}

size_t int_scratch_bytes(const IntLinear *job, long rows) {
    Prepared at = prepared_at(job, 0, 0);
    return (size_t)(rows * (at.row_bytes + 8 * at.groups));
}

static long number_of_tiles(const IntLinear *job, long rows) { return ceil_divide(rows, level_of(job, rows)->rows); }

static void prepare_tile(const IntLinear *job, const Prepared *to, const void *x, long rows, long tiles, long tile) {
    long first = share(rows, tiles, tile);
    level_of(job, rows)->prepare(job, to, x, first, share(rows, tiles, tile + 1) - first);
}

/* The panels [panel, end) for the tiles [tile, last) of all rows. */
static void multiply(const IntLinear *job, const Prepared *from, void *y, long rows, long tiles, long tile, long last, long panel,
                     long end) {
    const IntLevel *level = level_of(job, rows);
    long pairs = (end - panel) / 2 * 2;
    if (level->wide && job->quantized && job->ins % 8 == 0 && last - tile > 1 && pairs) {
        level->wide(job, from, y, rows, tiles, tile, last, panel, panel + pairs);
        panel += pairs;
    }
    for (; panel < end && tile < last; tile++) {
        long first = share(rows, tiles, tile);
        level->panels(job, from, y, first, share(rows, tiles, tile + 1) - first, panel, end);
    }
}

void int_prepare(const IntLinear *job, const void *x, void *scratch, long rows) {
    Prepared to = prepared_at(job, scratch, rows);
    for (long tiles = number_of_tiles(job, rows), tile = 0; tile < tiles; tile++)
        prepare_tile(job, &to, x, rows, tiles, tile);
}

void int_panels(const IntLinear *job, void *y, const void *scratch, long rows, long panel, long end) {
    Prepared from = prepared_at(job, (void *)scratch, rows);
    for (long tiles = number_of_tiles(job, rows), tile = 0; tile < tiles; tile += WIDE_TILES)
        multiply(job, &from, y, rows, tiles, tile, minimum(tile + WIDE_TILES, tiles), panel, end);
}

void int_rows(const uint8_t *w, const float *scales, const int64_t *index, float *y, long count, long ins) {
    for (; count > 0; count--, index++, y += ins) {
        const uint8_t *lane = w + *index / INT_PANEL * ceil_divide(ins, 4) * 64 + *index % INT_PANEL * 4;
        for (long k = 0; k < ins; k++)
            y[k] = (float)(lane[k / 4 * 64 + k % 4] - 128) * scales[*index];
    }
}

/* Item i is a chunk of panels for a block of tiles. */
static void compute(const Work *work, long item) {
    long panel = item % work->chunks * work->chunk, first = item / work->chunks * WIDE_TILES;
    multiply(work->job, &work->prepared, work->y, work->rows, work->tiles, first, minimum(first + WIDE_TILES, work->tiles), panel,
             minimum(panel + work->chunk, work->panels));
}

static void help(void *arg) {
    Work *work = arg;
    if (work->tiles > 1) {
        for (long tile; (tile = take(&work->preparing, work->tiles)) < work->tiles; finish(&work->preparing))
            prepare_tile(work->job, &work->prepared, work->x, work->rows, work->tiles, tile);
        wait_for(&work->preparing, work->tiles);
    }
    long own = atomic_fetch_add(&work->joined, 1);
    for (long i = 0; i < work->shares; i++) {
        long index = (own + i) % work->shares, begin = share(work->items, work->shares, index);
        long count = share(work->items, work->shares, index + 1) - begin;
        for (long item; (item = take(&work->products[index], count)) < count;)
            compute(work, begin + item);
    }
}

void int_linear(const IntLinear *job, const void *x, void *y, void *scratch, long rows, int threads) {
    Work work = {.job = job, .x = x, .y = y, .rows = rows, .shares = minimum(threads, MAX_SHARES)};
    if (rows == 0)
        return;
    work.prepared = prepared_at(job, scratch, rows);
    work.tiles = number_of_tiles(job, rows);
    work.panels = ceil_divide(job->outs, INT_PANEL);
    work.chunk = minimum(ceil_divide(CHUNK_BYTES, (long)int_panel_bytes(job)), ceil_divide(work.panels, CHUNKS * work.shares));
    if (work.tiles > 1)
        work.chunk = (work.chunk + 1) / 2 * 2; /* wide tiles take two panels */
    work.chunks = ceil_divide(work.panels, work.chunk);
    work.items = work.chunks * ceil_divide(work.tiles, WIDE_TILES);
    if (work.tiles == 1)
        prepare_tile(job, &work.prepared, x, rows, 1, 0);
    run_parallel(help, &work, threads);
}
