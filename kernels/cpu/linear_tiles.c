/* bfloat16 linear on AMX's tiles.
 *
 * Two tiles of inputs (up to 16 rows each) times the two halves of a panel give four tiles of sums: each load serves two products,
 * and no product waits for the sum before it. Tiles load inputs and packed weights without rearranging them. An output is one chain
 * of sums over ascending inputs, 32 at a time, for any number of rows. With more than 32 rows, 512 inputs of a panel (32 kB, in the
 * first cache) are multiplied with all rows of a block before the next 512 inputs.
 */
#define _GNU_SOURCE
#include "levels.h"
#include "tiles.h"
#include "vectors.h"

#if defined(PITLANE_VECTORS) && defined(PITLANE_TILES)
#include "lanes_avx512.h"
#include "linear_products.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define HEIGHT 16       /* rows of a tile; pairs of inputs in a step */
#define STEP (HEIGHT * PAIR) /* bytes of weights that a step reads */
#define FEW (2 * HEIGHT)  /* up to so many rows, one sweep over the weights serves all */
#define ROW (OUTS * 4)  /* bytes of a row's sums */
#define CHUNK 256       /* pairs of inputs in a sweep, for more rows */
#define AHEAD 8192      /* bytes between a weight in use and the weight prefetched */
#define REQUEST 0x1023  /* ARCH_REQ_XCOMP_PERM: Linux lets a process use the tiles after this request */
#define TILE_DATA 18    /* the tiles' bit in XCR0 */

enum { AMX_BF16 = 1, AMX_INT8 = 2, KNOWN = 4 };

/* The kinds of products that this process may use. */
static int look_up(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1)) /* AMX-TILE */
        return 0;
    int kinds = (d >> 22 & 1 ? AMX_BF16 : 0) | (d >> 25 & 1 ? AMX_INT8 : 0);
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) /* OSXSAVE */
        return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a >> 17 & 3) == 3 && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0 ? kinds : 0;
}

static int has(int kind) {
    static atomic_int known;
    if (allowed_level() < LEVEL_AMX || vectors_level() < LEVEL_AVX512)
        return 0;
    if (!atomic_load(&known))
        atomic_store(&known, KNOWN | look_up());
    return (atomic_load(&known) & kind) != 0;
}

int has_amx_bf16(void) { return has(AMX_BF16); }
int has_amx_int8(void) { return has(AMX_INT8); }

/* Set the shapes of the tiles. Sums: tiles 0 and 1 for the upper rows, 2 and 3 for the lower. Inputs: 4, 5. Weights: 6, 7. */
static void configure(long count) {
    TileShapes shapes = {.palette = 1};
    long upper = minimum(count, HEIGHT);
    for (int tile = 0; tile < 8; tile++) {
        long rows = tile > 5 ? HEIGHT : tile < 2 || tile == 4 ? upper : count - upper;
        shapes.rows[tile] = (uint8_t)rows;
        shapes.bytes[tile] = rows ? LINE : 0;
    }
    tiles_configure(&shapes);
}

INLINE void prefetch(const char *ahead) {
    UNROLLED for (int line = 0; line < STEP; line += LINE)
        _mm_prefetch(ahead + line, _MM_HINT_T1);
}

/* sums [rows][OUTS] += x [rows][stride bytes] times w, over `steps` times 16 pairs. both: up to 32 rows, else up to 16.
 * first: start from 0 instead of sums. */
INLINE void sweep(int both, const char *x, long stride, const char *w, long steps, float *sums, int first, const char *ahead) {
    const char *below = x + HEIGHT * stride;
    float *sums_below = sums + HEIGHT * OUTS;
    if (first) {
        tile_zero(0);
        tile_zero(1);
    } else {
        tile_load(0, sums, ROW);
        tile_load(1, sums + HEIGHT, ROW);
    }
    if (both && first) {
        tile_zero(2);
        tile_zero(3);
    } else if (both) {
        tile_load(2, sums_below, ROW);
        tile_load(3, sums_below + HEIGHT, ROW);
    }
    for (long step = 0; step < steps; step++, x += LINE, below += LINE, w += STEP) {
        if (ahead)
            prefetch(ahead + step * STEP);
        tile_load(4, x, stride);
        tile_load(6, w, PAIR);
        tile_dot(0, 4, 6);
        if (both) {
            tile_load(5, below, stride);
            tile_dot(2, 5, 6);
        }
        tile_load(7, w + LINE, PAIR);
        tile_dot(1, 4, 7);
        if (both)
            tile_dot(3, 5, 7);
    }
    tile_store(0, sums, ROW);
    tile_store(1, sums + HEIGHT, ROW);
    if (both) {
        tile_store(2, sums_below, ROW);
        tile_store(3, sums_below + HEIGHT, ROW);
    }
}

/* The address of the weights of the next sweep: of the next panel, or of the first panel's next inputs. */
INLINE const char *next_weights(const Job *job, long panel, long first, long end, long k, long chunk) {
    if (panel + 1 < end)
        return job->w + ((panel + 1) * job->pairs + k) * PAIR;
    return job->w + (k + chunk < job->pairs ? first * job->pairs + k + chunk : end * job->pairs) * PAIR;
}

TARGET void by_tiles(const Job *job, long first, long rows, long panel, long end) {
    _Alignas(LINE) float sums[TILE_PANELS][TILE_ROWS * OUTS];
    long chunk = rows > FEW ? CHUNK : job->pairs, configured = 0;
    for (long k = 0; k < job->pairs; k += chunk) {
        long steps = minimum(job->pairs - k, chunk) / HEIGHT;
        for (long p = panel; p < end; p++) {
            const char *w = job->w + (p * job->pairs + k) * PAIR;
            const char *ahead = rows > FEW ? next_weights(job, p, panel, end, k, chunk) : w + AHEAD;
            for (long row = 0; row < rows; row += FEW, ahead = 0) {
                const char *x = (const char *)(job->x + (first + row) * job->pairs + k);
                long count = minimum(rows - row, FEW);
                if (count != configured)
                    configure(configured = count);
                if (count > HEIGHT)
                    sweep(1, x, job->pairs * 4, w, steps, sums[p - panel] + row * OUTS, k == 0, ahead);
                else
                    sweep(0, x, job->pairs * 4, w, steps, sums[p - panel] + row * OUTS, k == 0, ahead);
            }
        }
    }
    tiles_release();
    for (long p = panel; p < end; p++)
        for (long m = 0; m < rows; m++)
            put_outputs(job, sums[p - panel] + m * OUTS, first + m, p);
}

#else

int has_amx_bf16(void) { return 0; }
int has_amx_int8(void) { return 0; }

#if defined(PITLANE_VECTORS)
void by_tiles(const Job *job, long first, long rows, long panel, long end) { (void)job, (void)first, (void)rows, (void)panel, (void)end; }
#endif
#endif
