#include "vectors.h"

#if defined(PITLANE_VECTORS)
#include "lanes_avx512.h"
#include "vectors_all.h"
#endif
