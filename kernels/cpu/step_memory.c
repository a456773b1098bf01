/* Programs, and the memory of a step: the batch is copied into a frame, and every operation gets memory of its own there. A late
 * helper reads only the frame, the program, the weights and the KV stores, so the batch may be gone when it wakes up. */
#include <stdlib.h>
#include <string.h>

#include "linear_bf16.h"
#include "step_parts.h"

#if defined(PITLANE_VECTORS)
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
    long queries = shape->heads * shape->dim * (step->groups[op->group].second ? 2 : 1);
    long columns = op->output == OUTPUT_ROTATED ? queries : op->output == OUTPUT_SILU ? op->outs / 2 : op->outs;
    return (size_t)((op->selects ? state->num_logits : state->rows) * columns) * (is_wide(op) ? 4 : 2);
}

/* The angles of `positions`: [ropes][cos, sin][rows][dim / 2]. */
static uint16_t *angles_at(char **at, const Step *step, const Shape *shape, int64_t positions, int fills) {
    size_t rows = (size_t)step->rows, half = (size_t)shape->dim / 2;
    uint16_t *angles = (uint16_t *)reserved(at, (size_t)shape->num_ropes * 2 * rows * half * 2);
    for (int64_t rope = 0; fills && rope < shape->num_ropes; rope++)
        for (size_t m = 0; m < rows; m++) {
            size_t position = (size_t)((const int64_t *)positions)[m] * half, row = ((size_t)rope * 2 * rows + m) * half;
            memcpy(angles + row, (const uint16_t *)step->ropes[rope].cos + position, half * 2);
            memcpy(angles + row + rows * half, (const uint16_t *)step->ropes[rope].sin + position, half * 2);
        }
    return angles;
}

