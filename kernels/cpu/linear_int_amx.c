/* Tiles of linear_int.h by AMX's products of bytes, for many rows of quantized inputs. The other jobs go by AVX-512.
 *
 * A line of weights is a row of a tile: 16 outputs times 4 inputs. So a tile is 64 inputs of a panel, as they lie in memory, or the
 * same after its nibbles are unpacked. Inputs are rows of signed bytes: a row is prepared like a tile of one row. Two tiles of inputs
 * times two panels give four tiles of sums. The sums of a group are stored, and added to the totals as AVX-512's tiles add them. So
 * a row has the bits that it has there. */
#define _GNU_SOURCE
#include "linear_int_parts.h"
#include "tiles.h"

#if defined(PITLANE_TILES) && defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")))
enum { HEIGHT = 16, ROWS = 2 * HEIGHT, LINE = 64, BLOCK = 512, BLOCK_LINES = BLOCK / 4, BLOCK_GROUPS = BLOCK / 32 };

static long smaller(long a, long b) { return a < b ? a : b; }

static void prepare(const IntLinear *job, const Prepared *to, const void *x, long first, long count) {
    for (long row = first; row < first + count; row++)
        int_avx512.prepare(job, to, x, row, 1);
}

/* Set the shapes of the tiles for some rows and inputs. Sums: tiles 0 and 1 for the upper rows, 2 and 3 for the lower. Inputs: 4, 5.
 * Weights: 6, 7. The object is volatile because gcc 12 takes the operand of its own intrinsic for 8 bytes and drops the other stores. */
static void configure(long count, long inputs) {
    volatile TileShapes shapes = {.palette = 1};
    long upper = smaller(count, HEIGHT);
    for (int tile = 0; tile < 8; tile++) {
        long rows = tile > 5 ? inputs / 4 : tile < 2 || tile == 4 ? upper : count - upper;
        shapes.rows[tile] = (uint8_t)rows;
        shapes.bytes[tile] = (uint16_t)(!rows ? 0 : tile == 4 || tile == 5 ? inputs : LINE);
    }
    tiles_configure(&shapes);
}

/* Two panels of a block of inputs. lines: bytes. scales, lows: of groups of nibbles, [groups][16]. */
typedef struct {
    const uint8_t *lines[2];
    float scales[2][BLOCK_GROUPS * INT_PANEL], lows[2][BLOCK_GROUPS * INT_PANEL];
} Block;

/* Write the nibbles of some groups as lines of bytes, and their scales and lows as floats. */
TARGET static void unpack(const IntLinear *job, const uint8_t *w, long groups, uint8_t *lines, float *scales, float *lows) {
    const __m512i mask = _mm512_set1_epi8(15);
    const uint8_t *header = w;
    for (long g = 0; g < groups; g++, scales += INT_PANEL, lows += INT_PANEL) {
        if (g % 2 == 0)
            header = w, w += job->symmetric ? LINE : 2 * LINE;
        const __m256i *halves = (const __m256i *)(header + g % 2 * 32);
        _mm512_storeu_ps(scales, _mm512_cvtph_ps(_mm256_loadu_si256(halves)));
        if (!job->symmetric)
            _mm512_storeu_ps(lows, _mm512_cvtph_ps(_mm256_loadu_si256(halves + 2)));
        for (long i = 0; i < job->group / 8; i++, w += LINE, lines += 2 * LINE) {
            __m512i both = _mm512_loadu_si512(w);
            _mm512_storeu_si512(lines, _mm512_and_si512(both, mask));
            _mm512_storeu_si512(lines + LINE, _mm512_and_si512(_mm512_srli_epi32(both, 4), mask));
        }
    }
}

/* sums [4][16][16] = the products of a group: up to 32 rows of x, `stride` bytes apart, times two panels. */
static void multiply(const int8_t *x, long stride, long count, const uint8_t *w, const uint8_t *w2, long group, int32_t *sums) {
    long step = smaller(group, LINE);
    int both = count > HEIGHT;
    tile_zero(0);
    tile_zero(1);
    if (both) {
        tile_zero(2);
        tile_zero(3);
    }
    for (long k = 0; k < group; k += step) {
        tile_load(4, x + k, stride);
        tile_load(6, w + k * INT_PANEL, LINE);
        tile_load(7, w2 + k * INT_PANEL, LINE);
        tile_dot_bytes(0, 4, 6);
        tile_dot_bytes(1, 4, 7);
        if (both) {
            tile_load(5, x + HEIGHT * stride + k, stride);
            tile_dot_bytes(2, 5, 6);
            tile_dot_bytes(3, 5, 7);
        }
    }
    tile_store(0, sums, LINE);
    tile_store(1, sums + 256, LINE);
    if (both) {
        tile_store(2, sums + 512, LINE);
        tile_store(3, sums + 768, LINE);
    }
}

