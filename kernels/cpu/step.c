/* Runs the program of a step: see step.h. Every thread walks through all operations, as an equal.
 *
 * The chunks of an operation are divided into a share per thread: a contiguous part of the weights. A thread computes the chunks
 * of its own share in order, then takes chunks that other threads have not begun. Then it waits for the chunks that other threads
 * have begun. When they take longer than expected, it computes them too. So a thread that the operating system has suspended stops
 * no other thread. A chunk computed twice has the same bits, and both threads write them to the same place, which belongs to this
 * step alone: a late write changes nothing. The KV of the step's tokens lies in memory that outlives the step. So the step ends
 * only when no helper is writing KV. Every thread computes norms, merged attention and packed inputs for itself, which takes less
 * time than to wait for another thread. */
#include <string.h>

#include "step_parts.h"

#if defined(PITLANE_VECTORS)
#define MAX_CHUNKS 48 /* of a share; `done` has a bit for each chunk */
#ifndef PATIENCE
#define PATIENCE 20000 /* ticks of the clock, about 5 to 10 microseconds, added to twice the time of a chunk */
#endif

/* The work of one thread in one operation. */
typedef struct {
    State *state;
    Seat *seat;
    const Op *op;
    int index, thread;
    long units, size, count; /* `count` chunks of `size` units: panels, heads, pairs of panels, or items of attention */
    Job job; /* with WEIGHTS_INT, only `rows`, `outs` and `y` are used */
    IntLinear ints;
    Attention attention;
    Quantized quantized; /* the KV of `attention`, if it is quantized */
} Task;

static atomic_long recomputed;
long step_recomputed(void) { return atomic_load(&recomputed); }

static uint64_t ticks(void) { return __builtin_ia32_rdtsc(); }

/* ---- a chunk */

/* Compute the outputs of panels [panel, end) of 32 outputs. */
static void multiply(const Task *task, long panel, long end) {
    const Job *job = &task->job;
    if (task->op->weights == WEIGHTS_INT) {
        long ratio = OUTS / INT_PANEL, num_panels = ceil_divide(job->outs, INT_PANEL);
        int_panels(&task->ints, job->y, task->seat->packed, job->rows, panel * ratio, minimum(end * ratio, num_panels));
        return;
    }
    multiply_panels(job, 0, job->rows, panel, end);
}

static const void *result_of(const State *state, int64_t op) { return op < 0 ? (const void *)state->x : state->results[op]; }

/* Rotate the heads [head, end) and write them: queries and second queries to the result, keys and values to their slots. */
static void rotate(const Task *task, long head, long end) {
    const State *state = task->state;
    const Vectors *vectors = state->program->vectors;
    const Op *op = task->op;
    const Shape *shape = &state->program->shape;
    long dim = shape->dim, heads = shape->heads, keys_end = heads + shape->kv_heads, half = state->rows * dim / 2;
    const uint16_t *angles = op->rope < 0 ? NULL : state->angles + op->rope * 2 * half;
    const Reads *reads = state->reads + op->group;
    const uint16_t *second = reads->second && angles ? reads->second + op->rope * 2 * half : reads->second;
    const int64_t *slots = reads->write;
    for (; head < end; head++) {
        const uint16_t *weight = op->qk_norm ? (const uint16_t *)op->qk_norm + head * dim : NULL;
        for (long m = 0; m < state->rows; m++) {
            const uint16_t *x = (const uint16_t *)task->seat->y + m * op->outs + head * dim;
            const uint16_t *cos = angles ? angles + m * dim / 2 : NULL, *sin = angles ? cos + half : NULL;
            long slot = slots[m] * dim;
            if (head >= keys_end) {
                memcpy((uint16_t *)op->values + (head - keys_end) * op->head_stride + slot, x, (size_t)dim * 2);
                continue;
            }
            uint16_t *query = (uint16_t *)state->results[task->index] + (m * heads + head) * dim;
            uint16_t *key = (uint16_t *)op->keys + (head - heads) * op->head_stride + slot;
            vectors->turn_head(x, head < heads ? query : key, dim, weight, state->program->eps, cos, sin);
            if (head < heads && second) {
                cos = angles ? second + m * dim / 2 : NULL, sin = angles ? cos + half : NULL;
                vectors->turn_head(x, query + state->rows * heads * dim, dim, weight, state->program->eps, cos, sin);
            }
        }
    }
}

