#include "vectors.h"

#if defined(PITLANE_VECTORS)
#include "lanes_avx2.h"
#include "vectors_all.h"
#endif
