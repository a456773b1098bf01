/* Many rows of quantized inputs. Part of linear_int_tiles.h, for levels that define WIDE_ROWS.
 *
 * A wide tile is two panels times up to WIDE_ROWS rows, so that a broadcast of inputs serves two products. Its totals lie in memory,
 * because its sums fill the registers. The inputs are cut into blocks: a block of two panels stays in the first cache while all
 * tiles of rows read it. The first tile unpacks nibbles to bytes for the tiles after it. The sums of a row and an output are the
 * sums of the other tiles, in the same order. */
enum { BLOCK = 512, BLOCK_LINES = BLOCK / 4, BLOCK_GROUPS = BLOCK / 32 }; /* inputs: a multiple of two groups of every size */

/* A block of two panels: `count` lines of bytes, an even number; of groups of nibbles also the scales and lows [groups][16]. */
typedef struct {
    const uint8_t *w[2], *next; /* packed weights, and weights to prefetch */
    uint8_t *lines[2];
    float *scales[2], *lows[2];
    long count, group_lines;
} Block;

enum { WIDE_BYTES, WIDE_SYMMETRIC, WIDE_LOWS, WIDE_KINDS };

/* Add the products of a line of two panels and of a word of every row to sums a and b. */
TARGET INLINE void multiply_line(int rows, VI *a, VI *b, VI first, VI second, const uint32_t *x) {
    UNROLL for (int m = 0; m < rows; m++) {
        VI word = ints((int32_t)x[m]);
        a[m] = dot_vectors(a[m], first, word);
        b[m] = dot_vectors(b[m], second, word);
    }
}

/* Add the sums of a group to a panel's totals [rows][2][16]. */
TARGET INLINE void add_group(int rows, int kind, const VI *acc, VF scale, VF low, const float *scales, const float *sums,
                             float *totals) {
    UNROLL for (int m = 0; m < rows; m++) {
        VF sum = to_float(acc[m]);
        sum = fused(kind == WIDE_BYTES ? sum : times(sum, scale), floats(scales[m]), load(totals + 32 * m));
        save(totals + 32 * m, kind == WIDE_LOWS ? fused(low, floats(sums[m]), sum) : sum);
    }
}

/* Add the products of a block to totals [rows][2][16]. sums, scales: of the inputs, [groups of the block][rows]. unpacks: read
 * nibbles from w, and write the block's lines, scales and lows. */
TARGET INLINE void wide_tile(int rows, int kind, int unpacks, const Block *block, const uint32_t *x, const int32_t *sums,
                             const float *scales, float *totals) {
    const long header = kind == WIDE_LOWS ? 128 : 64, step = kind == WIDE_BYTES ? 128 : 80;
    const uint8_t *w = block->w[0], *w2 = block->w[1], *head = w, *head2 = w2, *next = block->next;
    uint8_t *lines = block->lines[0], *lines2 = block->lines[1];
    for (long left = block->count, g = 0; left > 0; left -= block->group_lines, sums += rows, scales += rows, g++) {
        VI a[WIDE_ROWS], b[WIDE_ROWS];
        const int32_t *sums2 = sums;
        __asm__("" : "+r"(totals), "+r"(sums2)); /* else gcc keeps totals on the stack over all groups, and copies a to b */
        UNROLL for (int m = 0; m < rows; m++) a[m] = ints(kind == WIDE_LOWS ? 0 : sums[m]);
        UNROLL for (int m = 0; m < rows; m++) b[m] = ints(kind == WIDE_LOWS ? 0 : sums2[m]);
        if (unpacks && g % 2 == 0)
            head = w, head2 = w2, w += header, w2 += header;
        long count = smaller(left, block->group_lines);
        do {
            fetch_far(next);
            if (step == 128)
                fetch_far(next + 64);
            if (unpacks) {
                VI both = line(w), both2 = line(w2), first = low_nibbles(both), second = low_nibbles(both2);
                save_line(lines, first);
                save_line(lines2, second);
                multiply_line(rows, a, b, first, second, x);
                first = high_nibbles(both), second = high_nibbles(both2);
                save_line(lines + 64, first);
                save_line(lines2 + 64, second);
                multiply_line(rows, a, b, first, second, x + rows);
                w += 64, w2 += 64;
            } else {
                multiply_line(rows, a, b, line(lines), line(lines2), x);
                multiply_line(rows, a, b, line(lines + 64), line(lines2 + 64), x + rows);
            }
            x += 2 * rows, lines += 128, lines2 += 128, next += step;
        } while ((count -= 2) > 0);
        for (int panel = 0; panel < 2; panel++) {
            const uint8_t *half = (panel ? head2 : head) + g % 2 * 32;
            float *to = block->scales[panel] + 16 * g, *to_low = block->lows[panel] + 16 * g;
            VF scale = floats(0), low = scale;
            if (kind != WIDE_BYTES)
                scale = unpacks ? halves(half) : load(to);
            if (kind == WIDE_LOWS)
                low = unpacks ? halves(half + 64) : load(to_low);
            if (unpacks)
                save(to, scale);
            if (unpacks && kind == WIDE_LOWS)
                save(to_low, low);
            add_group(rows, kind, panel ? b : a, scale, low, scales, (const float *)sums, totals + 16 * panel);
        }
    }
}

