/* Shared by step.c and step_memory.c: a program, and a step in progress. */
#ifndef PITLANE_STEP_PARTS_H
#define PITLANE_STEP_PARTS_H

#include "linear_int.h"
#include "step.h"
#include "team.h"
#include "vectors.h"

#if defined(PITLANE_VECTORS)
struct Program {
    const Vectors *vectors;
    Shape shape;
    float eps, scale, unit;
    long widest_input;
    size_t output_bytes; /* largest size of the intermediate outputs of a row */
    size_t packed_bytes; /* largest size of the packed inputs of a row */
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
    uint16_t *input;
    void *packed, *y;
} Seat;

typedef struct {
    const int64_t *write;
    const uint16_t *second; /* the angles of the second queries, as State.angles, or NULL */
    Attention job; /* without q, keys, values, out and partial */
} Reads;

/* A step in progress; it lies at the start of its frame. */
typedef struct {
    const Program *program;
    long rows, num_logits, num_ops, threads, vocab;
    atomic_int over;
    float *x;
    int64_t *logit_rows;
    uint16_t *angles; /* [ropes][cos, sin][rows][dim / 2] */
    Reads *reads;
    Share *shares; /* [ops][threads] */
    Seat *seats;
    char **results; /* of the operations */
} State;

/* Whether a linear gives float32: for the stream of residuals, or as logits. */
static inline int is_wide(const Op *op) { return op->output == OUTPUT_SUM || op->output == OUTPUT_ROWS; }

/* The linear of an operation with WEIGHTS_INT. */
static inline IntLinear int_linear_of(const Op *op, float unit) {
    return (IntLinear){(const uint8_t *)op->w, (const float *)op->scales, (const float *)op->bias, op->outs, op->ins, (int)op->bits,
                       (int)op->input_group, (int)op->symmetric, (int)op->quantized, is_wide(op) ? INT_FLOAT_OUTPUTS : INT_BF16,
                       (int)op->level, unit};
}

/* Walk through all operations of the step in a frame: see step.c. */
void step_walk(Frame *frame, int thread);

#endif
#endif
