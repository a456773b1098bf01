/* AMX's tiles in C, after Intel's manual, for CPUs without AMX. A wrong shape ends the process, as the hardware does. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PITLANE_TILES

static __thread struct {
    unsigned char shapes[64];
    int configured;
    float data[8][16][16];
} tiles;

static long rows_of(int tile) { return tiles.shapes[48 + tile]; }
static long bytes_of(int tile) { return tiles.shapes[16 + 2 * tile]; }
static void demand(int holds) {
    if (!holds)
        abort();
}

static void emulated_configure(const void *shapes) {
    memset(&tiles, 0, sizeof tiles);
    memcpy(tiles.shapes, shapes, sizeof tiles.shapes);
    tiles.configured = 1;
    demand(tiles.shapes[0] == 1);
    for (int tile = 0; tile < 16; tile++)
        demand(rows_of(tile) <= (tile < 8 ? 16 : 0) && bytes_of(tile) <= 64 && !rows_of(tile) == !bytes_of(tile));
}

static void emulated_release(void) {
    demand(tiles.configured);
    memset(&tiles, 0, sizeof tiles);
}

static void emulated_zero(int tile) {
    demand(rows_of(tile) > 0);
    memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

static void emulated_load(int tile, const char *from, long stride) {
    emulated_zero(tile);
    for (long row = 0; row < rows_of(tile); row++)
        memcpy(tiles.data[tile][row], from + row * stride, bytes_of(tile));
}

static void emulated_store(int tile, char *to, long stride) {
    demand(rows_of(tile) > 0);
    for (long row = 0; row < rows_of(tile); row++)
        memcpy(to + row * stride, tiles.data[tile][row], bytes_of(tile));
}

static inline float half_of(const float *pairs, int half) {
    unsigned bits;
    float value;
    memcpy(&bits, pairs, 4);
    bits = half ? bits & 0xffff0000u : bits << 16;
    memcpy(&value, &bits, 4);
    return value;
}

static inline void emulated_dot(int sums, int a, int b) {
    demand(rows_of(sums) > 0 && rows_of(sums) == rows_of(a) && bytes_of(sums) == bytes_of(b) && bytes_of(a) == 4 * rows_of(b));
    for (long m = 0; m < rows_of(sums); m++)
        for (long n = 0; n < bytes_of(sums) / 4; n++) {
            float of_half[2] = {0, 0};
            for (long k = 0; k < rows_of(b); k++)
                for (int half = 0; half < 2; half++)
                    of_half[half] = fmaf(half_of(&tiles.data[a][m][k], half), half_of(&tiles.data[b][k][n], half), of_half[half]);
            tiles.data[sums][m][n] += of_half[0] + of_half[1];
        }
}

/* a: signed bytes, b: unsigned bytes; the sums are of int32. */
static inline void emulated_dot_bytes(int sums, int a, int b) {
    demand(rows_of(sums) > 0 && rows_of(sums) == rows_of(a) && bytes_of(sums) == bytes_of(b) && bytes_of(a) == 4 * rows_of(b));
    for (long m = 0; m < rows_of(sums); m++)
        for (long n = 0; n < bytes_of(sums) / 4; n++) {
            int sum;
            memcpy(&sum, &tiles.data[sums][m][n], 4);
            for (long k = 0; k < rows_of(b); k++)
                for (int i = 0; i < 4; i++)
                    sum += ((const signed char *)tiles.data[a][m])[4 * k + i] * ((const unsigned char *)tiles.data[b][k])[4 * n + i];
            memcpy(&tiles.data[sums][m][n], &sum, 4);
        }
}

#define tiles_configure(shapes) emulated_configure((const void *)(shapes))
#define tile_dot_bytes(sums, a, b) emulated_dot_bytes(sums, a, b)
#define tiles_release() emulated_release()
#define tile_zero(t) emulated_zero(t)
#define tile_load(t, from, stride) emulated_load(t, (const char *)(from), (long)(stride))
#define tile_store(t, to, stride) emulated_store(t, (char *)(to), (long)(stride))
#define tile_dot(sums, a, b) emulated_dot(sums, a, b)
