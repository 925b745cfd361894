// The kernels for processors with AVX2 and FMA.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>
#define W 8
#define NAME(f) kanseg_##f##_avx2
#include "rows.h"
#include "winograd.h"
#include "direct.h"
#include "wavelet.h"
#endif
