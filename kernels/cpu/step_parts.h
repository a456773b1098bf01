/* Shared by step.c and step_memory.c: a program, and a step in progress. */
#ifndef PITLANE_STEP_PARTS_H
#define PITLANE_STEP_PARTS_H

#include "attention_bf16.h"
#include "linear_parts.h"
#include "step.h"
#include "team.h"

#if defined(PITLANE_VECTORS)
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

/* Walk through all operations of the step in a frame: see step.c. */
void step_walk(Frame *frame, int thread);

#endif
#endif
