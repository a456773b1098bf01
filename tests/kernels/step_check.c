/* Runs steps of a random decoder, and linears, on several threads, and compares them with one thread. test_step.py builds it with
 * sanitizers. Arguments: number of repetitions, number of threads of a step, number of callers at once. Exits with 1 if a bit differs. */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "linear_bf16.h"
#include "linear_int.h"
#include "step.h"

enum { HIDDEN = 96, HEADS = 3, KV_HEADS = 1, DIM = 32, INNER = 96, VOCAB = 150, LAYERS = 3, OPS = 5 * LAYERS + 1 };
enum { SLOTS = 256, MAX_ROWS = 40 };
static const int sizes[] = {1, 2, 13, MAX_ROWS};

typedef struct {
    uint16_t *tensors[32 * LAYERS], kv[LAYERS][2][KV_HEADS * SLOTS * DIM];
    int num_tensors;
    Program *program;
} Model;

static uint16_t *random_tensor(Model *model, long count, unsigned seed) {
    uint16_t *tensor = aligned_alloc(64, (size_t)(count * 2 + 8192 + 63) / 64 * 64);
    for (long i = 0; i < count; i++) {
        float value = (float)rand_r(&seed) / RAND_MAX / 2 - 0.25f;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        tensor[i] = (uint16_t)(bits >> 16);
    }
    return model->tensors[model->num_tensors++] = tensor;
}

static Op linear(Model *model, int input, int output, long source, long outs, long ins, unsigned seed) {
    Op op = {.kind = STEP_LINEAR, .input = input, .output = output, .source = source, .residual = -1, .rope = -1};
    op.products = has_products(BY_VECTORS, ins) ? BY_VECTORS : BY_FLOATS;
    op.outs = outs, op.ins = ins;
    op.w = (int64_t)random_tensor(model, (outs + 31) / 32 * 32 * ins, seed);
    op.bias = (int64_t)random_tensor(model, 2 * outs, seed + 1); /* long enough for float32 too */
    op.norm = (int64_t)random_tensor(model, ins, seed + 2);
    return op;
}

/* Make the weights of a linear integers: the same bytes, read in another way. */
static Op in_integers(Op op, int bits, int quantized) {
    op.weights = WEIGHTS_INT, op.bits = bits, op.input_group = 32, op.quantized = quantized, op.level = int_level();
    op.scales = bits == 8 ? op.bias : 0;
    return op;
}

static void build(Model *model) {
    Shape shape = {HIDDEN, HEADS, KV_HEADS, DIM, OPS, 1, 1};
    Op ops[OPS];
    const char *fault;
    memset(model, 0, sizeof *model);
    for (long layer = 0, x = -1, at = 0; layer < LAYERS; layer++, x = at - 1) {
        Op kv = {.kind = STEP_ATTENTION, .source = at, .head_stride = SLOTS * DIM, .rope = -1};
        kv.keys = (int64_t)model->kv[layer][0];
        kv.values = (int64_t)model->kv[layer][1];
        ops[at] = linear(model, INPUT_NORM, OUTPUT_ROTATED, x, (HEADS + 2 * KV_HEADS) * DIM, HIDDEN, (unsigned)layer * 10);
        ops[at].keys = kv.keys, ops[at].values = kv.values, ops[at].head_stride = kv.head_stride, ops[at].rope = 0;
        ops[at++].qk_norm = (int64_t)random_tensor(model, (HEADS + KV_HEADS) * DIM, 5);
        ops[at++] = kv;
        ops[at] = linear(model, INPUT_MERGED, OUTPUT_SUM, at - 1, HIDDEN, HEADS * DIM, (unsigned)layer * 10 + 3);
        ops[at++].residual = x;
        ops[at] = linear(model, INPUT_NORM, OUTPUT_SILU, at - 1, 2 * INNER, HIDDEN, (unsigned)layer * 10 + 5), at++;
        ops[at] = linear(model, INPUT_ROWS, OUTPUT_SUM, at - 1, HIDDEN, INNER, (unsigned)layer * 10 + 7);
        ops[at].residual = at - 2, at++;
        for (long i = at - 2; i < at; i++) /* the first layer has weights of bfloat16, its MLP float32 products */
            ops[i].products = BY_FLOATS;
        if (layer > 0)
            for (long i = at - 5; i < at; i++)
                if (ops[i].kind == STEP_LINEAR)
                    ops[i] = in_integers(ops[i], i % 2 ? 8 : 4, layer == 1);
    }
    ops[OPS - 1] = linear(model, INPUT_NORM, OUTPUT_ROWS, OPS - 2, VOCAB, HIDDEN, 99);
    ops[OPS - 1].selects = 1;
    model->program = program_built(&shape, ops, 1e-5f, 0.2f, 1.0f / 1024, &fault);
    if (!model->program)
        fprintf(stderr, "%s\n", fault), exit(2);
}

static void destroy(Model *model) {
    program_freed(model->program);
    while (model->num_tensors)
        free(model->tensors[--model->num_tensors]);
}

