/* bfloat16 linear on AMX's tiles.
 *
 * Two tiles of up to 16 rows times a panel's two halves: four tiles of sums, so that each load serves two products and no sum waits
 * for itself. Inputs lie as they come, and a panel of 16 pairs is a tile as it lies. Every output is one chain of sums over
 * ascending inputs, 32 at a time, whatever the number of rows. Of more than 32 rows, 512 inputs of a panel (32 kB, in the first
 * cache) meet all rows of a block before the next.
 */
#define _GNU_SOURCE
#include "linear_bf16.h"
#include "linear_parts.h"
#include "tiles.h"

#if defined(PITLANE_VECTORS) && defined(PITLANE_TILES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define HEIGHT 16       /* rows of a tile, and pairs of inputs */
#define STEP (HEIGHT * PAIR) /* bytes of weights that a step reads */
#define FEW (2 * HEIGHT)  /* rows: so few read the weights once */
#define ROW (OUTS * 4)  /* bytes of sums */
#define CHUNK 256       /* pairs of inputs at a time, of more rows */
#define AHEAD 8192      /* bytes from a weight's use to its prefetch */
#define REQUEST 0x1023  /* ARCH_REQ_XCOMP_PERM: the state of tiles is given to a process on demand */
#define TILE_DATA 18    /* its number, as XCR0's bit */

static int look_up(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) /* AMX-BF16, AMX-TILE */
        return 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) /* OSXSAVE */
        return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a >> 17 & 3) == 3 && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

int has_amx_bf16(void) {
    static atomic_int known; /* 1 for no, 2 for yes */
    if (!atomic_load(&known))
        atomic_store(&known, 1 + (has_vectors() && look_up()));
    return atomic_load(&known) - 1;
}

/* sums: tiles 0, 1 of the upper rows, 2, 3 of the lower; inputs: 4, 5; weights: 6, 7. */
static void configure(long count) {
    TileShapes shapes = {.palette = 1};
    long upper = least(count, HEIGHT);
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

/* sums [rows][OUTS], or zero at first, += x [rows][stride bytes] times w, `steps` times 16 pairs; 16 rows, or as many more below. */
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

/* Where the weights lie that come after those of a panel's chunk of inputs. */
INLINE const char *next_weights(const Job *job, long panel, long first, long end, long k, long most) {
    if (panel + 1 < end)
        return job->w + ((panel + 1) * job->pairs + k) * PAIR;
    return job->w + (k + most < job->pairs ? first * job->pairs + k + most : end * job->pairs) * PAIR;
}

TARGET void by_tiles(const Job *job, long first, long rows, long panel, long end) {
    _Alignas(LINE) float sums[TILE_PANELS][TILE_ROWS * OUTS];
    long most = rows > FEW ? CHUNK : job->pairs, configured = 0;
    for (long k = 0; k < job->pairs; k += most) {
        long steps = least(job->pairs - k, most) / HEIGHT;
        for (long p = panel; p < end; p++) {
            const char *w = job->w + (p * job->pairs + k) * PAIR;
            const char *ahead = rows > FEW ? next_weights(job, p, panel, end, k, most) : w + AHEAD;
            for (long row = 0; row < rows; row += FEW, ahead = 0) {
                const char *x = (const char *)(job->x + (first + row) * job->pairs + k);
                long count = least(rows - row, FEW);
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
            store(job, sums[p - panel] + m * OUTS, first + m, p);
}

#else

int has_amx_bf16(void) { return 0; }

#if defined(PITLANE_VECTORS)
void by_tiles(const Job *job, long first, long rows, long panel, long end) { (void)job, (void)first, (void)rows, (void)panel, (void)end; }
#endif
#endif
