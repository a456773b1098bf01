/* The functions of vectors.h for one set of instructions. vectors_avx2.c and vectors_avx512.c include it after the header of
 * their lanes. */
#include "attention_pieces.h"
#include "linear_fp8_vectors.h"
#include "linear_vectors.h"
#include "ops_rows.h"
#include "step_outputs.h"

const Vectors VECTORS = {
    .has_pairs = HAS_PAIRS,
    .prepare = prepare,
    .panels = panels,
    .fp8_pairs = fp8_pairs,
    .attention_item = attention_item,
    .attention_merge = attention_merge,
    .rms_norm_row = rms_norm_row,
    .silu_mul_row = silu_mul_row,
    .add_columns = add_columns,
    .turn_head = turn_head,
};
