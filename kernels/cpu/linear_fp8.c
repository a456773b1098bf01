/* The linear of linear_fp8.h. A thread takes a few panels of one block of rows at a time. linear_fp8_vectors.h multiplies. */
#include "linear_fp8.h"
#include "linear_parts.h"
#include "vectors.h"

#include <string.h>

#define ROWS 192    /* of a block */
#define PANEL FP8_PANEL
#define MAX_PANELS 4 /* that a thread takes at a time */

typedef struct {
    const Fp8Linear *job;
    const Vectors *vectors;
    const void *x;
    void *y;
    long rows, pairs, groups, panels, chunk;
    Phase items;
} Work;

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* Round to the nearest bfloat16, ties to even. */
static uint16_t to_bf16(float value) {
    uint32_t bits = to_bits(value);
    if (value != value)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float decoded(uint8_t byte) {
    uint32_t sign = (uint32_t)(byte & 0x80) << 24, rest = byte & 0x7f;
    float small = (float)rest * 0.001953125f; /* 2^-9 */
    return from_bits(sign | (rest < 8 ? to_bits(small) : (rest << 20) + (120u << 23)));
}

static void finish_rows(const Work *work, const float *sums, long first, long rows, long panel) {
    const Fp8Linear *job = work->job;
    long begin = panel * PANEL, count = minimum(job->outs - begin, PANEL);
    for (long m = 0; m < rows; m++)
        for (long o = 0; o < count; o++) {
            float value = sums[m * PANEL + o] + (job->bias ? job->bias[begin + o] : 0);
            long at = (first + m) * job->outs + begin + o;
            if (job->wide_outputs)
                ((float *)work->y)[at] = value;
            else
                ((uint16_t *)work->y)[at] = to_bf16(value);
        }
}

/* totals [rows][PANEL] += sums [rows][PANEL] * scales [PANEL] */
static void add_scaled(float *totals, const float *sums, const float *scales, long rows) {
    for (long m = 0; m < rows; m++)
        for (long o = 0; o < PANEL; o++)
            totals[m * PANEL + o] += sums[m * PANEL + o] * scales[o];
}

static void plain_chunk(const Work *work, const uint8_t *w, long pair, long pairs, long first, long rows, float *sums) {
    float wide[2 * FP8_CHUNK][PANEL];
    for (long k = 0; k < pairs; k++)
        for (long o = 0; o < PANEL; o++) {
            wide[2 * k][o] = decoded(w[k * 2 * PANEL + 2 * o]);
            wide[2 * k + 1][o] = decoded(w[k * 2 * PANEL + 2 * o + 1]);
        }
    for (long m = 0; m < rows; m++) {
        long at = (first + m) * work->job->ins + 2 * pair;
        float *sum = sums + m * PANEL;
        for (long k = 0; k < 2 * pairs; k++) {
            float x = work->job->wide ? ((const float *)work->x)[at + k] : from_bits((uint32_t)((const uint16_t *)work->x)[at + k] << 16);
            for (long o = 0; o < PANEL; o++)
                sum[o] += x * wide[k][o];
        }
    }
}

int has_fp8_vectors(void) { return vectors() != NULL; }

static void by_panel(const Work *work, long first, long rows, long panel) {
    const Fp8Linear *job = work->job;
    const uint8_t *w = job->w + panel * work->pairs * 2 * PANEL;
    const float *scales = job->scales + panel * work->groups * PANEL;
    float totals[ROWS * PANEL], sums[ROWS * PANEL];
    memset(totals, 0, sizeof(float) * (size_t)(rows * PANEL));
    for (long begin = 0; begin < work->pairs; begin += job->group / 2, scales += PANEL) {
        long end = minimum(begin + job->group / 2, work->pairs);
        memset(sums, 0, sizeof(float) * (size_t)(rows * PANEL));
        for (long pair = begin; pair < end; pair += FP8_CHUNK) {
            long pairs = minimum(end - pair, FP8_CHUNK);
            const uint8_t *weights = w + pair * 2 * PANEL;
            if (job->level == FP8_VECTORS) {
                const uint32_t *x = (const uint32_t *)work->x + first * work->pairs + pair;
                work->vectors->fp8_pairs(x, work->pairs, weights, pairs, rows, sums);
                continue;
            }
            plain_chunk(work, weights, pair, pairs, first, rows, sums);
        }
        add_scaled(totals, sums, scales, rows);
    }
    finish_rows(work, totals, first, rows, panel);
}

static void help(void *arg) {
    Work *work = arg;
    long chunks = ceil_divide(work->panels, work->chunk), items = chunks * ceil_divide(work->rows, ROWS);
    for (long item; (item = take(&work->items, items)) < items;) {
        long first = item / chunks * ROWS, panel = item % chunks * work->chunk;
        for (long end = minimum(panel + work->chunk, work->panels); panel < end; panel++)
            by_panel(work, first, minimum(work->rows - first, ROWS), panel);
    }
}

void fp8_linear(const Fp8Linear *job, const void *x, void *y, long rows, int threads) {
    Work work = {.job = job, .vectors = vectors(), .x = x, .y = y, .rows = rows, .pairs = job->ins / 2};
    work.groups = ceil_divide(job->ins, job->group);
    work.panels = ceil_divide(job->outs, PANEL);
    work.chunk = minimum(MAX_PANELS, ceil_divide(work.panels, 4 * threads));
    run_parallel(help, &work, threads);
}
