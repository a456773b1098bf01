/* A decode or verify step of a decoder in one call: a program of operations over the rows of a batch.
 *
 * A row is a token. The program of a layer has five operations: (norm, linear q k v, RoPE, KV write), (attention), (merge, linear,
 * residual), (norm, linear gate up, activation * up), (linear, residual). The last operation is (norm, head). An operation reads
 * the results of earlier operations and writes memory of its own. So no operation changes what another operation reads.
 *
 * The rows that the step starts from, sums and logits are float32: the stream of residuals. Norms, the inputs of linears, and all other
 * results are bfloat16. */
#ifndef PITLANE_STEP_H
#define PITLANE_STEP_H

#include <stdint.h>

enum { STEP_LINEAR, STEP_ATTENTION };                  /* Op.kind */
enum { WEIGHTS_BF16, WEIGHTS_INT };                    /* Op.weights: a linear of linear_bf16.h, or of linear_int.h */
enum { INPUT_ROWS, INPUT_NORM, INPUT_MERGED };         /* Op.input: results of SILU, sums RMS-normed, parts of attention merged */
enum { OUTPUT_ROWS, OUTPUT_SUM, OUTPUT_ROTATED, OUTPUT_SILU }; /* Op.output: see Op */

/* All int64, in this order, as kernels/step.py writes them. An operation is an index; -1 is the rows that the step starts from. */
typedef struct {
    int64_t kind, input, output, weights;
    int64_t source;   /* the operation whose result is read */
    int64_t residual; /* OUTPUT_SUM adds the linear's outputs to the result of this operation */
    int64_t w, bias, outs, ins; /* of the linear: as in the header of its weights */
    int64_t products;           /* WEIGHTS_BF16: as for linear_bf16 */
    int64_t scales, bits, input_group, symmetric, quantized, level; /* WEIGHTS_INT: as in IntLinear, where input_group is `group` */
    int64_t norm;               /* INPUT_NORM: weight [ins] */
    int64_t selects;  /* whether only the logit rows are computed */
    int64_t group;    /* KV group, for OUTPUT_ROTATED and STEP_ATTENTION */
    int64_t keys, values, head_stride; /* [kv_heads][slots][dim] of the layer, bfloat16, heads head_stride apart */
    int64_t rope;     /* index of the angles for OUTPUT_ROTATED; -1: no rotation */
    int64_t qk_norm;  /* weights [heads + kv_heads][dim] of norms per head, or 0 */
    int64_t key_rows, value_rows, row_bytes, row_stride, kv_bits, first_open; /* STEP_ATTENTION over quantized KV, else 0: as in
                         Quantized; keys and values are then its open slots, and slots that are written count from the first one */
} Op;

/* OUTPUT_ROWS, OUTPUT_SUM: [rows][outs], float32. OUTPUT_ROTATED: the linear gives heads + 2 kv_heads heads; the result is q
 * [rows][heads][dim], keys and values go to their slots. Where a group has second positions, second queries [rows][heads][dim]
 * follow: those of the sinks. OUTPUT_SILU: [rows][outs / 2]. STEP_ATTENTION: the parts of attention. */

typedef struct {
    int64_t hidden, heads, kv_heads, dim, num_ops, num_groups, num_ropes;
} Shape;

enum { STEP_MAX_GROUPS = 8, STEP_MAX_ROPES = 8, STEP_MAX_ROWS = 64, STEP_MAX_THREADS = 128 };

/* A batch. num_positions: positions that have angles. x: [rows][hidden], float32. logits: [num_logits][vocabulary], float32, the last
 * operation's result. positions, logit_rows: int64. */
typedef struct {
    int64_t rows, num_logits, threads, num_positions, x, positions, logit_rows, logits;
    struct {
        int64_t write; /* [rows] int64, the slot of each row */
        int64_t slots, num_slots, tasks, num_tasks, members, num_members, rows, num_rows; /* as for attention_bf16 */
        int64_t second; /* [rows] int64, the positions of the second queries; 0: there are none */
    } groups[STEP_MAX_GROUPS];
    struct {
        int64_t cos, sin; /* [positions][dim / 2] bfloat16 */
    } ropes[STEP_MAX_ROPES];
} Step;

typedef struct Program Program;

/* Whether this build and this CPU can run steps with heads of this size. */
int has_step(int64_t dim);

/* Return a program, or NULL with a message in `fault`. The tensors behind its addresses must live until `program_freed` returns.
 * scale: of the scores of attention. unit: of the scales of weights of 4 bits. */
Program *program_built(const Shape *shape, const Op *ops, float eps, float scale, float unit, const char **fault);

/* Run a step of `program`. Returns 0 if there is no memory. */
int program_run(const Program *program, const Step *step);

/* Wait until no thread is in a step of the program, and free it. */
void program_freed(Program *program);

/* How many chunks of this process were computed a second time, because their thread was late. */
long step_recomputed(void);

#endif
