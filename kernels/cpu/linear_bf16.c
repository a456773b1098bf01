/* bfloat16 linear: divides the outputs among threads. linear_vectors.c (AVX-512) or linear_tiles.c (AMX) computes them.
 *
 * A panel is 32 outputs. A thread takes a few panels of one block of rows at a time. With vectors and with tiles, an output is one
 * chain of sums whose order depends only on the number of inputs. So a row's result does not depend on its batch.
 */
#include "linear_bf16.h"
#include "linear_parts.h"

#if defined(PITLANE_VECTORS)
static void work(void *arg) {
    Job *job = arg;
    if (job->packed) {
        for (long item; (item = take(&job->packing, job->parts)) < job->parts; finish(&job->packing))
            pack_rows(job, item);
        wait_for(&job->packing, job->parts);
    }
    long chunks = ceil_divide(job->panels, job->chunk), items = chunks * ceil_divide(job->rows, job->block);
    for (long item; (item = take(&job->products, items)) < items;) {
        long first = item / chunks * job->block, panel = item % chunks * job->chunk;
        (job->amx ? by_tiles : by_vectors)(job, first, minimum(job->rows - first, job->block), panel,
                                           minimum(panel + job->chunk, job->panels));
    }
}

int has_linear_bf16(void) { return has_vectors(); }

void linear_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, void *y, uint16_t *scratch, long rows, long outs, long ins,
                 int amx, int threads, int wide) {
    Job job = {.x = (const uint32_t *)x, .w = (const char *)w, .bias = bias, .y = y, .rows = rows, .outs = outs, .amx = amx};
    job.packed = rows > 1 && !amx ? (uint32_t *)scratch : 0;
    job.wide = wide;
    job.pairs = ins / 2;
    job.parts = minimum(4 * threads, ceil_divide(job.pairs, LINE));
    job.panels = ceil_divide(outs, OUTS);
    job.block = amx ? TILE_ROWS : VECTOR_ROWS;
    job.chunk = minimum(amx ? TILE_PANELS : VECTOR_PANELS, ceil_divide(job.panels, 4 * threads));
    run_parallel(work, &job, threads);
}

#else

int has_linear_bf16(void) { return 0; }

void linear_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, void *y, uint16_t *scratch, long rows, long outs, long ins,
                 int amx, int threads, int wide) {
    (void)x, (void)w, (void)bias, (void)y, (void)scratch, (void)rows, (void)outs, (void)ins, (void)amx, (void)threads, (void)wide;
}

#endif
