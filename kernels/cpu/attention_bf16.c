/* bfloat16 attention of single tokens over paged keys and values: scores by AVX-512 BF16's dot products, the rest in float32.
 *
 * A part is a softmax over at most 512 keys, computed in the order of its keys: dot products by one tree for every key, weights by
 * lanes of 16, values one after another. Parts merge in their order. So what a token gets depends on the keys that it sees and
 * on their order alone, not on its batch, nor on where the keys lie, nor on whether it is a draft.
 */
#include "attention_bf16.h"
#include "threads.h"
#include "vectors.h"

#if defined(PITLANE_VECTORS)
#define MOST_KEYS 512
#define MOST_GROUP 16 /* query heads of a KV head that are scored at a time */
#define SUMS 16       /* registers of weighted values at a time */
#define AHEAD 128     /* keys from a key's use to its prefetch */

/* Sums of 16 vectors, vector i's in lane i; every one by the same tree. */
TARGET INLINE __m512 sums_of(__m512 *a) {
    UNROLLED for (int i = 0; i < 8; i++) /* a[i] holds vectors 2i and 2i + 1 */
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    UNROLLED for (int i = 0; i < 4; i++) { /* four vectors, one in each lane of each 128 bits */
        __m512d low = _mm512_castps_pd(a[2 * i]), high = _mm512_castps_pd(a[2 * i + 1]);
        a[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
    UNROLLED for (int i = 0; i < 2; i++) /* quarters 0 + 1 and 2 + 3 of both */
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88), _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x88), _mm512_shuffle_f32x4(a[0], a[1], 0xdd));
}

/* The keys and values of one task and KV head. */
typedef struct {
    const uint16_t *keys, *values;
    const int32_t *slots;
    long num_keys;
} Piece;

INLINE Piece piece_of(const Attention *job, long item) {
    const int64_t *task = job->tasks + item / job->kv_heads * 4;
    long head = item % job->kv_heads * job->head_stride;
    return (Piece){job->keys + head, job->values + head, job->slots + task[0], task[1]};
}

/* Prefetch 16 keys and values from `at` on into the second cache. */
TARGET INLINE void fetch(const Piece *piece, long at, const int dim) {
    for (long stop = at + LANES < piece->num_keys ? at + LANES : piece->num_keys; at < stop; at++)
        UNROLLED for (int d = 0; d < dim; d += 32) {
            _mm_prefetch((const char *)(piece->keys + (long)piece->slots[at] * dim + d), _MM_HINT_T1);
            _mm_prefetch((const char *)(piece->values + (long)piece->slots[at] * dim + d), _MM_HINT_T1);
        }
}

/* Scores [group][MOST_KEYS] of a token's query heads over keys, -inf up to a whole number of lanes. Prefetches this and the next piece. */
TARGET INLINE void score(const uint16_t *q, long group, const Piece *piece, const Piece *next, const int dim, float scale,
                         float *scores) {
    const uint16_t *keys = piece->keys;
    const int32_t *slots = piece->slots;
    long num_keys = piece->num_keys;
    for (long at = 0; at < num_keys; at += LANES) {
        fetch(next, at, dim);
        fetch(piece, at + AHEAD, dim);
        const uint16_t *key[LANES];
        for (long i = 0; i < LANES; i++)
            key[i] = keys + (long)slots[at + i < num_keys ? at + i : num_keys - 1] * dim;
        __mmask16 here = num_keys - at < LANES ? (__mmask16)((1u << (num_keys - at)) - 1) : (__mmask16)0xffff;
        for (long g = 0; g < group; g++) {
            __m512 sums[LANES];
            UNROLLED for (int i = 0; i < LANES; i++)
                sums[i] = _mm512_setzero_ps();
            UNROLLED for (int d = 0; d < dim; d += 32) {
                __m512bh part = (__m512bh)_mm512_loadu_si512(q + g * dim + d);
                UNROLLED for (int i = 0; i < LANES; i++)
                    sums[i] = _mm512_dpbf16_ps(sums[i], part, (__m512bh)_mm512_loadu_si512(key[i] + d));
            }
            __m512 found = _mm512_mul_ps(sums_of(sums), _mm512_set1_ps(scale));
            _mm512_storeu_ps(scores + g * MOST_KEYS + at, _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), here, found));
        }
    }
}

/* Turn scores into exp(score - largest); their sum, and the largest. */
TARGET INLINE void weigh(float *scores, long num_keys, float *total, float *largest) {
    __m512 most = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
    for (long at = 0; at < num_keys; at += LANES)
        most = _mm512_max_ps(most, _mm512_loadu_ps(scores + at));
    *largest = _mm512_reduce_max_ps(most);
    for (long at = 0; at < num_keys; at += LANES) {
        __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + at), _mm512_set1_ps(*largest)));
        sum = _mm512_add_ps(sum, weight);
        _mm512_storeu_ps(scores + at, weight);
    }
    *total = _mm512_reduce_add_ps(sum);
}