typedef void (*WideTile)(const Block *block, const uint32_t *x, const int32_t *sums, const float *scales, float *totals);

#define DEFINE_WIDE(ROWS, KIND, UNPACKS)                                                                                             \
    TARGET static void wide_##ROWS##_##KIND##_##UNPACKS(const Block *block, const uint32_t *x, const int32_t *sums,                  \
                                                        const float *scales, float *totals) {                                        \
        wide_tile(ROWS, KIND, UNPACKS, block, x, sums, scales, totals);                                                              \
    }
#define DEFINE_WIDES(KIND, UNPACKS)                                                                                                  \
    DEFINE_WIDE(6, KIND, UNPACKS)                                                                                                    \
    DEFINE_WIDE(7, KIND, UNPACKS)                                                                                                    \
    DEFINE_WIDE(8, KIND, UNPACKS)                                                                                                    \
    DEFINE_WIDE(9, KIND, UNPACKS)                                                                                                    \
    DEFINE_WIDE(10, KIND, UNPACKS)                                                                                                   \
    DEFINE_WIDE(11, KIND, UNPACKS)                                                                                                   \
    DEFINE_WIDE(12, KIND, UNPACKS)                                                                                                   \
    static const WideTile wide_##KIND##_##UNPACKS[] = {wide_6_##KIND##_##UNPACKS, wide_7_##KIND##_##UNPACKS,                         \
                                                       wide_8_##KIND##_##UNPACKS, wide_9_##KIND##_##UNPACKS,                         \
                                                       wide_10_##KIND##_##UNPACKS, wide_11_##KIND##_##UNPACKS,                       \
                                                       wide_12_##KIND##_##UNPACKS};
DEFINE_WIDES(WIDE_BYTES, 0)
DEFINE_WIDES(WIDE_SYMMETRIC, 0)
DEFINE_WIDES(WIDE_SYMMETRIC, 1)
DEFINE_WIDES(WIDE_LOWS, 0)
DEFINE_WIDES(WIDE_LOWS, 1)

/* By kind, and by whether the tile unpacks; entry i is for WIDE_MIN_ROWS + i rows. */
static const WideTile *const wide_tiles[WIDE_KINDS][2] = {{wide_WIDE_BYTES_0, wide_WIDE_BYTES_0},
                                                          {wide_WIDE_SYMMETRIC_0, wide_WIDE_SYMMETRIC_1},
                                                          {wide_WIDE_LOWS_0, wide_WIDE_LOWS_1}};

/* The panels [panel, end), an even number, for the tiles [tile, last) of `tiles` tiles of all rows. */
TARGET static void wide(const IntLinear *job, const Prepared *from, void *y, long rows, long tiles, long tile, long last, long panel,
                        long end) {
    _Alignas(64) float totals[WIDE_TILES * WIDE_ROWS * 32], scales[2][BLOCK_GROUPS * 16], lows[2][BLOCK_GROUPS * 16];
    _Alignas(64) uint8_t bytes[2][BLOCK_LINES * 64];
    long stride = (long)int_panel_bytes(job), words = (job->ins + 3) / 4, size = job->group;
    long block_bytes = job->bits == 8 ? BLOCK_LINES * 64 : BLOCK * 8 + BLOCK / size / 2 * (job->symmetric ? 64 : 128);
    int kind = job->bits == 8 ? WIDE_BYTES : job->symmetric ? WIDE_SYMMETRIC : WIDE_LOWS;
    long start = share(rows, tiles, tile), count = share(rows, tiles, last) - start;
    for (; panel < end; panel += 2) {
        const uint8_t *w = job->w + panel * stride;
        memset(totals, 0, (size_t)count * 32 * sizeof(float));
        for (long k = 0; k < words; k += BLOCK_LINES, w += block_bytes) {
            const uint8_t *next = k + BLOCK_LINES < words ? w + block_bytes : job->w + (panel + 2) * stride;
            Block block = {.w = {w, w + stride}, .lines = {bytes[0], bytes[1]}, .count = smaller(words - k, BLOCK_LINES)};
            block.group_lines = size / 4;
            for (int i = 0; i < 2; i++) {
                block.scales[i] = scales[i], block.lows[i] = lows[i];
                if (kind == WIDE_BYTES)
                    block.lines[i] = (uint8_t *)w + i * stride;
            }
            for (long i = tile; i < last; i++) {
                long first = share(rows, tiles, i), height = share(rows, tiles, i + 1) - first, at = k * 4 / size * height;
                block.next = i - tile < 2 ? next + (i - tile) * stride : block.lines[0];
                wide_tiles[kind][i == tile][height - WIDE_MIN_ROWS](
                    &block, (const uint32_t *)(from->x + first * from->row_bytes) + k * height, from->sums + first * from->groups + at,
                    from->scales + first * from->groups + at, totals + (first - start) * 32);
            }
        }
        for (int i = 0; i < 2; i++)
            finish_panel(job, totals + 16 * i, 32, y, start, count, panel + i);
    }
}
