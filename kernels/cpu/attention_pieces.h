/* bfloat16 attention over paged keys and values: scores, weights, and weighted sums of values, with float32 sums.
 *
 * A piece is up to 512 keys; the index of its first key is a multiple of 512. A part is the softmax of one token over the keys of a
 * piece that it sees. A row is a query head of a token. The keys of a piece are transposed into pairs once, for all of its rows.
 * Then ROWS rows are scored at a time. A score is one chain of sums over ascending pairs of dimensions, weights are summed in lanes,
 * values are summed in the order of their keys, and parts merge in order. So a token's result depends only on the keys that it sees
 * and their order: not on its batch, not on the keys' slots, and not on whether it is decoded, drafted or in a long prompt.
 */
#ifndef PITLANE_ATTENTION_PIECES_H
#define PITLANE_ATTENTION_PIECES_H

#include "attention_decoded.h"
#include "attention_rows.h"

/* Buffers of a thread. keys: per 32 keys [dim / 2 pairs][32]. q: [dim / 2 pairs][WORDS][rows]. scores: [rows][keys]. decoded_keys: KEYS
 * keys of a quantized piece. values: its values. order: their slots, 0, 1, 2, ... */
typedef struct {
    uint32_t keys[MAX_KEYS * MAX_DIM / 2], q[WORDS * ROWS * MAX_DIM / 2];
    float scores[ROWS * MAX_KEYS];
    uint16_t decoded_keys[KEYS * MAX_DIM], values[MAX_KEYS * MAX_DIM];
    int32_t order[MAX_KEYS];
} __attribute__((aligned(LINE))) Scratch;

INLINE Piece piece_of(const Attention *job, long item) {
    const int64_t *task = job->tasks + item / job->kv_heads * 4;
    long head = item % job->kv_heads * job->head_stride;
    return (Piece){job->keys + head, job->values + head, job->slots + task[0], task[1]};
}

INLINE Slots slots_of(const Attention *job, long item) {
    const int64_t *task = job->tasks + item / job->kv_heads * 4;
    return (Slots){item % job->kv_heads, job->slots + task[0], task[1]};
}

/* Prefetch `count` keys and values, from key `at` on, into the second cache. */
TARGET INLINE void fetch(const Piece *piece, long at, long count, long dim) {
    for (long stop = minimum(at + count, piece->num_keys); at < stop; at++)
        for (long d = 0; d < dim; d += 32) {
            _mm_prefetch((const char *)(piece->keys + (long)piece->slots[at] * dim + d), _MM_HINT_T1);
            _mm_prefetch((const char *)(piece->values + (long)piece->slots[at] * dim + d), _MM_HINT_T1);
        }
}

/* Transpose the keys [low, high) of a piece into pairs, and prefetch this piece and the next. low is a multiple of KEYS. next: NULL
 * for a decoded piece, which lies in the cache. */
TARGET static void turn_keys(const Piece *piece, const Piece *next, long low, long high, long dim, uint32_t *target) {
    for (long at = low; at < high; at += LANES) {
        if (next) {
            fetch(next, at, LANES, dim);
            fetch(piece, at + AHEAD, LANES, dim);
        }
        for (long d = 0; d < dim; d += 2 * LANES) {
            Words key[LANES];
            UNROLLED for (int i = 0; i < LANES; i++)
                key[i] = load_words(piece->keys + (long)piece->slots[minimum(at + i, piece->num_keys - 1)] * dim + d);
            put_transposed(key, target + at / KEYS * (KEYS * dim / 2) + d / 2 * KEYS + at % KEYS, KEYS);
        }
    }
}

/* Decode the keys and values [low, high) of a quantized piece, and transpose the keys into pairs. Works on KEYS keys at a time, so
 * that decoded keys stay in the first cache. low is a multiple of KEYS. Returns the piece that holds the decoded values. */
TARGET static Piece decoded_piece(const Attention *job, long item, long following, long low, long high, Scratch *scratch) {
    Slots slots = slots_of(job, item), next = slots_of(job, following);
    long dim = job->dim;
    high = minimum((high + LANES - 1) / LANES * LANES, slots.num_keys);
    for (long i = 0; i < slots.num_keys; i++)
        scratch->order[i] = (int32_t)i;
    for (long at = low; at < high; at += KEYS) {
        long count = minimum(KEYS, high - at);
        decode_keys_values(job->quantized, &slots, following == item ? NULL : &next, at, at + count, dim, scratch->decoded_keys,
                           scratch->values + at * dim);
        Piece keys = {scratch->decoded_keys, NULL, scratch->order, count};
        turn_keys(&keys, NULL, 0, count, dim, scratch->keys + at * dim / 2);
    }
    return (Piece){NULL, scratch->values, scratch->order, slots.num_keys};
}