/* Lay the memory of a step out from `at` on, and fill it if `fills`. Returns its end. */
static char *laid_out(State *state, const Step *step, char *at, int fills) {
    const Program *program = state->program;
    const Shape *shape = &program->shape;
    size_t rows = (size_t)step->rows, threads = (size_t)state->threads;
    state->x = (float *)copied(&at, step->x, rows * (size_t)shape->hidden * 4, fills);
    state->logit_rows = (int64_t *)copied(&at, step->logit_rows, (size_t)step->num_logits * 8, fills);
    state->angles = angles_at(&at, step, shape, step->positions, fills);
    state->reads = (Reads *)reserved(&at, (size_t)shape->num_groups * sizeof(Reads));
    state->results = (char **)reserved(&at, (size_t)shape->num_ops * sizeof(char *));
    state->seats = (Seat *)reserved(&at, threads * sizeof(Seat));
    state->shares = (Share *)reserved(&at, (size_t)shape->num_ops * threads * sizeof(Share));
    for (int64_t g = 0; g < shape->num_groups; g++) {
        Reads reads = {.job = {.num_tasks = step->groups[g].num_tasks, .num_rows = step->groups[g].num_rows}};
        reads.job.heads = shape->heads;
        reads.job.kv_heads = shape->kv_heads;
        reads.job.dim = shape->dim;
        reads.job.q_stride = shape->heads * shape->dim;
        reads.job.scale = program->scale;
        if (step->groups[g].second)
            reads.second = angles_at(&at, step, shape, step->groups[g].second, fills);
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
        seat.packed = reserved(&at, rows * program->packed_bytes);
        seat.y = reserved(&at, rows * program->output_bytes);
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
    frame_run(frame, step_walk, (int)step->threads);
    State *running = (State *)frame->memory;
    atomic_store(&running->over, 1);
    for (long thread = 1; thread < state.threads; thread++)
        while (atomic_load(&running->seats[thread].writing))
            _mm_pause();
    if (step->num_logits)
        memcpy((void *)step->logits, running->results[program->shape.num_ops - 1], (size_t)(step->num_logits * last->outs) * 4);
    frame_left(frame);
    return 1;
}

/* ---- a program */

static int has_weights(const Op *op) {
    if (!op->w || op->outs <= 0 || op->ins <= 0)
        return 0;
    IntLinear ints = int_linear_of(op, 1);
    return op->weights == WEIGHTS_BF16  ? has_products(op->products, op->ins)
           : op->weights == WEIGHTS_INT ? !int_fault(&ints)
                                        : 0;
}

/* Whether an operation, or the rows that the step starts from, gives sums in float32, `columns` per row. */
static int is_sum(const Shape *shape, const Op *ops, int64_t index, int64_t columns) {
    if (index < 0)
        return columns == shape->hidden;
    return ops[index].kind == STEP_LINEAR && ops[index].output == OUTPUT_SUM && ops[index].outs == columns;
}

static const char *fault_of(const Shape *shape, const Op *ops, int64_t index) {
    const Op *op = ops + index;
    int is_linear = op->kind == STEP_LINEAR, uses_kv = !is_linear || op->output == OUTPUT_ROTATED;
    int is_earlier = op->source >= -1 && op->source < index && op->residual >= -1 && op->residual < index;
    int has_kv = op->group >= 0 && op->group < shape->num_groups && op->keys && op->values;
    if ((!is_linear && op->kind != STEP_ATTENTION) || !is_earlier)
        return "an operation reads a later one, or its kind is unknown";
    if (uses_kv && (!has_kv || op->rope < -1 || op->rope >= shape->num_ropes))
        return "an operation has no KV, or unknown angles";
    if (!is_linear && op->key_rows && (!op->value_rows || op->row_bytes <= 0 || op->first_open <= 0))
        return "attention over quantized KV has no rows";
    if (!is_linear)
        return op->source < 0 ? "attention needs queries" : NULL;
    if (!has_weights(op))
        return "a linear has unknown weights, an address of 0 or wrong sizes";
    if (op->input == INPUT_NORM     ? !op->norm
        : op->input == INPUT_MERGED ? op->source < 0 || op->ins != shape->heads * shape->dim
                                    : op->input != INPUT_ROWS)
        return "a linear has an unknown input";
    if (op->output == OUTPUT_ROTATED ? op->outs != (shape->heads + 2 * shape->kv_heads) * shape->dim
        : op->output == OUTPUT_SILU  ? op->outs % (2 * OUTS)
                                     : op->output != OUTPUT_ROWS && op->output != OUTPUT_SUM)
        return "a linear has an unknown output";
    if ((op->input == INPUT_NORM && !is_sum(shape, ops, op->source, op->ins)) ||
        (op->output == OUTPUT_SUM && !is_sum(shape, ops, op->residual, op->outs)))
        return "a norm or a residual reads an operation that gives no sums, or another number of them";
    if (op->input == INPUT_ROWS && (op->source < 0 || ops[op->source].output != OUTPUT_SILU || ops[op->source].outs != 2 * op->ins))
        return "a linear reads an operation that gives no activations, or another number of them";
    return NULL;
}

int has_step(int64_t dim) { return has_attention_bf16(dim); }

Program *program_built(const Shape *shape, const Op *ops, float eps, float scale, float unit, const char **fault) {
    *fault = "a step needs operations, heads a multiple of kv_heads, and heads of a size that this CPU can run";
    if (shape->num_ops < 1 || shape->hidden < 1 || shape->num_groups < 1 || shape->num_groups > STEP_MAX_GROUPS ||
        shape->num_ropes < 0 || shape->num_ropes > STEP_MAX_ROPES || shape->kv_heads < 1 || shape->heads % shape->kv_heads ||
        !has_step(shape->dim))
        return NULL;
    for (int64_t index = 0; index < shape->num_ops; index++)
        if ((*fault = fault_of(shape, ops, index)))
            return NULL;
    size_t bytes = (size_t)shape->num_ops * sizeof(Op);
    Program *program = malloc(sizeof(Program) + bytes);
    if (!program) {
        *fault = "no memory";
        return NULL;
    }
    *program = (Program){.vectors = vectors(), .shape = *shape, .eps = eps, .scale = scale, .unit = unit};
    program->widest_input = shape->heads * shape->dim;
    memcpy(program->ops, ops, bytes);
    for (const Op *op = ops; op < ops + shape->num_ops; op++) {
        if (op->kind == STEP_LINEAR && op->ins > program->widest_input)
            program->widest_input = op->ins;
        size_t outputs = op->output == OUTPUT_ROWS ? 0 : (size_t)op->outs * (is_wide(op) ? 4 : 2);
        if (op->kind == STEP_LINEAR && outputs > program->output_bytes)
            program->output_bytes = outputs;
        IntLinear ints = int_linear_of(op, unit);
        size_t packed = op->weights == WEIGHTS_INT ? int_scratch_bytes(&ints, 1)
                                                   : scratch_bytes_bf16((int)op->products, STEP_MAX_ROWS, op->ins);
        if (op->kind == STEP_LINEAR && packed > program->packed_bytes)
            program->packed_bytes = packed;
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

Program *program_built(const Shape *shape, const Op *ops, float eps, float scale, float unit, const char **fault) {
    (void)shape, (void)ops, (void)eps, (void)scale, (void)unit;
    *fault = "this CPU cannot run it";
    return 0;
}

int program_run(const Program *program, const Step *step) { return (void)program, (void)step, 0; }

void program_freed(Program *program) { (void)program; }

#endif
