/* AVX-512, whatever the compiler's own target: pool.c asks the processor before anything here is called. */
#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define ISA_AVX512
#define FN(name) name##_avx512
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
