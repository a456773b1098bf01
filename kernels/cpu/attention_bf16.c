/* bfloat16 attention: divides pieces and tokens among threads. attention_pieces.h computes them. */
#include "attention_bf16.h"
#include "threads.h"
#include "vectors.h"

void *attention_buffer(void) {
    static _Thread_local _Alignas(64) char buffer[ATTENTION_BUFFER];
    return buffer;
}

#if defined(PITLANE_VECTORS)
typedef struct {
    const Attention *job;
    const Vectors *vectors;
    long threads;
    Phase scoring, merging;
} Shared;

static void work(void *arg) {
    Shared *shared = arg;
    const Attention *job = shared->job;
    long items = job->num_tasks * job->kv_heads;
    for (long item; (item = take(&shared->scoring, items)) < items; finish(&shared->scoring))
        shared->vectors->attention_item(job, item, item + shared->threads < items ? item + shared->threads : item);
    wait_for(&shared->scoring, items);
    for (long row; (row = take(&shared->merging, job->num_rows)) < job->num_rows;)
        shared->vectors->attention_merge(job, row);
}

int has_attention_bf16(int64_t dim) { return dim > 0 && dim % 32 == 0 && dim <= MAX_DIM && vectors() != NULL; }

void attention_bf16(const Attention *job, int threads) {
    Shared shared = {.job = job, .vectors = vectors(), .threads = threads};
    run_parallel(work, &shared, threads);
}

#else

int has_attention_bf16(int64_t dim) {
    (void)dim;
    return 0;
}

void attention_bf16(const Attention *job, int threads) { (void)job, (void)threads; }

#endif
