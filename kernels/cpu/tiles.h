/* AMX: eight tiles of up to 16 rows of up to 64 bytes, and the instructions that sum products of bfloat16 pairs and of bytes. */
#ifndef PITLANE_TILES_H
#define PITLANE_TILES_H

#include <stdint.h>

#if defined(EMULATED_TILES)
#include EMULATED_TILES
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define PITLANE_TILES

#define tiles_release() __asm__ volatile("tilerelease")
#define tile_zero(t) __asm__ volatile("tilezero %%tmm" #t ::)
#define tile_load(t, from, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(from), "r"((long)(stride)) : "memory")
#define tile_store(t, to, stride) __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(to), "r"((long)(stride)) : "memory")
#define tile_dot(sums, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sums ::) /* sums[m][n] += a[m][k] b[k][n] */
/* sums[m][n] += a[m][k] b[k][n], a of signed and b of unsigned bytes */
#define tile_dot_bytes(sums, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #sums ::)
#define tiles_configure(shapes) __asm__ volatile("ldtilecfg %0" : : "m"(*(shapes)))
#endif

/* The operand of `ldtilecfg`: rows and bytes per row of each tile; 0 for an unused tile. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileShapes;

#endif
