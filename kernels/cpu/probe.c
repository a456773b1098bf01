/* A plain read of memory, the limit of a step that must read its weights: a measuring device, used by no kernel. */
#include "probe.h"
#include "threads.h"
#include "vectors.h"

#if defined(PITLANE_VECTORS)
#define LINE 64

typedef struct {
    const char *memory;
    long bytes, parts;
    Phase phase;
    atomic_ullong sum;
} Reading;

TARGET static void read_part(void *arg) {
    Reading *reading = arg;
    for (long part; (part = take(&reading->phase, reading->parts)) < reading->parts;) {
        long begin = reading->bytes / LINE * part / reading->parts * LINE;
        long end = reading->bytes / LINE * (part + 1) / reading->parts * LINE;
        __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
        for (; begin + 4 * LINE <= end; begin += 4 * LINE)
            UNROLLED for (int i = 0; i < 4; i++) {
                _mm_prefetch(reading->memory + begin + 4096 + i * LINE, _MM_HINT_NTA);
                sums[i] = _mm512_add_epi64(sums[i], _mm512_loadu_si512(reading->memory + begin + i * LINE));
            }
        __m512i all = _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3]));
        atomic_fetch_add(&reading->sum, (unsigned long long)_mm512_reduce_add_epi64(all));
    }
}

uint64_t memory_read(const char *memory, int64_t bytes, int threads) {
    Reading reading = {.memory = memory, .bytes = bytes, .parts = threads};
    run_parallel(read_part, &reading, threads);
    return atomic_load(&reading.sum);
}

#else

uint64_t memory_read(const char *memory, int64_t bytes, int threads) { return (void)memory, (void)bytes, (void)threads, 0; }

#endif
