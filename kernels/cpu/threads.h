/* Work shared by the threads that torch already has: the OpenMP runtime is looked up in the process, not linked, because a
 * second one would have threads of its own that wait, spinning, on the same cores. Without one, work runs on the caller. */
#ifndef PITLANE_THREADS_H
#define PITLANE_THREADS_H

#include <stdatomic.h>

typedef struct {
    int index, count;
} Worker;

/* Run body(job, worker) on up to `threads` threads and return when all are done. */
void run_parallel(void (*body)(void *job, Worker worker), void *job, int threads);

/* Wait until `count` threads have come here; `arrived` starts at 0 and serves once. */
void wait_for_all(atomic_int *arrived, int count);

#endif
