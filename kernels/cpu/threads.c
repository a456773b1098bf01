#define _GNU_SOURCE
#include "threads.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_HELPERS 127
#define OPEN 128u                /* in `state`: helpers may join the job */
#define JOINED 127u              /* in `state`: how many helpers have joined */
#define JOB 256u                 /* in `state`: the number of the job, from this bit on */
#define SPINS_TO_YIELD 1024      /* pauses before a thread yields and reads the clock: 10 to 60 microseconds */
#define SPIN_NANOSECONDS 300000  /* then a helper sleeps; Python takes 10 to 100 microseconds between two operations */

static struct {
    _Alignas(64) atomic_uint state; /* alone in its cache line: idle helpers read it all the time */
    _Alignas(64) atomic_uint sleeping;
    atomic_flag taken; /* one job at a time: a second caller works alone */
    void (*body)(void *);
    void *job;
    atomic_uint wanted; /* largest number of helpers that may join the job */
    unsigned started; /* number of helpers that exist */
} pool = {.taken = ATOMIC_FLAG_INIT};

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static long long nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Spin until `state` differs from `seen`; sleep after SPIN_NANOSECONDS. */
static unsigned next_state(unsigned seen) {
    unsigned state;
    long long start = nanoseconds();
    for (int spins = 1; (state = atomic_load(&pool.state)) == seen; spins++) {
        pause_briefly();
        if (spins % SPINS_TO_YIELD)
            continue;
        sched_yield();
        if (nanoseconds() - start < SPIN_NANOSECONDS)
            continue;
        atomic_fetch_add(&pool.sleeping, 1);
        syscall(SYS_futex, &pool.state, FUTEX_WAIT_PRIVATE, seen, 0, 0, 0);
        atomic_fetch_sub(&pool.sleeping, 1);
        start = nanoseconds();
    }
    return state;
}

static void *help(void *unused) {
    (void)unused;
    for (unsigned state = atomic_load(&pool.state);;) {
        unsigned job = state / JOB;
        if (state & OPEN && (state & JOINED) < pool.wanted) {
            if (!atomic_compare_exchange_weak(&pool.state, &state, state + 1))
                continue;
            pool.body(pool.job);
            atomic_fetch_sub(&pool.state, 1);
            state = atomic_load(&pool.state);
        }
        while (state / JOB == job)
            state = next_state(state);
    }
    return 0;
}

/* A forked child has no helper threads, and none of its threads works on the parent's job. */
static void forget_helpers(void) {
    atomic_store(&pool.state, atomic_load(&pool.state) / JOB * JOB);
    atomic_store(&pool.sleeping, 0);
    atomic_flag_clear(&pool.taken);
    pool.started = 0;
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
    while (registered && pool.started < wanted && pthread_create(&thread, &detached, help, 0) == 0)
        pool.started++;
    pthread_attr_destroy(&detached);
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

void run_parallel(void (*body)(void *), void *job, int threads) {
    unsigned wanted = threads > 1 ? (unsigned)threads - 1 : 0;
    wanted = wanted > MAX_HELPERS ? MAX_HELPERS : wanted;
    if (!wanted || atomic_flag_test_and_set(&pool.taken)) {
        body(job);
        return;
    }
    if (pool.started < wanted)
        start_helpers(wanted);
    pool.body = body;
    pool.job = job;
    pool.wanted = wanted;
    atomic_store(&pool.state, (atomic_load(&pool.state) / JOB + 1) * JOB | OPEN);
    if (atomic_load(&pool.sleeping))
        syscall(SYS_futex, &pool.state, FUTEX_WAKE_PRIVATE, wanted, 0, 0, 0);
    body(job);
    atomic_fetch_and(&pool.state, ~OPEN);
    for (int spins = 1; atomic_load(&pool.state) & JOINED; spins++)
        spins % SPINS_TO_YIELD ? pause_briefly() : (void)sched_yield();
    atomic_flag_clear(&pool.taken);
}

void wait_for(Phase *phase, long items) {
    for (int spins = 1; atomic_load_explicit(&phase->done, memory_order_acquire) < items; spins++)
        spins % SPINS_TO_YIELD ? pause_briefly() : (void)sched_yield();
}

#else

void run_parallel(void (*body)(void *), void *job, int threads) {
    (void)threads;
    body(job);
}

void wait_for(Phase *phase, long items) { (void)phase, (void)items; }

#endif
