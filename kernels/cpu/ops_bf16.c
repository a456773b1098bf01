/* Operations on rows, which read and write memory once, and write bfloat16. A row's result does not depend on the other rows. */
#include "ops_bf16.h"
#include "threads.h"
#include "vectors.h"

#if defined(PITLANE_VECTORS)
#define ITEM 16384 /* elements that a thread takes at a time; computing fewer takes less time than waking a thread */

typedef struct Job {
    void (*operation)(const struct Job *, int64_t row, int64_t end);
    const void *x;
    const uint16_t *w;
    uint16_t *y;
    int64_t rows, dim;
    float eps;
    int wide; /* x is float32 */
    int64_t height; /* rows that a thread takes at a time */
    Phase phase;
} Job;

TARGET INLINE __mmask16 left_of(int64_t dim, int64_t at) {
    return dim - at < LANES ? (__mmask16)((1u << (dim - at)) - 1) : (__mmask16)0xffff;
}

TARGET INLINE __m512 load(const uint16_t *x, __mmask16 mask) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16);
}

TARGET INLINE __m512 load_of(const void *x, int64_t at, __mmask16 mask, int wide) {
    return wide ? _mm512_maskz_loadu_ps(mask, (const float *)x + at) : load((const uint16_t *)x + at, mask);
}

TARGET INLINE void store(uint16_t *y, __mmask16 mask, __m512 value) {
    _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

TARGET INLINE void norm_row(const void *x, const uint16_t *w, uint16_t *y, int64_t dim, float eps, int wide) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t at = 0; at < dim; at += LANES) {
        __m512 value = load_of(x, at, left_of(dim, at), wide);
        sums[at / LANES % 4] = _mm512_fmadd_ps(value, value, sums[at / LANES % 4]);
    }
    float total = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
    __m512 mean = _mm512_set1_ps(total / (float)dim + eps);
    __m512 scale = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(mean));
    for (int64_t at = 0; at < dim; at += LANES) {
        __mmask16 mask = left_of(dim, at);
        store(y + at, mask, _mm512_mul_ps(_mm512_mul_ps(load_of(x, at, mask, wide), scale), load(w + at, mask)));
    }
}

TARGET void rms_norm_row(const void *x, const uint16_t *w, uint16_t *y, int64_t dim, float eps, int wide) {
    if (wide)
        norm_row(x, w, y, dim, eps, 1);
    else
        norm_row(x, w, y, dim, eps, 0);
}

TARGET void silu_mul_row(const uint16_t *gates, const uint16_t *ups, uint16_t *y, int64_t dim) {
    __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
    for (int64_t at = 0; at < dim; at += LANES) {
        __mmask16 mask = left_of(dim, at);
        __m512 gate = load(gates + at, mask), up = load(ups + at, mask);
        __m512 small = exponential(_mm512_sub_ps(zero, _mm512_abs_ps(gate))); /* exp(-|gate|): exp(|gate|) may overflow */
        __m512 top = _mm512_mask_mov_ps(one, _mm512_cmp_ps_mask(gate, zero, _CMP_LT_OQ), small);
        __m512 sigmoid = _mm512_div_ps(top, _mm512_add_ps(one, small));
        store(y + at, mask, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid), up));
    }
}

static void norm_rows(const Job *job, int64_t row, int64_t end) {
    for (; row < end; row++)
        rms_norm_row((const char *)job->x + row * job->dim * (job->wide ? 4 : 2), job->w, job->y + row * job->dim, job->dim, job->eps,
                     job->wide);
}

static void silu_rows(const Job *job, int64_t row, int64_t end) {
    for (; row < end; row++) {
        const uint16_t *gates = (const uint16_t *)job->x + 2 * row * job->dim;
        silu_mul_row(gates, gates + job->dim, job->y + row * job->dim, job->dim);
    }
}

static void work(void *arg) {
    Job *job = arg;
    long items = (job->rows + job->height - 1) / job->height;
    for (long item; (item = take(&job->phase, items)) < items;) {
        int64_t row = item * job->height, end = row + job->height;
        job->operation(job, row, end < job->rows ? end : job->rows);
    }
}

static void run(Job job, int threads) {
    job.height = ITEM < job.dim ? 1 : ITEM / job.dim;
    run_parallel(work, &job, job.rows < 2 * job.height ? 1 : threads);
}

int has_ops_bf16(void) { return has_vectors(); }

void rms_norm_bf16(const void *x, const uint16_t *w, uint16_t *y, int64_t rows, int64_t dim, float eps, int threads, int wide) {
    run((Job){.operation = norm_rows, .x = x, .w = w, .y = y, .rows = rows, .dim = dim, .eps = eps, .wide = wide}, threads);
}

void silu_mul_bf16(const uint16_t *x, uint16_t *y, int64_t rows, int64_t dim, int threads) {
    run((Job){.operation = silu_rows, .x = x, .y = y, .rows = rows, .dim = dim}, threads);
}

#else

int has_ops_bf16(void) { return 0; }

void rms_norm_bf16(const void *x, const uint16_t *w, uint16_t *y, int64_t rows, int64_t dim, float eps, int threads, int wide) {
    (void)x, (void)w, (void)y, (void)rows, (void)dim, (void)eps, (void)threads, (void)wide;
}

void silu_mul_bf16(const uint16_t *x, uint16_t *y, int64_t rows, int64_t dim, int threads) {
    (void)x, (void)y, (void)rows, (void)dim, (void)threads;
}

#endif
