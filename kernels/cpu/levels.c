#include "levels.h"

#include <stdlib.h>
#include <string.h>

int allowed_level(void) {
    static const char *const names[NUM_LEVELS] = {"plain", "avx2", "avx512", "amx"};
    const char *forced = getenv("PITLANE_CPU_KERNELS");
    for (int level = 0; forced && level < NUM_LEVELS; level++)
        if (strcmp(forced, names[level]) == 0)
            return level;
    return NUM_LEVELS - 1;
}