/* Write a pair of a query as `scores_added` reads it. */
INLINE void put_pair(uint32_t *q, long rows, uint32_t pair) {
    q[0] = WORDS == 1 ? pair : pair & 0xffff0000;
    if (WORDS == 2)
        q[rows] = pair << 16;
}

/* Compute the parts of up to ROWS rows of a piece. */
TARGET static void compute_rows(const Piece *piece, const Row *rows, long count, long dim, float scale, Scratch *scratch) {
    long low = piece->num_keys, high = 0, pairs = dim / 2;
    for (long r = 0; r < count; r++) {
        low = minimum(low, rows[r].low / KEYS * KEYS);
        high = maximum(high, rows[r].high);
        for (long p = 0; p < pairs; p++)
            put_pair(scratch->q + WORDS * p * count + r, count, rows[r].q[p]);
    }
    for (long at = low; at < high; at += KEYS)
        score[count](scratch->q, scratch->keys + at * pairs, pairs, scratch->scores + at, scale);
    for (long r = 0; r < count; r++)
        weigh(scratch->scores + r * MAX_KEYS, rows + r, low, high, dim);
    for (long r = 0; r < count; r += SUMMED)
        sum_values(scratch->scores + r * MAX_KEYS, piece, low, high, dim, rows + r, minimum(SUMMED, count - r));
}

TARGET static void attention_item(const Attention *job, long item, long following) {
    _Static_assert(sizeof(Scratch) <= ATTENTION_BUFFER, "the buffer of a thread is too small");
    Scratch *scratch = attention_buffer();
    const int64_t *task = job->tasks + item / job->kv_heads * 4, *members = job->members + task[2] * 4;
    long dim = job->dim, group = job->heads / job->kv_heads, first_head = item % job->kv_heads * group;
    long low = task[1], high = 0, num_rows = task[3] * group;
    for (long i = 0; i < task[3]; i++) {
        low = minimum(low, members[i * 4 + 2]);
        high = maximum(high, members[i * 4 + 3]);
    }
    Piece piece;
    if (job->quantized) {
        piece = decoded_piece(job, item, following, low / KEYS * KEYS, high, scratch);
    } else {
        Piece next = piece_of(job, following);
        piece = piece_of(job, item);
        turn_keys(&piece, &next, low / KEYS * KEYS, high, dim, scratch->keys);
    }
    for (long begin = 0; begin < num_rows; begin += ROWS) {
        Row rows[ROWS];
        long count = minimum(ROWS, num_rows - begin);
        for (long r = 0; r < count; r++) {
            const int64_t *member = members + (begin + r) / group * 4;
            long head = first_head + (begin + r) % group;
            rows[r].q = (const uint32_t *)(job->q + member[0] * job->q_stride + head * dim);
            rows[r].sums = job->partial + (member[1] * job->heads + head) * (dim + 2);
            rows[r].low = member[2];
            rows[r].high = member[3];
        }
        compute_rows(&piece, rows, count, dim, job->scale, scratch);
    }
}

TARGET static void attention_merge(const Attention *job, long index) {
    const int64_t *row = job->rows + index * 3;
    long dim = job->dim, stride = dim + 2, next = job->heads * stride;
    for (long head = 0; head < job->heads; head++) {
        const float *part = job->partial + (row[1] * job->heads + head) * stride;
        float top = part[dim + 1], total = 0;
        for (long i = 1; i < row[2]; i++)
            top = part[i * next + dim + 1] > top ? part[i * next + dim + 1] : top;
        Floats sum[MAX_DIM / LANES];
        for (long d = 0; d < dim / LANES; d++)
            sum[d] = zeros();
        for (long i = 0; i < row[2]; i++) {
            float weight = lane_0(exponential(all(part[i * next + dim + 1] - top)));
            total += weight * part[i * next + dim];
            for (long d = 0; d < dim / LANES; d++)
                sum[d] = multiply_add(load(part + i * next + d * LANES), all(weight), sum[d]);
        }
        uint16_t *out = job->out + (row[0] * job->heads + head) * dim;
        for (long d = 0; d < dim / LANES; d++)
            put_bf16(out + d * LANES, divide(sum[d], all(total)));
    }
}

#endif
