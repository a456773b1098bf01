/* bfloat16 linear: who computes which outputs, by AVX-512's vectors (linear_vectors.c) or AMX's tiles (linear_tiles.c).
 *
 * A panel is 32 outputs. Threads take a few panels at a time, for one block of rows after the other. In both ways every output is
 * one chain of sums in an order that depends on the number of inputs alone: a row's result does not depend on its batch.
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
    long chunks = divided(job->panels, job->chunk), items = chunks * divided(job->rows, job->block);
    for (long item; (item = take(&job->products, items)) < items;) {
        long first = item / chunks * job->block, panel = item % chunks * job->chunk;
        (job->amx ? by_tiles : by_vectors)(job, first, least(job->rows - first, job->block), panel,
                                           least(panel + job->chunk, job->panels));
    }
}

int has_linear_bf16(void) { return has_vectors(); }

void linear_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, uint16_t *y, uint16_t *scratch, long rows, long outs,
                 long ins, int amx, int threads) {
    Job job = {.x = (const uint32_t *)x, .w = (const char *)w, .bias = bias, .y = y, .rows = rows, .outs = outs, .amx = amx};
    job.packed = rows > 1 && !amx ? (uint32_t *)scratch : 0;
    job.pairs = ins / 2;
    job.parts = least(4 * threads, divided(job.pairs, LINE));
    job.panels = divided(outs, OUTS);
    job.block = amx ? TILE_ROWS : VECTOR_ROWS;
    job.chunk = least(amx ? TILE_PANELS : VECTOR_PANELS, divided(job.panels, 4 * threads));
    run_parallel(work, &job, threads);
}

#else

int has_linear_bf16(void) { return 0; }

void linear_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, uint16_t *y, uint16_t *scratch, long rows, long outs,
                 long ins, int amx, int threads) {
    (void)x, (void)w, (void)bias, (void)y, (void)scratch, (void)rows, (void)outs, (void)ins, (void)amx, (void)threads;
}

#endif
