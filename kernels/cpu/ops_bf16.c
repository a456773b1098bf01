/* Operations on rows, which read and write memory once, and write bfloat16. A row's result does not depend on the other rows.
 * ops_rows.h computes a row. */
#include "ops_bf16.h"
#include "threads.h"
#include "vectors.h"

#if defined(PITLANE_VECTORS)
#define ITEM 16384 /* elements that a thread takes at a time; computing fewer takes less time than waking a thread */

typedef struct RowsJob {
    const Vectors *vectors;
    void (*operation)(const struct RowsJob *, int64_t row, int64_t end);
    const void *x;
    const uint16_t *w;
    uint16_t *y;
    int64_t rows, dim;
    float eps;
    int wide; /* x is float32 */
    int64_t height; /* rows that a thread takes at a time */
    Phase phase;
} RowsJob;

static void norm_rows(const RowsJob *job, int64_t row, int64_t end) {
    int64_t row_bytes = job->dim * (job->wide ? 4 : 2);
    for (; row < end; row++)
        job->vectors->rms_norm_row((const char *)job->x + row * row_bytes, job->w, job->y + row * job->dim, job->dim, job->eps,
                                   job->wide);
}

static void silu_rows(const RowsJob *job, int64_t row, int64_t end) {
    for (; row < end; row++) {
        const uint16_t *gates = (const uint16_t *)job->x + 2 * row * job->dim;
        job->vectors->silu_mul_row(gates, gates + job->dim, job->y + row * job->dim, job->dim);
    }
}

static void work(void *arg) {
    RowsJob *job = arg;
    long items = (job->rows + job->height - 1) / job->height;
    for (long item; (item = take(&job->phase, items)) < items;) {
        int64_t row = item * job->height, end = row + job->height;
        job->operation(job, row, end < job->rows ? end : job->rows);
    }
}

static void run(RowsJob job, int threads) {
    job.vectors = vectors();
    job.height = ITEM < job.dim ? 1 : ITEM / job.dim;
    run_parallel(work, &job, job.rows < 2 * job.height ? 1 : threads);
}

int has_ops_bf16(void) { return vectors() != NULL; }

void rms_norm_bf16(const void *x, const uint16_t *w, uint16_t *y, int64_t rows, int64_t dim, float eps, int threads, int wide) {
    run((RowsJob){.operation = norm_rows, .x = x, .w = w, .y = y, .rows = rows, .dim = dim, .eps = eps, .wide = wide}, threads);
}

void silu_mul_bf16(const uint16_t *x, uint16_t *y, int64_t rows, int64_t dim, int threads) {
    run((RowsJob){.operation = silu_rows, .x = x, .y = y, .rows = rows, .dim = dim}, threads);
}

#else

int has_ops_bf16(void) { return 0; }

void rms_norm_bf16(const void *x, const uint16_t *w, uint16_t *y, int64_t rows, int64_t dim, float eps, int threads, int wide) {
    (void)x, (void)w, (void)y, (void)rows, (void)dim, (void)eps, (void)threads, (void)wide;
}

void silu_mul_bf16(const uint16_t *x, uint16_t *y, int64_t rows, int64_t dim, int threads) {
    (void)x, (void)y, (void)rows, (void)dim, (void)threads;
}

#endif
