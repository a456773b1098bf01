/* Runs the program of a step: see step.h. Every thread walks through all operations, as an equal.
 *
 * The chunks of an operation are divided into a share per thread: a contiguous part of the weights. A thread computes the chunks
 * of its own share in order, then takes chunks that other threads have not begun. Then it waits for the chunks that other threads
 * have begun. When they take longer than expected, it computes them too. So a thread that the operating system has suspended stops
 * no other thread. A chunk computed twice has the same bits, and both threads write them to the same place, which belongs to this
 * step alone: a late write changes nothing. The KV of the step's tokens lies in memory that outlives the step. So the step ends
 * only when no helper is writing KV. Every thread computes norms, merged attention and packed inputs for itself, which takes less
 * time than to wait for another thread. */
#include "step.h"

#include <stdlib.h>
#include <string.h>

#include "attention_bf16.h"
#include "linear_bf16.h"
#include "linear_parts.h"
#include "ops_bf16.h"
#include "team.h"

#if defined(PITLANE_VECTORS)
#define MOST_CHUNKS 48 /* of a share; `done` has a bit for each chunk */
#ifndef PATIENCE
#define PATIENCE 20000 /* ticks of the clock, about 5 to 10 microseconds, added to twice the time of a chunk */
#endif

struct Program {
    Shape shape;
    float eps, scale;
    long widest_input, widest_output;
    Op ops[];
};

/* The chunks of one operation that one thread computes first. */
typedef struct {
    _Alignas(LINE) atomic_long next; /* the next chunk that nobody has begun */
    atomic_ullong done;
} Share;

/* What a thread has for itself. */
typedef struct {
    _Alignas(LINE) atomic_int writing; /* a helper is writing KV */
    uint16_t *input, *packed, *y;
} Seat;

typedef struct {
    const int64_t *write;
    Attention job; /* without q, keys, values, out and partial */
} Reads;

/* A step in progress; it lies at the start of its frame. */
typedef struct {
    const Program *program;
    long rows, num_logits, num_ops, threads, vocab;
    atomic_int over;
    uint16_t *x;
    int64_t *logit_rows;
    uint16_t *angles; /* [ropes][cos, sin][rows][dim / 2] */
    Reads *reads;
    Share *shares; /* [ops][threads] */
    Seat *seats;
    char **results; /* of the operations */
} State;

/* The work of one thread in one operation. */
typedef struct {
    State *state;
    Seat *seat;
    const Op *op;
    int index, thread;
    long units, size, count; /* `count` chunks of `size` units: panels, heads, pairs of panels, or items of attention */
    Job job;
    Attention attention;
} Task;

static atomic_long recomputed;
long step_recomputed(void) { return atomic_load(&recomputed); }

static uint64_t ticks(void) { return __builtin_ia32_rdtsc(); }

/* ---- a chunk */

static void multiply(const Job *job, long panel, long end) {
    if (!job->amx) {
        by_vectors(job, 0, job->rows, panel, end);
        return;
    }
    for (; panel < end; panel += TILE_PANELS)
        by_tiles(job, 0, job->rows, panel, minimum(panel + TILE_PANELS, end));
}

static const uint16_t *result_of(const State *state, int64_t op) {
    return op < 0 ? state->x : (const uint16_t *)state->results[op];
}