/* A step of `rows` tokens at the positions [begin, begin + rows). */
static void run(Model *model, long rows, long begin, long threads, float *logits) {
    float x[MAX_ROWS * HIDDEN];
    uint16_t angles[2][SLOTS * DIM / 2];
    int64_t positions[MAX_ROWS], order[MAX_ROWS], task[4] = {0, begin + rows, 0, rows}, members[MAX_ROWS][4], merged[MAX_ROWS][3];
    int32_t slots[SLOTS];
    for (int i = 0; i < SLOTS * DIM / 2; i++)
        angles[0][i] = (uint16_t)(0x3f00 + i % 64), angles[1][i] = (uint16_t)(0x3e00 + i % 77);
    for (int i = 0; i < SLOTS; i++)
        slots[i] = i;
    for (long i = 0; i < rows * HIDDEN; i++)
        x[i] = (float)(i * 7919 % 1013) / 2026 - 0.25f;
    for (long i = 0; i < rows; i++) {
        positions[i] = begin + i, order[i] = rows - 1 - i;
        members[i][0] = members[i][1] = i, members[i][2] = i % 3, members[i][3] = begin + i + 1;
        merged[i][0] = merged[i][1] = i, merged[i][2] = 1;
    }
    Step step = {.rows = rows, .num_logits = rows, .threads = threads, .num_positions = SLOTS, .x = (int64_t)x};
    step.positions = (int64_t)positions, step.logit_rows = (int64_t)order, step.logits = (int64_t)logits;
    step.groups[0].write = (int64_t)positions, step.groups[0].slots = (int64_t)slots, step.groups[0].num_slots = begin + rows;
    step.groups[0].tasks = (int64_t)task, step.groups[0].num_tasks = 1;
    step.groups[0].members = (int64_t)members, step.groups[0].num_members = rows;
    step.groups[0].rows = (int64_t)merged, step.groups[0].num_rows = rows;
    step.ropes[0].cos = (int64_t)angles[0], step.ropes[0].sin = (int64_t)angles[1];
    if (!program_run(model->program, &step))
        exit(2);
}

/* Whether a linear of each kind has other bits by `run_parallel` on some threads than on one. */
static int linears_differ(const Model *model, long rows, int threads) {
    enum { OUTS = (HEADS + 2 * KV_HEADS) * DIM };
    static _Thread_local uint16_t y[2][MAX_ROWS * OUTS], scratch[MAX_ROWS * HIDDEN * 4];
    uint16_t *const *tensors = model->tensors;
    IntLinear job = {(uint8_t *)tensors[0], (float *)tensors[1], NULL, OUTS, HIDDEN, 8, 32, 1, 1, 0, int_level(), 1};
    int different = 0;
    for (int products = BY_VECTORS; products <= BY_FLOATS; products += BY_FLOATS) {
        if (!has_products(products, HIDDEN))
            continue;
        for (int i = 0; i < 2; i++)
            linear_bf16(tensors[0], tensors[0], tensors[1], y[i], scratch, rows, OUTS, HIDDEN, products, i ? threads : 1, 0);
        different += memcmp(y[0], y[1], (size_t)(rows * OUTS) * 2) != 0;
    }
    for (int i = 0; i < 2; i++)
        int_linear(&job, tensors[0], y[i], scratch, rows, i ? threads : 1);
    return different + (memcmp(y[0], y[1], (size_t)(rows * OUTS) * 2) != 0);
}

static int repetitions, threads;

static void *caller(void *unused) {
    (void)unused;
    static _Thread_local float expected[MAX_ROWS * VOCAB], logits[MAX_ROWS * VOCAB];
    long different = 0;
    for (int repetition = 0; repetition < repetitions; repetition++) {
        Model *pair = calloc(2, sizeof(Model));
        build(pair), build(pair + 1);
        for (int i = 0; i < 16; i++) {
            long rows = sizes[i % 4], begin = 5 * i;
            run(pair, rows, begin, 1, expected);
            run(pair + 1, rows, begin, threads, logits);
            for (long at = 0; at < rows * VOCAB; at++)
                if (!isfinite(expected[at])) /* infinity and NaN cannot be compared */
                    exit(2);
            different += memcmp(expected, logits, (size_t)(rows * VOCAB) * sizeof(float)) != 0;
            different += linears_differ(pair, rows, threads);
            different += memcmp(pair[0].kv, pair[1].kv, sizeof pair->kv) != 0;
        }
        destroy(pair), destroy(pair + 1);
        free(pair);
    }
    return (void *)different;
}

int main(int count, char **arguments) {
    if (count < 4 || !has_step(DIM))
        return 3;
    repetitions = atoi(arguments[1]), threads = atoi(arguments[2]);
    int callers = atoi(arguments[3]);
    pthread_t handles[16];
    long different = 0;
    for (int i = 0; i < callers; i++)
        pthread_create(handles + i, 0, caller, 0);
    for (int i = 0; i < callers; i++) {
        void *result;
        pthread_join(handles[i], &result);
        different += (long)result;
    }
    printf("%ld different, %ld chunks recomputed\n", different, step_recomputed());
    return different != 0;
}