/* sums [count][dim] of values by weights [count][MOST_KEYS], for `count` heads; key after key. */
TARGET INLINE void add_values(const float *weights, const Piece *piece, const int dim, const int count, float *sums, long stride) {
    __m512 sum[SUMS];
    UNROLLED for (int i = 0; i < count * dim / LANES; i++)
        sum[i] = _mm512_setzero_ps();
    for (long k = 0; k < piece->num_keys; k++) {
        const uint16_t *value = piece->values + (long)piece->slots[k] * dim;
        UNROLLED for (int d = 0; d < dim / LANES; d++) {
            __m512 part = widened(value + d * LANES);
            UNROLLED for (int g = 0; g < count; g++)
                sum[g * dim / LANES + d] =
                    _mm512_fmadd_ps(part, _mm512_set1_ps(weights[g * MOST_KEYS + k]), sum[g * dim / LANES + d]);
        }
    }
    UNROLLED for (int g = 0; g < count; g++)
        UNROLLED for (int d = 0; d < dim / LANES; d++)
            _mm512_storeu_ps(sums + g * stride + d * LANES, sum[g * dim / LANES + d]);
}

/* One part of one token and one KV head. */
TARGET INLINE void one_part(const Attention *job, const Piece *piece, const Piece *next, const int64_t *member, long kv_head,
                            const int dim) {
    long group = job->heads / job->kv_heads, first_head = kv_head * group, stride = dim + 2;
    const uint16_t *q = job->q + member[0] * job->q_stride;
    const int together = SUMS * LANES / dim;
    float scores[MOST_GROUP * MOST_KEYS];
    for (long begin = 0; begin < group; begin += MOST_GROUP) {
        long count = group - begin < MOST_GROUP ? group - begin : MOST_GROUP;
        float *sums = job->partial + (member[1] * job->heads + first_head + begin) * stride;
        score(q + (first_head + begin) * dim, count, piece, next, dim, job->scale, scores);
        for (long g = 0; g < count; g++)
            weigh(scores + g * MOST_KEYS, piece->num_keys, sums + g * stride + dim, sums + g * stride + dim + 1);
        long g = 0;
        for (; g + together <= count; g += together)
            add_values(scores + g * MOST_KEYS, piece, dim, together, sums + g * stride, stride);
        for (; g < count; g++)
            add_values(scores + g * MOST_KEYS, piece, dim, 1, sums + g * stride, stride);
    }
}

/* A token's output from its parts. */
TARGET INLINE void merge(const Attention *job, const int64_t *row, const int dim) {
    long stride = dim + 2, next = job->heads * stride;
    for (long head = 0; head < job->heads; head++) {
        const float *part = job->partial + (row[1] * job->heads + head) * stride;
        float most = part[dim + 1], total = 0;
        for (long i = 1; i < row[2]; i++)
            most = part[i * next + dim + 1] > most ? part[i * next + dim + 1] : most;
        __m512 sum[SUMS];
        UNROLLED for (int d = 0; d < dim / LANES; d++)
            sum[d] = _mm512_setzero_ps();
        for (long i = 0; i < row[2]; i++) {
            float weight = _mm512_cvtss_f32(exponential(_mm512_set1_ps(part[i * next + dim + 1] - most)));
            total += weight * part[i * next + dim];
            UNROLLED for (int d = 0; d < dim / LANES; d++)
                sum[d] = _mm512_fmadd_ps(_mm512_loadu_ps(part + i * next + d * LANES), _mm512_set1_ps(weight), sum[d]);
        }
        uint16_t *out = job->out + (row[0] * job->heads + head) * dim;
        UNROLLED for (int d = 0; d < dim / LANES; d++)
            _mm256_storeu_si256((__m256i *)(out + d * LANES),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_div_ps(sum[d], _mm512_set1_ps(total))));
    }
}

typedef struct {
    const Attention *job;
    atomic_long next_part, next_row;
    atomic_int arrived;
} Shared;

TARGET INLINE void work(Shared *shared, Worker worker, const int dim) {
    const Attention *job = shared->job;
    long items = job->num_tasks * job->kv_heads;
    for (long item = atomic_fetch_add(&shared->next_part, 1); item < items; item = atomic_fetch_add(&shared->next_part, 1)) {
        const int64_t *task = job->tasks + item / job->kv_heads * 4;
        Piece piece = piece_of(job, item), next = piece_of(job, item + worker.count < items ? item + worker.count : item);
        for (long i = 0; i < task[3]; i++)
            one_part(job, &piece, &next, job->members + (task[2] + i) * 2, item % job->kv_heads, dim);
    }
    wait_for_all(&shared->arrived, worker.count);
    for (long row = atomic_fetch_add(&shared->next_row, 1); row < job->num_rows; row = atomic_fetch_add(&shared->next_row, 1))
        merge(job, job->rows + row * 3, dim);
}

#define DEFINE_WORK(DIM)                                                                                                             \
    TARGET static void work_##DIM(void *shared, Worker worker) { work(shared, worker, DIM); }
DEFINE_WORK(32)
DEFINE_WORK(64)
DEFINE_WORK(96)
DEFINE_WORK(128)
DEFINE_WORK(256)

typedef void (*Work)(void *, Worker);

static Work work_for(int64_t dim) {
    switch (dim) {
    case 32: return work_32;
    case 64: return work_64;
    case 96: return work_96;
    case 128: return work_128;
    case 256: return work_256;
    default: return 0;
    }
}

int has_attention_bf16(int64_t dim) {
    return work_for(dim) && has_vectors();
}

void attention_bf16(const Attention *job, int threads) {
    Shared shared = {.job = job};
    run_parallel(work_for(job->dim), &shared, threads);
}

#else

int has_attention_bf16(int64_t dim) {
    (void)dim;
    return 0;
}

void attention_bf16(const Attention *job, int threads) { (void)job, (void)threads; }

#endif
