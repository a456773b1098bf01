#define _GNU_SOURCE
#include "levels.h"
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
#define NARROW __attribute__((target("avx2,fma")))

static int level(void) {
    if (__builtin_cpu_supports("avx512f"))
        return LEVEL_AVX512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? LEVEL_AVX2 : LEVEL_PLAIN;
}

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

NARROW static uint64_t sum_narrow(const char *bytes, size_t size) {
    __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (; size >= 128; size -= 128, bytes += 128)
        for (int i = 0; i < 4; i++)
            sums[i] = _mm256_xor_si256(sums[i], _mm256_loadu_si256((const __m256i *)(bytes + 32 * i)));
    __m256i all = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
    return (uint64_t)(_mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 1) ^ _mm256_extract_epi64(all, 2) ^
                      _mm256_extract_epi64(all, 3));
}
#else
static int level(void) { return LEVEL_PLAIN; }
static uint64_t sum_wide(const char *bytes, size_t size) { return (void)bytes, (uint64_t)size; }
static uint64_t sum_narrow(const char *bytes, size_t size) { return (void)bytes, (uint64_t)size; }
#endif

static uint64_t sum_plain(const char *bytes, size_t size) {
    uint64_t sum = 0;
    for (size_t i = 0; i + 8 <= size; i += 8)
        sum ^= *(const uint64_t *)(bytes + i);
    return sum;
}

static void read_share(void *arg) {
    Read *read = arg;
    int best = level();
    uint64_t sum = 0, (*sum_of)(const char *, size_t) = best == LEVEL_AVX512 ? sum_wide : best == LEVEL_AVX2 ? sum_narrow : sum_plain;
    long own = atomic_fetch_add(&read->joined, 1), chunks = (long)((read->size + CHUNK - 1) / CHUNK);
    for (long i = 0; i < read->shares; i++) {
        long index = (own + i) % read->shares, begin = chunks * index / read->shares;
        long count = chunks * (index + 1) / read->shares - begin;
        for (long item; (item = take(&read->phases[index], count)) < count;) {
            size_t at = (size_t)(begin + item) * CHUNK, size = read->size - at < CHUNK ? read->size - at : CHUNK;
            sum ^= sum_of(read->bytes + at, size);
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
    int kind, is_wide;
    double seconds;
    atomic_long rounds;
} Products;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Sums in registers, each the sum of the instruction before it in the same register: 24 with AVX-512, 12 with AVX2. */
#define TWELVE(I) I(0) I(1) I(2) I(3) I(4) I(5) I(6) I(7) I(8) I(9) I(10) I(11)
#define ALL(I) TWELVE(I) I(12) I(13) I(14) I(15) I(16) I(17) I(18) I(19) I(20) I(21) I(22) I(23)
#define CLEAR(n) "vpxorq %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n"
#define FLOATS(n) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #n "\n"
#define PAIRS(n) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" #n "\n"
#define QUADS(n) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #n "\n"
#define USED                                                                                                                         \
    "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14",      \
        "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm30", "zmm31", "cc"
#define RUN(INSTRUCTION)                                                                                                             \
    __asm__ volatile(ALL(CLEAR) CLEAR(30) CLEAR(31) "1:\n" ALL(INSTRUCTION) "dec %0\n jnz 1b\n" : "+r"(count) : : USED)

/* With AVX2, a product of bytes is three instructions: products of pairs, sums of pairs, and the sum. */
#define CLEAR_2(n) "vpxor %%ymm" #n ", %%ymm" #n ", %%ymm" #n "\n"
#define FLOATS_2(n) "vfmadd231ps %%ymm12, %%ymm13, %%ymm" #n "\n"
#define QUADS_2(n) "vpmaddubsw %%ymm12, %%ymm13, %%ymm14\n vpmaddwd %%ymm13, %%ymm14, %%ymm14\n vpaddd %%ymm14, %%ymm" #n ", %%ymm" #n "\n"
#define USED_2                                                                                                                       \
    "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", "ymm14", "cc"
#define RUN_2(INSTRUCTION)                                                                                                           \
    __asm__ volatile(TWELVE(CLEAR_2) CLEAR_2(12) CLEAR_2(13) "1:\n" TWELVE(INSTRUCTION) TWELVE(INSTRUCTION) "dec %0\n jnz 1b\n"      \
                     : "+r"(count) : : USED_2)

WIDE static void repeat_wide(int kind, long count) {
    if (kind == 0)
        RUN(FLOATS);
    else if (kind == 1)
        RUN(PAIRS);
    else
        RUN(QUADS);
}

NARROW static void repeat_narrow(int kind, long count) {
    if (kind == 0)
        RUN_2(FLOATS_2);
    else
        RUN_2(QUADS_2);
}

static void multiply(void *arg) {
    Products *work = arg;
    double stop = now() + work->seconds;
    do {
        (work->is_wide ? repeat_wide : repeat_narrow)(work->kind, REPEATS);
        atomic_fetch_add(&work->rounds, 1);
    } while (now() < stop);
}

double ceiling(int kind, int threads, double seconds) {
    static const int products[3] = {16, 32, 64};
    int has_wide = kind == 0   ? level() == LEVEL_AVX512
                   : kind == 1 ? __builtin_cpu_supports("avx512bf16")
                               : __builtin_cpu_supports("avx512vnni");
    if (!has_wide && (kind == 1 || level() == LEVEL_PLAIN))
        return 0;
    Products work = {.kind = kind, .is_wide = has_wide, .seconds = seconds};
    double start = now();
    run_parallel(multiply, &work, threads);
    return 2.0 * products[kind] / (has_wide ? 1 : 2) * 24 * REPEATS * (double)atomic_load(&work.rounds) / (now() - start);
}
#else
double ceiling(int kind, int threads, double seconds) { return (void)kind, (void)threads, (void)seconds, 0; }
#endif