/* Rotate heads, and keep the step from ending while a helper writes KV. A helper that comes after the end writes nothing. */
static void rotate_guarded(const Task *task, long head, long end) {
    if (task->thread == 0 || end <= task->state->program->shape.heads) {
        rotate(task, head, end);
        return;
    }
    atomic_store(&task->seat->writing, 1);
    if (!atomic_load(&task->state->over))
        rotate(task, head, end);
    atomic_store_explicit(&task->seat->writing, 0, memory_order_release);
}

static void compute(const Task *task, long chunk) {
    const Program *program = task->state->program;
    const Vectors *vectors = program->vectors;
    const Op *op = task->op;
    const Job *job = &task->job;
    long begin = chunk * task->size, end = minimum(begin + task->size, task->units);
    if (op->kind == STEP_ATTENTION) {
        for (long item = begin; item < end; item++)
            vectors->attention_item(&task->attention, item, item + 1 < task->units ? item + 1 : item);
    } else if (op->output == OUTPUT_ROTATED) {
        long panels = program->shape.dim / OUTS;
        multiply(task, begin * panels, end * panels);
        rotate_guarded(task, begin, end);
    } else if (op->output == OUTPUT_SILU) {
        long inner = op->outs / 2;
        multiply(task, begin, end);
        multiply(task, task->units + begin, task->units + end);
        for (long m = 0; m < job->rows; m++) {
            const uint16_t *gates = (const uint16_t *)job->y + m * op->outs + begin * OUTS;
            vectors->silu_mul_row(gates, gates + inner, (uint16_t *)task->state->results[task->index] + m * inner + begin * OUTS,
                                  (end - begin) * OUTS);
        }
    } else {
        multiply(task, begin, end);
        if (op->output == OUTPUT_SUM) {
            float *sum = (float *)task->state->results[task->index];
            vectors->add_columns(result_of(task->state, op->residual), job->y, sum, job->rows, op->outs, begin * OUTS,
                                 minimum(end * OUTS, op->outs));
        }
    }
}

/* ---- an operation */

static Attention attention_of(const State *state, const Op *op, int64_t index) {
    Attention job = state->reads[op->group].job;
    job.q = result_of(state, op->source);
    job.keys = (const uint16_t *)op->keys;
    job.values = (const uint16_t *)op->values;
    job.head_stride = op->head_stride;
    job.partial = (float *)state->results[index];
    return job;
}

static void plan_attention(Task *task) {
    const Op *op = task->op;
    task->attention = attention_of(task->state, op, task->index);
    if (!op->key_rows)
        return;
    task->quantized = (Quantized){(const uint8_t *)op->key_rows, (const uint8_t *)op->value_rows, (const uint16_t *)op->keys,
                                  (const uint16_t *)op->values, op->row_bytes, op->row_stride, op->head_stride, op->first_open,
                                  (int)op->kv_bits};
    task->attention.quantized = &task->quantized;
}

/* Compute the inputs of a linear, in memory of this thread. */
static void prepare(Task *task) {
    const State *state = task->state;
    const Op *op = task->op;
    const Program *program = state->program;
    const Vectors *vectors = program->vectors;
    const void *source = op->input == INPUT_MERGED ? NULL : result_of(state, op->source);
    const uint16_t *x = task->seat->input;
    long rows = op->selects ? state->num_logits : state->rows;
    if (op->input == INPUT_MERGED) {
        Attention job = attention_of(state, program->ops + op->source, op->source);
        job.out = task->seat->input;
        for (long row = 0; row < job.num_rows; row++)
            vectors->attention_merge(&job, row);
    } else if (op->input == INPUT_NORM) {
        for (long m = 0; m < rows; m++)
            vectors->rms_norm_row((const float *)source + (op->selects ? state->logit_rows[m] : m) * op->ins,
                                  (const uint16_t *)op->norm, task->seat->input + m * op->ins, op->ins, program->eps, 1);
    } else {
        x = source;
    }
    void *y = op->output == OUTPUT_ROWS ? state->results[task->index] : task->seat->y;
    task->job = (Job){.vectors = vectors, .x = (const uint32_t *)x, .w = (const char *)op->w, .y = y, .rows = rows};
    task->job.bias = (const uint16_t *)op->bias;
    task->job.outs = op->outs;
    task->job.wide = is_wide(op);
    if (op->weights == WEIGHTS_INT) {
        task->ints = int_linear_of(op, program->unit);
        int_prepare(&task->ints, x, task->seat->packed, rows);
        return;
    }
    task->job.pairs = op->ins / 2;
    task->job.panels = ceil_divide(op->outs, OUTS);
    task->job.parts = 1;
    task->job.block = VECTOR_ROWS;
    task->job.products = (int)op->products;
    task->job.packed = scratch_bytes_bf16(task->job.products, rows, op->ins) ? task->seat->packed : NULL;
    vectors->prepare(&task->job, 0);
}