/* Rotate the heads [head, end) and write them: queries to the result, keys and values to their slots. */
static void rotate(const Task *task, long head, long end) {
    const State *state = task->state;
    const Op *op = task->op;
    const Shape *shape = &state->program->shape;
    long dim = shape->dim, heads = shape->heads, keys_end = heads + shape->kv_heads, half = state->rows * dim / 2;
    const uint16_t *angles = op->rope < 0 ? NULL : state->angles + op->rope * 2 * half;
    const int64_t *slots = state->reads[op->group].write;
    for (; head < end; head++) {
        const uint16_t *weight = op->qk_norm ? (const uint16_t *)op->qk_norm + head * dim : NULL;
        for (long m = 0; m < state->rows; m++) {
            const uint16_t *x = task->seat->y + m * op->outs + head * dim;
            const uint16_t *cos = angles ? angles + m * dim / 2 : NULL, *sin = angles ? cos + half : NULL;
            long slot = slots[m] * dim;
            if (head >= keys_end) {
                memcpy((uint16_t *)op->values + (head - keys_end) * op->head_stride + slot, x, (size_t)dim * 2);
                continue;
            }
            uint16_t *query = (uint16_t *)state->results[task->index] + (m * heads + head) * dim;
            uint16_t *key = (uint16_t *)op->keys + (head - heads) * op->head_stride + slot;
            turn_head(x, head < heads ? query : key, dim, weight, state->program->eps, cos, sin);
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
    const Op *op = task->op;
    const Job *job = &task->job;
    long begin = chunk * task->size, end = minimum(begin + task->size, task->units);
    if (op->kind == STEP_ATTENTION) {
        for (long item = begin; item < end; item++)
            attention_item(&task->attention, item, item + 1 < task->units ? item + 1 : item);
    } else if (op->output == OUTPUT_ROTATED) {
        long panels = task->state->program->shape.dim / OUTS;
        multiply(job, begin * panels, end * panels);
        rotate_guarded(task, begin, end);
    } else if (op->output == OUTPUT_SILU) {
        long inner = op->outs / 2;
        multiply(job, begin, end);
        multiply(job, task->units + begin, task->units + end);
        for (long m = 0; m < job->rows; m++) {
            const uint16_t *gates = job->y + m * op->outs + begin * OUTS;
            silu_mul_row(gates, gates + inner, (uint16_t *)task->state->results[task->index] + m * inner + begin * OUTS,
                         (end - begin) * OUTS);
        }
    } else {
        multiply(job, begin, end);
        if (op->output == OUTPUT_SUM) {
            uint16_t *sum = (uint16_t *)task->state->results[task->index];
            add_columns(result_of(task->state, op->residual), job->y, sum, job->rows, op->outs, begin * OUTS,
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

/* Compute the inputs of a linear, in memory of this thread. */
static void prepare(Task *task) {
    const State *state = task->state;
    const Op *op = task->op;
    const Program *program = state->program;
    const uint16_t *source = op->input == INPUT_MERGED ? NULL : result_of(state, op->source), *x = task->seat->input;
    long rows = op->selects ? state->num_logits : state->rows;
    if (op->input == INPUT_MERGED) {
        Attention job = attention_of(state, program->ops + op->source, op->source);
        job.out = task->seat->input;
        for (long row = 0; row < job.num_rows; row++)
            attention_merge(&job, row);
    } else if (op->input == INPUT_NORM) {
        for (long m = 0; m < rows; m++)
            rms_norm_row(source + (op->selects ? state->logit_rows[m] : m) * op->ins, (const uint16_t *)op->norm,
                         task->seat->input + m * op->ins, op->ins, program->eps);
    } else {
        x = source;
    }
    uint16_t *y = op->output == OUTPUT_ROWS ? (uint16_t *)state->results[task->index] : task->seat->y;
    task->job = (Job){.x = (const uint32_t *)x, .w = (const char *)op->w, .bias = (const uint16_t *)op->bias, .y = y, .rows = rows};
    task->job.outs = op->outs;
    task->job.pairs = op->ins / 2;
    task->job.panels = ceil_divide(op->outs, OUTS);
    task->job.parts = 1;
    task->job.block = VECTOR_ROWS;
    task->job.amx = (int)op->amx;
    if (rows > 1 && !op->amx) {
        task->job.packed = (uint32_t *)task->seat->packed;
        pack_rows(&task->job, 0);
    }
}

static long units_of(const State *state, const Op *op) {
    if (op->kind == STEP_ATTENTION)
        return state->reads[op->group].job.num_tasks * state->program->shape.kv_heads;
    if (op->output == OUTPUT_ROTATED)
        return op->outs / state->program->shape.dim;
    return op->output == OUTPUT_SILU ? op->outs / 2 / OUTS : ceil_divide(op->outs, OUTS);
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
        task->attention = attention_of(task->state, task->op, task->index);
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

static void walk(Frame *frame, int thread) {
    State *state = (State *)frame->memory;
    for (int index = 0; index < state->num_ops; index++) {
        Task task = {.state = state, .seat = state->seats + thread, .index = index, .thread = thread};
        task.op = state->program->ops + index;
        Share *shares = state->shares + index * state->threads;
        task.units = units_of(state, task.op);
        task.size = ceil_divide(task.units, state->threads * MOST_CHUNKS);
        task.count = ceil_divide(task.units, task.size);
        if (!is_complete(&task, shares))
            operate(&task, shares);
        if (thread && atomic_load_explicit(&state->over, memory_order_relaxed))
            return;
    }
}

/* ---- a step */

static char *reserved(char **at, size_t bytes) {
    char *start = *at;
    *at += (bytes + LINE - 1) / LINE * LINE;
    return start;
}

static char *copied(char **at, int64_t from, size_t bytes, int fills) {
    char *start = reserved(at, bytes);
    if (fills)
        memcpy(start, (const void *)from, bytes);
    return start;
}

static size_t result_bytes(const State *state, const Step *step, const Op *op) {
    const Shape *shape = &state->program->shape;
    if (op->kind == STEP_ATTENTION)
        return (size_t)(step->groups[op->group].num_members * shape->heads * (shape->dim + 2)) * sizeof(float);
    long columns = op->output == OUTPUT_ROTATED ? shape->heads * shape->dim : op->output == OUTPUT_SILU ? op->outs / 2 : op->outs;
    return (size_t)((op->selects ? state->num_logits : state->rows) * columns) * 2;
}

/* Lay the memory of a step out from `at` on, and fill it if `fills`. Returns its end. */
static char *laid_out(State *state, const Step *step, char *at, int fills) {
    const Program *program = state->program;
    const Shape *shape = &program->shape;
    size_t rows = (size_t)step->rows, half = (size_t)shape->dim / 2, threads = (size_t)state->threads;
    state->x = (uint16_t *)copied(&at, step->x, rows * (size_t)shape->hidden * 2, fills);
    state->logit_rows = (int64_t *)copied(&at, step->logit_rows, (size_t)step->num_logits * 8, fills);
    state->angles = (uint16_t *)reserved(&at, (size_t)shape->num_ropes * 2 * rows * half * 2);
    state->reads = (Reads *)reserved(&at, (size_t)shape->num_groups * sizeof(Reads));
    state->results = (char **)reserved(&at, (size_t)shape->num_ops * sizeof(char *));
    state->seats = (Seat *)reserved(&at, threads * sizeof(Seat));
    state->shares = (Share *)reserved(&at, (size_t)shape->num_ops * threads * sizeof(Share));
    for (int64_t rope = 0; fills && rope < shape->num_ropes; rope++)
        for (size_t m = 0; m < rows; m++) {
            size_t position = (size_t)((const int64_t *)step->positions)[m] * half, row = ((size_t)rope * 2 * rows + m) * half;
            memcpy(state->angles + row, (const uint16_t *)step->ropes[rope].cos + position, half * 2);
            memcpy(state->angles + row + rows * half, (const uint16_t *)step->ropes[rope].sin + position, half * 2);
        }
    for (int64_t g = 0; g < shape->num_groups; g++) {
        Reads reads = {.job = {.num_tasks = step->groups[g].num_tasks, .num_rows = step->groups[g].num_rows}};
        reads.job.heads = shape->heads;
        reads.job.kv_heads = shape->kv_heads;
        reads.job.dim = shape->dim;
        reads.job.q_stride = shape->heads * shape->dim;
        reads.job.scale = program->scale;
        reads.write = (int64_t *)copied(&at, step->groups[g].write, rows * 8, fills);
        reads.job.slots = (int32_t *)copied(&at, step->groups[g].slots, (size_t)step->groups[g].num_slots * 4, fills);
        reads.job.tasks = (int64_t *)copied(&at, step->groups[g].tasks, (size_t)step->groups[g].num_tasks * 32, fills);
        reads.job.members = (int64_t *)copied(&at, step->groups[g].members, (size_t)step->groups[g].num_members * 32, fills);
        reads.job.rows = (int64_t *)copied(&at, step->groups[g].rows, (size_t)step->groups[g].num_rows * 24, fills);
        if (fills)
            state->reads[g] = reads;
    }
    for (size_t thread = 0; thread < threads; thread++) {
        Seat seat = {.input = (uint16_t *)reserved(&at, rows * (size_t)program->widest_input * 2)};
        seat.packed = (uint16_t *)reserved(&at, rows * (size_t)program->widest_input * 2);
        seat.y = (uint16_t *)reserved(&at, rows * (size_t)program->widest_output * 2);
        if (fills)
            state->seats[thread] = seat;
    }
    for (int64_t index = 0; index < shape->num_ops; index++) {
        char *result = reserved(&at, result_bytes(state, step, program->ops + index));
        if (fills)
            state->results[index] = result;
    }
    if (fills)
        memset(state->shares, 0, (size_t)shape->num_ops * threads * sizeof(Share));
    return at;
}

int program_run(const Program *program, const Step *step) {
    static _Alignas(LINE) char origin[LINE]; /* the memory is measured from here */
    const Op *last = program->ops + program->shape.num_ops - 1;
    State state = {.program = program, .rows = step->rows, .num_logits = step->num_logits, .threads = step->threads};
    state.num_ops = program->shape.num_ops - (last->selects && step->num_logits == 0);
    size_t head = (sizeof(State) + LINE - 1) / LINE * LINE;
    size_t bytes = head + (size_t)((uintptr_t)laid_out(&state, step, origin, 0) - (uintptr_t)origin);
    Frame *frame = frame_taken(program, bytes);
    if (!frame)
        return 0;
    laid_out(&state, step, frame->memory + head, 1);
    memcpy(frame->memory, &state, sizeof(State));
    frame_run(frame, walk, (int)step->threads);
    State *running = (State *)frame->memory;
    atomic_store(&running->over, 1);
    for (long thread = 1; thread < state.threads; thread++)
        while (atomic_load(&running->seats[thread].writing))
            _mm_pause();
    if (step->num_logits)
        memcpy((void *)step->logits, running->results[program->shape.num_ops - 1], (size_t)(step->num_logits * last->outs) * 2);
    frame_left(frame);
    return 1;
}

/* ---- a program */

static const char *fault_of(const Shape *shape, const Op *op, int64_t index) {
    int is_linear = op->kind == STEP_LINEAR, uses_kv = !is_linear || op->output == OUTPUT_ROTATED;
    int is_earlier = op->source >= -1 && op->source < index && op->residual >= -1 && op->residual < index;
    int has_kv = op->group >= 0 && op->group < shape->num_groups && op->keys && op->values;
    if ((!is_linear && op->kind != STEP_ATTENTION) || !is_earlier)
        return "an operation reads a later one, or its kind is unknown";
    if (uses_kv && (!has_kv || op->rope < -1 || op->rope >= shape->num_ropes))
        return "an operation has no KV, or unknown angles";
    if (!is_linear)
        return op->source < 0 ? "attention needs queries" : NULL;
    if (op->weights != WEIGHTS_BF16 || !op->w || op->outs <= 0 || op->ins <= 0 || op->ins % (op->amx ? 32 : 2) ||
        (op->amx && !has_amx_bf16()))
        return "a linear has unknown weights, an address of 0 or wrong sizes";
    if (op->input == INPUT_NORM     ? !op->norm
        : op->input == INPUT_MERGED ? op->source < 0 || op->ins != shape->heads * shape->dim
                                    : op->input != INPUT_ROWS)
        return "a linear has an unknown input";
    if (op->output == OUTPUT_ROTATED ? op->outs != (shape->heads + 2 * shape->kv_heads) * shape->dim
        : op->output == OUTPUT_SILU  ? op->outs % (2 * OUTS)
                                     : op->output != OUTPUT_ROWS && op->output != OUTPUT_SUM)
        return "a linear has an unknown output";
    return NULL;
}

int has_step(int64_t dim) { return has_attention_bf16(dim) && has_linear_bf16() && has_ops_bf16(); }

Program *program_built(const Shape *shape, const Op *ops, float eps, float scale, const char **fault) {
    *fault = "a step needs operations, heads a multiple of kv_heads, and heads of a size that this CPU can run";
    if (shape->num_ops < 1 || shape->hidden < 1 || shape->num_groups < 1 || shape->num_groups > STEP_MAX_GROUPS ||
        shape->num_ropes < 0 || shape->num_ropes > STEP_MAX_ROPES || shape->kv_heads < 1 || shape->heads % shape->kv_heads || !has_step(shape->dim))
        return NULL;
    for (int64_t index = 0; index < shape->num_ops; index++)
        if ((*fault = fault_of(shape, ops + index, index)))
            return NULL;
    size_t bytes = (size_t)shape->num_ops * sizeof(Op);
    Program *program = malloc(sizeof(Program) + bytes);
    if (!program) {
        *fault = "no memory";
        return NULL;
    }
    *program = (Program){.shape = *shape, .eps = eps, .scale = scale};
    program->widest_input = shape->heads * shape->dim;
    program->widest_output = 1;
    memcpy(program->ops, ops, bytes);
    for (const Op *op = ops; op < ops + shape->num_ops; op++) {
        if (op->kind == STEP_LINEAR && op->ins > program->widest_input)
            program->widest_input = op->ins;
        if (op->kind == STEP_LINEAR && op->output != OUTPUT_ROWS && op->outs > program->widest_output)
            program->widest_output = op->outs;
    }
    return program;
}

void program_freed(Program *program) {
    frames_left(program);
    free(program);
}

#else

int has_step(int64_t dim) {
    (void)dim;
    return 0;
}

long step_recomputed(void) { return 0; }

Program *program_built(const Shape *shape, const Op *ops, float eps, float scale, const char **fault) {
    (void)shape, (void)ops, (void)eps, (void)scale;
    *fault = "this CPU cannot run it";
    return 0;
}

int program_run(const Program *program, const Step *step) { return (void)program, (void)step, 0; }

void program_freed(Program *program) { (void)program; }

#endif
