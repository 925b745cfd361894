// The kernels for processors with AVX-512.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include <immintrin.h>
#define W 16
#define NAME(f) kanseg_##f##_avx512
#include "rows.h"
#include "winograd.h"
#include "direct.h"
#include "wavelet.h"
#endif
