#include "threads.h"

#include "team.h"

static void call_body(Frame *frame, int thread) {
    (void)thread;
    frame->body(frame->job);
}

void run_parallel(void (*body)(void *), void *job, int threads) {
    Frame *frame = threads > 1 && !team_is_busy() ? frame_taken(NULL, 0) : NULL;
    if (!frame) {
        body(job);
        return;
    }
    frame->body = body;
    frame->job = job;
    frame_run(frame, call_body, threads);
    for (long spins = 1; frame_has_helpers(frame); spins++)
        wait_briefly(spins);
    frame_left(frame);
}

void wait_for(Phase *phase, long items) {
    for (long spins = 1; atomic_load_explicit(&phase->done, memory_order_acquire) < items; spins++)
        wait_briefly(spins);
}
