/* bfloat16 linear: divides the outputs among threads. linear_vectors.h or linear_tiles.c (AMX) computes them.
 *
 * A panel is 32 outputs. A thread takes a few panels of one block of rows at a time. With every kind of products, an output is one
 * chain of sums whose order depends only on the number of inputs. So a row's result does not depend on its batch.
 */
#include "linear_bf16.h"
#include "vectors.h"

#if defined(PITLANE_VECTORS)
void multiply_panels(const Job *job, long first, long rows, long panel, long end) {
    if (job->products != BY_TILES)
        job->vectors->panels(job, first, rows, panel, end);
    else
        for (; panel < end; panel += TILE_PANELS)
            by_tiles(job, first, rows, panel, minimum(panel + TILE_PANELS, end));
}

static void work(void *arg) {
    Job *job = arg;
    if (job->packed) {
        for (long item; (item = take(&job->packing, job->parts)) < job->parts; finish(&job->packing))
            job->vectors->prepare(job, item);
        wait_for(&job->packing, job->parts);
    }
    long chunks = ceil_divide(job->panels, job->chunk), items = chunks * ceil_divide(job->rows, job->block);
    for (long item; (item = take(&job->multiplying, items)) < items;) {
        long first = item / chunks * job->block, panel = item % chunks * job->chunk;
        multiply_panels(job, first, minimum(job->rows - first, job->block), panel, minimum(panel + job->chunk, job->panels));
    }
}

int has_products(int64_t products, int64_t ins) {
    const Vectors *best = vectors();
    if (!best || ins <= 0)
        return 0;
    if (products == BY_TILES)
        return ins % 32 == 0 && has_amx_bf16();
    return ins % 2 == 0 && (products == BY_FLOATS || (products == BY_VECTORS && best->has_pairs));
}

size_t scratch_bytes_bf16(int products, long rows, long ins) {
    return products == BY_FLOATS ? (size_t)ins * 4 : products == BY_TILES || rows == 1 ? 0 : (size_t)ins * 2;
}

void linear_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, void *y, void *scratch, long rows, long outs, long ins,
                 int products, int threads, int wide) {
    Job job = {.vectors = vectors(), .x = (const uint32_t *)x, .w = (const char *)w, .bias = bias, .y = y, .rows = rows, .outs = outs};
    job.products = products;
    job.wide = wide;
    job.packed = scratch_bytes_bf16(products, rows, ins) ? scratch : NULL;
    job.pairs = ins / 2;
    job.parts = minimum(4 * threads, ceil_divide(job.pairs, LINE));
    job.panels = ceil_divide(outs, OUTS);
    job.block = products == BY_TILES ? TILE_ROWS : VECTOR_ROWS;
    job.chunk = minimum(products == BY_TILES ? TILE_PANELS : VECTOR_PANELS, ceil_divide(job.panels, 4 * threads));
    run_parallel(work, &job, threads);
}

#else

int has_products(int64_t products, int64_t ins) { return (void)products, (void)ins, 0; }

size_t scratch_bytes_bf16(int products, long rows, long ins) { return (void)products, (void)rows, (void)ins, 0; }

void linear_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, void *y, void *scratch, long rows, long outs, long ins,
                 int products, int threads, int wide) {
    (void)x, (void)w, (void)bias, (void)y, (void)scratch, (void)rows, (void)outs, (void)ins, (void)products, (void)threads, (void)wide;
}

#endif
