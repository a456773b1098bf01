/* The helper threads of this process: they walk through a frame together with its caller, as equals.
 *
 * A frame is the memory of one step or of one job of `run_parallel`, and counts the threads that may touch it. The caller takes a
 * frame, fills it, and walks. Helpers that arrive in time walk too. The caller of a step waits neither for a helper to arrive nor
 * for a helper to leave. A helper that the operating system has suspended may wake up after the step: it still holds its frame, so
 * no later step uses that memory, and the helper may write there. A frame becomes free when its last thread leaves. Idle helpers
 * spin for a short time, because the next operation of a forward comes within microseconds; then they sleep. */
#ifndef PITLANE_TEAM_H
#define PITLANE_TEAM_H

#include <stdatomic.h>
#include <stddef.h>

typedef struct Frame {
    _Alignas(64) atomic_int users;  /* threads that may touch the frame */
    _Alignas(64) atomic_int joined; /* threads that have begun to walk, the caller included */
    int threads;                    /* largest number of threads that walk */
    void (*walk)(struct Frame *frame, int thread);
    void (*body)(void *job); /* of `run_parallel`, with `job` */
    void *job;
    _Atomic(const void *) owner; /* what the step reads besides the frame: see `frames_left` */
    char *memory;                /* aligned to 64 bytes */
    size_t size;
} Frame;

/* Reserve a free frame with at least `bytes` of memory; NULL if there is no memory. The contents are undefined. */
Frame *frame_taken(const void *owner, size_t bytes);

/* Run frame->walk(frame, 0) on the caller, and frame->walk(frame, n) with n < threads on helpers that arrive before the caller's
 * walk returns. Then no further helper begins. If another thread is in `frame_run`, the caller walks alone. */
void frame_run(Frame *frame, void (*walk)(Frame *frame, int thread), int threads);

/* Whether a helper is in the frame. After `frame_run`, a helper that comes too late touches nothing but the count of users. */
int frame_has_helpers(Frame *frame);

/* Give the caller's hold on a frame back. */
void frame_left(Frame *frame);

/* Whether a caller is in `frame_run` with helpers. */
int team_is_busy(void);

/* Wait for a moment; after many moments, let other threads of the processor run. spins: the number of the moment. */
void wait_briefly(long spins);

/* Wait until no thread is in a frame of this owner. */
void frames_left(const void *owner);

#endif