/* Add the sums of group g of the inputs, `of_block` of the block, to totals [count][2][16]. */
TARGET static void add_group(const IntLinear *job, const Prepared *from, long first, long count, long g, const Block *block,
                             long of_block, const int32_t *sums, float *totals) {
    int nibbles = job->bits == 4, lows = nibbles && !job->symmetric;
    for (int panel = 0; panel < 2; panel++) {
        __m512 scale = _mm512_loadu_ps(block->scales[panel] + of_block * INT_PANEL);
        __m512 low = _mm512_loadu_ps(block->lows[panel] + of_block * INT_PANEL);
        for (long m = 0; m < count; m++) {
            long at = (first + m) * from->groups + g;
            float *total = totals + (2 * m + panel) * INT_PANEL;
            __m512i acc = _mm512_loadu_si512(sums + m / HEIGHT * 512 + panel * 256 + m % HEIGHT * INT_PANEL);
            __m512 sum = _mm512_cvtepi32_ps(lows ? acc : _mm512_add_epi32(acc, _mm512_set1_epi32(from->sums[at])));
            if (nibbles)
                sum = _mm512_mul_ps(sum, scale);
            sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(from->scales[at]), _mm512_loadu_ps(total));
            if (lows)
                sum = _mm512_fmadd_ps(low, _mm512_set1_ps(((const float *)from->sums)[at]), sum);
            _mm512_storeu_ps(total, sum);
        }
    }
}

/* The panels [panel, end) for the rows [first, first + count), at most WIDE_TILES * ROWS. */
static void panels(const IntLinear *job, const Prepared *from, void *y, long first, long count, long panel, long end) {
    _Alignas(64) float totals[WIDE_TILES * ROWS * 2 * INT_PANEL];
    _Alignas(64) uint8_t bytes[2][BLOCK_LINES * LINE];
    _Alignas(64) int32_t sums[4 * 256] = {0};
    Block block = {.scales = {{0}}, .lows = {{0}}};
    long stride = (long)int_panel_bytes(job), size = job->group, configured = 0;
    for (; panel < end; panel += 2) {
        long second = panel + 1 < end; /* an odd last panel is multiplied twice */
        const uint8_t *w = job->w + panel * stride;
        memset(totals, 0, (size_t)count * 2 * INT_PANEL * sizeof(float));
        for (long k = 0; k < job->ins; k += BLOCK) {
            long inputs = smaller(job->ins - k, BLOCK);
            for (int i = 0; i < 2; i++) {
                const uint8_t *packed = w + i * second * stride;
                block.lines[i] = job->bits == 8 ? packed : bytes[i];
                if (job->bits == 4)
                    unpack(job, packed, inputs / size, bytes[i], block.scales[i], block.lows[i]);
            }
            for (long row = 0; row < count; row += ROWS) {
                long rows = smaller(count - row, ROWS);
                const int8_t *x = (const int8_t *)from->x + (first + row) * from->row_bytes + k;
                if (rows != configured)
                    configure(configured = rows, smaller(size, LINE));
                for (long g = 0; g < inputs / size; g++) {
                    long at = g * size;
                    multiply(x + at, from->row_bytes, rows, block.lines[0] + at * INT_PANEL, block.lines[1] + at * INT_PANEL, size,
                             sums);
                    add_group(job, from, first + row, rows, k / size + g, &block, g, sums, totals + row * 2 * INT_PANEL);
                }
            }
            w += job->bits == 8 ? BLOCK_LINES * LINE : BLOCK * 8 + BLOCK / size / 2 * (job->symmetric ? LINE : 2 * LINE);
        }
        for (int i = 0; i <= second; i++)
            int_finish_panel(job, totals + i * INT_PANEL, 2 * INT_PANEL, y, first, count, panel + i);
    }
    tiles_release();
}

static void wide(const IntLinear *job, const Prepared *from, void *y, long rows, long tiles, long tile, long last, long panel,
                 long end) {
    long first = share(rows, tiles, tile);
    panels(job, from, y, first, share(rows, tiles, last) - first, panel, end);
}

int int_amx_serves(const IntLinear *job, long rows) { return rows >= HEIGHT && job->quantized && job->ins % job->group == 0; }

const IntLevel int_amx = {ROWS, prepare, panels, wide};

#else

int int_amx_serves(const IntLinear *job, long rows) { return (void)job, (void)rows, 0; }

#endif
