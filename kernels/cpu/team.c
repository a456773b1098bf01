#define _GNU_SOURCE
#include "team.h"

#include <stdlib.h>

#define NUM_FRAMES 16       /* a frame in use, and frames that late helpers hold */
#define SPINS_TO_YIELD 1024 /* pauses: 10 to 60 microseconds */

static Frame frames[NUM_FRAMES];

#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_HELPERS 127
#define OPEN 1u          /* in `ticket`: helpers may join */
#define FRAME 2u         /* in `ticket`: the index of the frame, from this bit on */
#define STEP (FRAME * NUM_FRAMES) /* in `ticket`: the number of the step, from this bit on */
#define SPIN_NANOSECONDS 300000 /* then a helper sleeps; Python takes 10 to 100 microseconds between two operations */

static struct {
    _Alignas(64) atomic_uint ticket; /* alone in its cache line: idle helpers read it all the time */
    _Alignas(64) atomic_uint sleeping;
    atomic_int taken; /* one frame at a time has helpers: a second caller works alone */
    unsigned started; /* number of helpers that exist */
} team;

static void yield(void) { sched_yield(); }

static long long nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Spin until the ticket differs from `seen`; sleep after SPIN_NANOSECONDS. */
static unsigned next_ticket(unsigned seen) {
    unsigned ticket;
    long long start = nanoseconds();
    for (long spins = 1; (ticket = atomic_load(&team.ticket)) == seen; spins++) {
        wait_briefly(spins);
        if (spins % SPINS_TO_YIELD || nanoseconds() - start < SPIN_NANOSECONDS)
            continue;
        atomic_fetch_add(&team.sleeping, 1);
        syscall(SYS_futex, &team.ticket, FUTEX_WAIT_PRIVATE, seen, 0, 0, 0);
        atomic_fetch_sub(&team.sleeping, 1);
        start = nanoseconds();
    }
    return ticket;
}

static void *help(void *unused) {
    (void)unused;
    for (unsigned ticket = atomic_load(&team.ticket);; ticket = next_ticket(ticket)) {
        if (!(ticket & OPEN))
            continue;
        Frame *frame = frames + ticket / FRAME % NUM_FRAMES;
        atomic_fetch_add(&frame->users, 1);
        /* The caller closes the ticket before it leaves the frame. So if the ticket is still open, the frame is of this step, and
         * it stays so until this helper leaves. */
        if (atomic_load(&team.ticket) == ticket) {
            int thread = atomic_fetch_add(&frame->joined, 1);
            if (thread < frame->threads)
                frame->walk(frame, thread);
        }
        atomic_fetch_sub(&frame->users, 1);
    }
    return 0;
}

/* A forked child has no helpers, and no thread of the parent is in its frames. */
static void forget_helpers(void) {
    atomic_store(&team.ticket, atomic_load(&team.ticket) & ~OPEN);
    atomic_store(&team.sleeping, 0);
    atomic_store(&team.taken, 0);
    team.started = 0;
    for (int i = 0; i < NUM_FRAMES; i++)
        atomic_store(&frames[i].users, 0);
}

static void start_helpers(unsigned wanted) {
    static int registered;
    sigset_t all, before;
    pthread_attr_t detached;
    if (!registered)
        registered = pthread_atfork(0, 0, forget_helpers) == 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for Python's threads */
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    while (registered && team.started < wanted && pthread_create(&thread, &detached, help, 0) == 0)
        team.started++;
    pthread_attr_destroy(&detached);
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

void frame_run(Frame *frame, void (*walk)(Frame *frame, int thread), int threads) {
    unsigned wanted = threads > 1 ? (unsigned)threads - 1 : 0;
    wanted = wanted > MAX_HELPERS ? MAX_HELPERS : wanted;
    frame->walk = walk;
    frame->threads = (int)wanted + 1;
    atomic_store(&frame->joined, 1);
    if (!wanted || atomic_exchange(&team.taken, 1)) {
        walk(frame, 0);
        return;
    }
    if (team.started < wanted)
        start_helpers(wanted);
    unsigned step = atomic_load(&team.ticket) / STEP + 1, ticket = step * STEP + (unsigned)(frame - frames) * FRAME;
    atomic_store(&team.ticket, ticket | OPEN);
    if (atomic_load(&team.sleeping))
        syscall(SYS_futex, &team.ticket, FUTEX_WAKE_PRIVATE, wanted, 0, 0, 0);
    walk(frame, 0);
    atomic_store(&team.ticket, ticket);
    atomic_store(&team.taken, 0);
}

int team_is_busy(void) { return atomic_load(&team.taken); }

#else

static void yield(void) {}

void frame_run(Frame *frame, void (*walk)(Frame *frame, int thread), int threads) {
    (void)threads;
    frame->walk = walk;
    frame->threads = 1;
    walk(frame, 0);
}

int team_is_busy(void) { return 0; }

#endif

void wait_briefly(long spins) {
    if (spins % SPINS_TO_YIELD == 0)
        yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

Frame *frame_taken(const void *owner, size_t bytes) {
    for (int i = 0;; i = (i + 1) % NUM_FRAMES) {
        Frame *frame = frames + i;
        int none = 0;
        if (!atomic_compare_exchange_strong(&frame->users, &none, 1)) {
            if (i == NUM_FRAMES - 1)
                yield();
            continue;
        }
        atomic_store(&frame->owner, owner);
        if (frame->size < bytes) {
            free(frame->memory);
            frame->size = (bytes + 65535) / 65536 * 65536;
            frame->memory = aligned_alloc(64, frame->size);
        }
        if (frame->size == 0 || frame->memory)
            return frame;
        frame->size = 0;
        frame_left(frame);
        return NULL;
    }
}

int frame_has_helpers(Frame *frame) { return atomic_load(&frame->users) > 1; }

void frame_left(Frame *frame) { atomic_fetch_sub(&frame->users, 1); }

void frames_left(const void *owner) {
    for (int i = 0; i < NUM_FRAMES; i++)
        while (atomic_load(&frames[i].users) && atomic_load(&frames[i].owner) == owner)
            yield();
}
