// The kernels for every processor, four numbers at a time.
#define W 4
#define NAME(f) kanseg_##f##_plain
#include "rows.h"
#include "winograd.h"
#include "direct.h"
#include "wavelet.h"

extern "C" {
void (*kanseg_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
int (*kanseg_thread)(void) = nullptr;
int (*kanseg_threads)(void) = nullptr;

void kanseg_use_threads(void* parallel, void* thread, void* threads) {
  kanseg_parallel = (void (*)(void (*)(void*), void*, unsigned, unsigned))parallel;
  kanseg_thread = (int (*)(void))thread;
  kanseg_threads = (int (*)(void))threads;
}

// Which version of the functions this is; the same in Python, which leaves another version alone.
int kanseg_interface(void) { return 4; }

// The best instruction set here: 2 AVX-512, 1 AVX2, 0 any.
int kanseg_instruction_set(void) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}
}