static long units_of(const State *state, const Op *op) {
    if (op->kind == STEP_ATTENTION)
        return state->reads[op->group].job.num_tasks * state->program->shape.kv_heads;
    if (op->output == OUTPUT_ROTATED)
        return op->outs / state->program->shape.dim;
    return op->output == OUTPUT_SILU ? op->outs / 2 / OUTS : ceil_divide(op->outs, OUTS);
}

/* Units of a chunk. Few rows read two panels of bfloat16 at once, so their chunks have an even size if units are many. */
static long chunk_units(const Task *task) {
    long threads = task->state->threads, size = ceil_divide(task->units, threads * MAX_CHUNKS);
    int reads_two = task->op->kind == STEP_LINEAR && task->op->weights == WEIGHTS_BF16 && task->state->rows <= STREAM_ROWS;
    return reads_two && task->units >= 16 * threads ? size + size % 2 : size;
}

/* The first chunk of the share of a thread. */
static long share_begin(const Task *task, long thread) { return task->count * thread / task->state->threads; }

static unsigned long long missing(const Task *task, const Share *share, long thread) {
    long length = share_begin(task, thread + 1) - share_begin(task, thread);
    return ~atomic_load_explicit(&share->done, memory_order_acquire) & ((1ULL << length) - 1);
}

static int is_complete(const Task *task, const Share *shares) {
    for (long i = 0; i < task->state->threads; i++) {
        long thread = (task->thread + i) % task->state->threads;
        if (missing(task, shares + thread, thread))
            return 0;
    }
    return 1;
}

/* Compute the chunks of a share that nobody has begun. Returns their number. */
static long take_share(const Task *task, Share *share, long thread) {
    long begin = share_begin(task, thread), length = share_begin(task, thread + 1) - begin, count = 0;
    while (atomic_load_explicit(&share->next, memory_order_relaxed) < length) {
        long item = atomic_fetch_add_explicit(&share->next, 1, memory_order_relaxed);
        if (item >= length)
            break;
        compute(task, begin + item);
        atomic_fetch_or_explicit(&share->done, 1ULL << item, memory_order_release);
        count++;
    }
    return count;
}

/* Compute the chunks that are not finished, though other threads have begun them. */
static void compute_missing(const Task *task, Share *shares) {
    for (long thread = 0; thread < task->state->threads; thread++)
        for (unsigned long long left; (left = missing(task, shares + thread, thread));) {
            int item = __builtin_ctzll(left);
            compute(task, share_begin(task, thread) + item);
            atomic_fetch_or_explicit(&shares[thread].done, 1ULL << item, memory_order_release);
            atomic_fetch_add_explicit(&recomputed, 1, memory_order_relaxed);
        }
}

static void operate(Task *task, Share *shares) {
    if (task->op->kind == STEP_ATTENTION)
        plan_attention(task);
    else
        prepare(task);
    uint64_t start = ticks();
    long count = 0, threads = task->state->threads;
    for (long i = 0; i < threads; i++)
        count += take_share(task, shares + (task->thread + i) % threads, (task->thread + i) % threads);
    if (is_complete(task, shares))
        return;
    uint64_t end = ticks(), patience = PATIENCE + (count ? 2 * (end - start) / (uint64_t)count : 0);
    while (!is_complete(task, shares))
        if (ticks() - end > patience)
            compute_missing(task, shares);
        else
            _mm_pause();
}

void step_walk(Frame *frame, int thread) {
    State *state = (State *)frame->memory;
    for (int index = 0; index < state->num_ops; index++) {
        Task task = {.state = state, .seat = state->seats + thread, .index = index, .thread = thread};
        task.op = state->program->ops + index;
        Share *shares = state->shares + index * state->threads;
        task.units = units_of(state, task.op);
        task.size = chunk_units(&task);
        task.count = ceil_divide(task.units, task.size);
        if (!is_complete(&task, shares))
            operate(&task, shares);
        if (thread && atomic_load_explicit(&state->over, memory_order_relaxed))
            return;
    }
}

#else

long step_recomputed(void) { return 0; }

#endif
