/* Threads that share the work of one kernel call.
 *
 * The caller never waits for a helper thread to arrive. It publishes the job, takes items itself, and waits only for helpers that
 * have joined, until each has finished its item. So a helper that the operating system has suspended, because another process
 * uses its core, costs nothing; a helper that is suspended inside an item costs the rest of that item.
 *
 * The helpers are those of team.h, so a process has one set of them. While another caller has them, a job runs on its caller alone.
 */
#ifndef PITLANE_THREADS_H
#define PITLANE_THREADS_H

#include <stdatomic.h>

/* Counters of one phase of a job: threads take its items in order. Starts as zeros. */
typedef struct {
    atomic_long next, done;
} Phase;

/* Run body(job) on the caller, and on up to `threads` - 1 helpers that join in time. Return when the caller and all helpers that
 * joined have returned from body. body must take its items from a Phase, because the caller may run alone. */
void run_parallel(void (*body)(void *job), void *job, int threads);

/* The next item of [0, items), or `items` when all are taken. */
static inline long take(Phase *phase, long items) {
    long item = atomic_load_explicit(&phase->next, memory_order_relaxed);
    return item < items && (item = atomic_fetch_add(&phase->next, 1)) < items ? item : items;
}

/* Mark a taken item as finished. Needed if a later phase reads its results: see wait_for. */
static inline void finish(Phase *phase) { atomic_fetch_add_explicit(&phase->done, 1, memory_order_release); }

/* Wait until all items of a phase are finished. Call it only when all items have been taken. */
void wait_for(Phase *phase, long items);

#endif
