/* Small operations on rows of bfloat16, each read and written once. A row's result does not depend on the others. */
#include "ops_bf16.h"
#include "threads.h"
#include "vectors.h"

#if defined(PITLANE_VECTORS)
#define WORTH_THREADS 32768 /* elements, below which waking a thread costs more than it brings */

typedef struct {
    const uint16_t *x, *w;
    uint16_t *y;
    int64_t rows, dim;
    float eps;
} Job;

TARGET INLINE __mmask16 left_of(int64_t dim, int64_t at) {
    return dim - at < LANES ? (__mmask16)((1u << (dim - at)) - 1) : (__mmask16)0xffff;
}

TARGET INLINE __m512 load(const uint16_t *x, __mmask16 mask) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16);
}

TARGET INLINE void store(uint16_t *y, __mmask16 mask, __m512 value) {
    _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

TARGET static void norm_rows(void *arg, Worker worker) {
    const Job *job = arg;
    int64_t dim = job->dim, end = job->rows * (worker.index + 1) / worker.count;
    for (int64_t row = job->rows * worker.index / worker.count; row < end; row++) {
        const uint16_t *x = job->x + row * dim;
        __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t at = 0; at < dim; at += LANES) {
            __m512 value = load(x + at, left_of(dim, at));
            sums[at / LANES % 4] = _mm512_fmadd_ps(value, value, sums[at / LANES % 4]);
        }
        float total = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
        __m512 mean = _mm512_set1_ps(total / (float)dim + job->eps);
        __m512 scale = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(mean));
        for (int64_t at = 0; at < dim; at += LANES) {
            __mmask16 mask = left_of(dim, at);
            __m512 value = _mm512_mul_ps(_mm512_mul_ps(load(x + at, mask), scale), load(job->w + at, mask));
            store(job->y + row * dim + at, mask, value);
        }
    }
}

TARGET static void silu_rows(void *arg, Worker worker) {
    const Job *job = arg;
    int64_t dim = job->dim, end = job->rows * (worker.index + 1) / worker.count;
    __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
    for (int64_t row = job->rows * worker.index / worker.count; row < end; row++)
        for (int64_t at = 0; at < dim; at += LANES) {
            __mmask16 mask = left_of(dim, at);
            __m512 gate = load(job->x + 2 * row * dim + at, mask), up = load(job->x + (2 * row + 1) * dim + at, mask);
            __m512 small = exponential(_mm512_sub_ps(zero, _mm512_abs_ps(gate))); /* its inverse may overflow */
            __m512 top = _mm512_mask_mov_ps(one, _mm512_cmp_ps_mask(gate, zero, _CMP_LT_OQ), small);
            __m512 sigmoid = _mm512_div_ps(top, _mm512_add_ps(one, small));
            store(job->y + row * dim + at, mask, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid), up));
        }
}

int has_ops_bf16(void) { return has_vectors(); }

void rms_norm_bf16(const uint16_t *x, const uint16_t *w, uint16_t *y, int64_t rows, int64_t dim, float eps, int threads) {
    Job job = {x, w, y, rows, dim, eps};
    run_parallel(norm_rows, &job, rows * dim < WORTH_THREADS ? 1 : threads);
}

void silu_mul_bf16(const uint16_t *x, uint16_t *y, int64_t rows, int64_t dim, int threads) {
    Job job = {x, 0, y, rows, dim, 0};
    run_parallel(silu_rows, &job, rows * dim < WORTH_THREADS ? 1 : threads);
}

#else

int has_ops_bf16(void) { return 0; }

void rms_norm_bf16(const uint16_t *x, const uint16_t *w, uint16_t *y, int64_t rows, int64_t dim, float eps, int threads) {
    (void)x, (void)w, (void)y, (void)rows, (void)dim, (void)eps, (void)threads;
}

void silu_mul_bf16(const uint16_t *x, uint16_t *y, int64_t rows, int64_t dim, int threads) {
    (void)x, (void)y, (void)rows, (void)dim, (void)threads;
}

#endif
