#define _GNU_SOURCE
#include "probe.h"
#include "threads.h"

#include <time.h>

#define MAX_SHARES 64
#define CHUNK 262144 /* bytes that a thread takes at a time */

typedef struct {
    const char *bytes;
    size_t size;
    long shares;
    atomic_long joined;
    atomic_ulong sum;
    Phase phases[MAX_SHARES];
} Read;

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define WIDE __attribute__((target("avx512f,avx512vnni,avx512bf16")))

static int is_wide(void) { return __builtin_cpu_supports("avx512f"); }

WIDE static uint64_t sum_wide(const char *bytes, size_t size) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (; size >= 256; size -= 256, bytes += 256) {
        a = _mm512_xor_si512(a, _mm512_loadu_si512(bytes));
        b = _mm512_xor_si512(b, _mm512_loadu_si512(bytes + 64));
        c = _mm512_xor_si512(c, _mm512_loadu_si512(bytes + 128));
        d = _mm512_xor_si512(d, _mm512_loadu_si512(bytes + 192));
    }
    return (uint64_t)_mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d)));
}
#else
static int is_wide(void) { return 0; }
static uint64_t sum_wide(const char *bytes, size_t size) { return (void)bytes, (uint64_t)size; }
#endif

static uint64_t sum_plain(const char *bytes, size_t size) {
    uint64_t sum = 0;
    for (size_t i = 0; i + 8 <= size; i += 8)
        sum ^= *(const uint64_t *)(bytes + i);
    return sum;
}

static void read_share(void *arg) {
    Read *read = arg;
    uint64_t sum = 0;
    long own = atomic_fetch_add(&read->joined, 1), chunks = (long)((read->size + CHUNK - 1) / CHUNK);
    for (long i = 0; i < read->shares; i++) {
        long index = (own + i) % read->shares, begin = chunks * index / read->shares;
        long count = chunks * (index + 1) / read->shares - begin;
        for (long item; (item = take(&read->phases[index], count)) < count;) {
            size_t at = (size_t)(begin + item) * CHUNK, size = read->size - at < CHUNK ? read->size - at : CHUNK;
            sum ^= (is_wide() ? sum_wide : sum_plain)(read->bytes + at, size);
        }
    }
    atomic_fetch_xor(&read->sum, sum);
}

uint64_t read_bytes(const void *bytes, size_t size, int threads) {
    Read read = {.bytes = bytes, .size = size, .shares = threads < MAX_SHARES ? threads : MAX_SHARES};
    run_parallel(read_share, &read, threads);
    return atomic_load(&read.sum);
}

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define REPEATS 20000 /* of 24 instructions */

typedef struct {
    int kind;
    double seconds;
    atomic_long rounds;
} Products;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* 24 sums in registers, each the sum of the instruction before it in the same register. */
#define ALL(I) I(0) I(1) I(2) I(3) I(4) I(5) I(6) I(7) I(8) I(9) I(10) I(11) I(12) I(13) I(14) I(15) I(16) I(17) I(18) I(19) I(20) I(21) I(22) I(23)
#define CLEAR(n) "vpxorq %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n"
#define FLOATS(n) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #n "\n"
#define PAIRS(n) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" #n "\n"
#define QUADS(n) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #n "\n"
#define USED                                                                                                                         \
    "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14",      \
        "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm30", "zmm31", "cc"
#define RUN(INSTRUCTION)                                                                                                             \
    __asm__ volatile(ALL(CLEAR) CLEAR(30) CLEAR(31) "1:\n" ALL(INSTRUCTION) "dec %0\n jnz 1b\n" : "+r"(count) : : USED)

WIDE static void multiply(void *arg) {
    Products *work = arg;
    double stop = now() + work->seconds;
    do {
        long count = REPEATS;
        if (work->kind == 0)
            RUN(FLOATS);
        else if (work->kind == 1)
            RUN(PAIRS);
        else
            RUN(QUADS);
        atomic_fetch_add(&work->rounds, 1);
    } while (now() < stop);
}

double ceiling(int kind, int threads, double seconds) {
    static const int products[3] = {16, 32, 64};
    if (!__builtin_cpu_supports("avx512f") || (kind == 1 && !__builtin_cpu_supports("avx512bf16")) ||
        (kind == 2 && !__builtin_cpu_supports("avx512vnni")))
        return 0;
    Products work = {.kind = kind, .seconds = seconds};
    double start = now();
    run_parallel(multiply, &work, threads);
    return 2.0 * products[kind] * 24 * REPEATS * (double)atomic_load(&work.rounds) / (now() - start);
}
#else
double ceiling(int kind, int threads, double seconds) { return (void)kind, (void)threads, (void)seconds, 0; }
#endif
