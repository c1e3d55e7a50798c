#if defined(__x86_64__)
#include "internal.h"
const kt_kernels kt_kernels_avx2 = {.types = 0};
#endif
