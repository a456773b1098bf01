#define _GNU_SOURCE
#include "threads.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*Number)(void);

static pthread_once_t looked_up = PTHREAD_ONCE_INIT;
static Parallel parallel;
static Number omp_index, omp_count;

static void look_up(void) {
    void *runtimes[] = {RTLD_DEFAULT, dlopen("libgomp.so.1", RTLD_NOW | RTLD_NOLOAD)};
    for (int i = 0; i < 2 && !parallel; i++) {
        omp_index = (Number)dlsym(runtimes[i], "omp_get_thread_num");
        omp_count = (Number)dlsym(runtimes[i], "omp_get_num_threads");
        parallel = omp_index && omp_count ? (Parallel)dlsym(runtimes[i], "GOMP_parallel") : 0;
    }
}

typedef struct {
    void (*body)(void *, Worker);
    void *job;
} Call;

static void on_thread(void *call) {
    ((Call *)call)->body(((Call *)call)->job, (Worker){omp_index(), omp_count()});
}

void run_parallel(void (*body)(void *, Worker), void *job, int threads) {
    pthread_once(&looked_up, look_up);
    if (threads > 1 && parallel)
        parallel(on_thread, &(Call){body, job}, (unsigned)threads, 0);
    else
        body(job, (Worker){0, 1});
}

void wait_for_all(atomic_int *arrived, int count) {
    atomic_fetch_add(arrived, 1);
    for (int spins = 0; atomic_load_explicit(arrived, memory_order_acquire) < count; spins++)
        if (spins > 1000)
            sched_yield();
}

#else

void run_parallel(void (*body)(void *, Worker), void *job, int threads) {
    (void)threads;
    body(job, (Worker){0, 1});
}

void wait_for_all(atomic_int *arrived, int count) {
    (void)arrived, (void)count;
}

#endif
