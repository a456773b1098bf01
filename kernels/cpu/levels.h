/* The sets of instructions that the kernels are compiled for. kernels/extension.py has their names. */
#ifndef PITLANE_LEVELS_H
#define PITLANE_LEVELS_H

enum { LEVEL_PLAIN, LEVEL_AVX2, LEVEL_AVX512, LEVEL_AMX, NUM_LEVELS };

/* The highest level that the environment variable PITLANE_CPU_KERNELS allows. Call it where no other thread can change the environment:
 * with Python's lock, or once for a job. */
int allowed_level(void);

#endif
