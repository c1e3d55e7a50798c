#if defined(__x86_64__)
#include "internal.h"
const kt_kernels kt_kernels_avx512_vnni = {.types = 0};
#endif
