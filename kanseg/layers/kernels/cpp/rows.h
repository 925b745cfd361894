// Expansions, their gradients, and normalisation with activation over rows (voxels, channels) of float32.
//
// Included once for each instruction set with W, the number of lanes, and NAME(f), the exported name of f. Nothing of
// the C++ library is used, so that no inline function compiled for one instruction set can serve another.

typedef float V __attribute__((vector_size(4 * W)));
typedef int I __attribute__((vector_size(4 * W)));
typedef long long Size;

extern "C" {
// Of the OpenMP library that torch computes with, so that one set of threads serves both; null: one thread.
extern void (*kanseg_parallel)(void (*)(void*), void*, unsigned, unsigned);
extern int (*kanseg_thread)(void);
extern int (*kanseg_threads)(void);
}

#define INLINE static inline __attribute__((always_inline))

namespace {

// Call work(start, stop, thread) on as many threads as are wanted, each with its share of the rows.
template <class Work>
void share_out(Size rows, int threads, Work work) {
  if (threads < 2 || !kanseg_parallel) return work((Size)0, rows, 0);
  struct Job {
    Work* work;
    Size rows;
  } job = {&work, rows};
  kanseg_parallel(
      [](void* given) {
        Job* job = (Job*)given;
        const int count = kanseg_threads(), own = kanseg_thread();
        const Size each = (job->rows + count - 1) / count;
        const Size start = own * each, stop = start + each < job->rows ? start + each : job->rows;
        if (start < stop) (*job->work)(start, stop, own);
      },
      &job, (unsigned)threads, 0);
}

// ---------------------------------------------------------------------------------------------- numbers

INLINE V set(float value) { return value - V{}; }  // not V{} + value: adding zero is an instruction

INLINE V load(const float* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

INLINE void store(float* to, V v) { __builtin_memcpy(to, &v, sizeof(V)); }

// The first `count` lanes alone are read or written, count > 0; the others are zero.
#if W == 16
INLINE __mmask16 first_lanes(int count) { return (__mmask16)((1u << count) - 1); }
INLINE V load_lanes(const float* from, int count) { return (V)_mm512_maskz_loadu_ps(first_lanes(count), from); }
INLINE void store_lanes(float* to, V v, int count) { _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)v); }
#elif W == 8
INLINE __m256i first_lanes(int count) { return (__m256i)(I{0, 1, 2, 3, 4, 5, 6, 7} < count); }
INLINE V load_lanes(const float* from, int count) { return (V)_mm256_maskload_ps(from, first_lanes(count)); }
INLINE void store_lanes(float* to, V v, int count) { _mm256_maskstore_ps(to, first_lanes(count), (__m256)v); }
#else
INLINE V load_lanes(const float* from, int count) {
  float lanes[W] = {};
  for (int i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}

INLINE void store_lanes(float* to, V v, int count) {
  float lanes[W];
  store(lanes, v);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
}
#endif

INLINE V load_some(const float* from, int count) { return count >= W ? load(from) : load_lanes(from, count); }

INLINE void store_some(float* to, V v, int count) {
  if (count >= W) return store(to, v);
  store_lanes(to, v, count);
}

// Not a number stays so where it is the first of the two.
#if W == 16
INLINE V larger(V a, V b) { return (V)_mm512_max_ps((__m512)b, (__m512)a); }
INLINE V smaller(V a, V b) { return (V)_mm512_min_ps((__m512)b, (__m512)a); }
#elif W == 8
INLINE V larger(V a, V b) { return (V)_mm256_max_ps((__m256)b, (__m256)a); }
INLINE V smaller(V a, V b) { return (V)_mm256_min_ps((__m256)b, (__m256)a); }
#else
INLINE V larger(V a, V b) { return a < b ? b : a; }
INLINE V smaller(V a, V b) { return a > b ? b : a; }
#endif
INLINE V positive(V a) { return larger(a, V{}); }

INLINE float total(V v) {
#if W == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lanes[W], sum = 0;
  store(lanes, v);
  for (int i = 0; i < W; ++i) sum += lanes[i];
  return sum;
#endif
}

// exp(x) = 2^n 2^r, n whole and |r| <= 1/2: the best polynomial of degree 6 in r, relative error 2e-7.
INLINE V exponential(V x) {
  x = smaller(larger(x, set(-87.0f)), set(88.0f));
#if W == 16
  V n = (V)_mm512_roundscale_ps((__m512)(x * 1.44269502f), 8);  // to the next whole number, without exceptions
#else
  const V shift = set(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  V n = (x * 1.44269502f + shift) - shift;
#endif
  V r = (x * 1.44269502f - n) + x * 1.92596303e-8f;
  const V square = r * r;  // by pairs, so that fewer steps wait for one another
  V low = (1.0f + 0.6931472057f * r) + square * (0.2402264689f + 0.05550328777f * r);
  V high = (0.009618488957f + 0.001339993122f * r) + square * 0.0001534581202f;
  V p = low + square * square * high;
#if W == 16
  return (V)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  I power = (__builtin_convertvector(n, I) + 127) << 23;
  return p * (V)power;
#endif
}

// 1 / x: the processor's estimate and a step of Newton's method, relative error 2e-7; x is at most 2^126.
INLINE V reciprocal(V x) {
#if W == 16
  const V estimate = (V)_mm512_rcp14_ps((__m512)x);
#elif W == 8
  const V estimate = (V)_mm256_rcp_ps((__m256)x);
#else
  return 1.0f / x;
#endif
#if W > 4
  return estimate * (2.0f - x * estimate);
#endif
}

INLINE V sigmoid(V x) { return reciprocal(1.0f + exponential(-x)); }

// sigmoid(x) for |x| <= 2: an odd polynomial about a half, absolute error 1e-8.
const float TAME_REACH = 2;

INLINE V tame_sigmoid(V x) {
  const V square = x * x;
  V p = square * 5.8823986e-08f - 1.45294934e-06f;
  p = p * square + 1.95051589e-05f;
  p = p * square - 0.000208069669f;
  p = p * square + 0.00208118495f;
  p = p * square - 0.0208325808f;
  p = p * square + 0.249999923f;
  return 0.5f + x * p;
}

// sigmoid and tanh of x from one exponential; beyond 43 they do not change.
INLINE void sigmoid_and_tanh(V x, V* gate, V* t) {
  const V e = exponential(smaller(larger(-x, set(-43.0f)), set(43.0f)));
  *gate = reciprocal(1.0f + e);
  *t = 2.0f * reciprocal(1.0f + e * e) - 1.0f;
}

// erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7; `gauss` is exp(-x^2).
INLINE V error_function(V x, V gauss) {
  V distance = larger(x, -x);
  V t = reciprocal(1.0f + 0.3275911f * distance);
  V p = set(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  V value = 1.0f - p * t * gauss;
  return x < V{} ? -value : value;
}

// ---------------------------------------------------------------------------------------------- waves

// sin(x) and cos(x) for |x| < WAVES_REACH: x = n pi + r, the best odd and even polynomials in r, and the sign of (-1)^n;
// absolute error 1e-7. pi is taken away in three parts of few digits, which serves until n has too many.
const float WAVES_REACH = 25000;

INLINE void tame_sine_and_cosine(V x, V* s, V* c) {
  const V shift = set(12582912.0f), whole = x * 0.318309886f + shift, n = whole - shift;
  const V r = ((x - n * 3.140625f) - n * 9.67502594e-4f) - n * 1.50995799e-7f, square = r * r;
  V p = square * 2.60005418e-6f - 1.98066149e-4f;
  p = p * square + 8.33301729e-3f;
  p = p * square - 0.166666571f;
  V q = 2.47618861e-5f - square * 2.60771024e-7f;
  q = q * square - 1.38884035e-3f;
  q = q * square + 4.16666407e-2f;
  q = q * square - 0.499999995f;
  const I sign = (I)whole << 31;
  *s = (V)((I)(r + r * square * p) ^ sign);
  *c = (V)((I)(1.0f + square * q) ^ sign);
}

// Of any number, those that are not finite too.
INLINE void sine_and_cosine(V x, V* s, V* c) {
  tame_sine_and_cosine(x, s, c);
  for (int i = 0; i < W; ++i) {
    if (__builtin_expect(x[i] > -WAVES_REACH && x[i] < WAVES_REACH, 1)) continue;
    (*s)[i] = __builtin_sinf(x[i]);
    (*c)[i] = __builtin_cosf(x[i]);
  }
}

enum { MEXICAN_HAT = 0, MORLET = 1, DOG = 2 };

// exp(-z^2 / 2), absolute error 2e-7.
INLINE V gaussian(V z) {
  const V y = larger(z * z * -0.72134752f, set(-126.0f)), shift = set(12582912.0f);
  const V whole = y + shift, r = y - (whole - shift), square = r * r;
  const V low = (1.0f + r * 0.69314718f) + square * (0.24022651f + r * 0.05550411f);
  const V high = 0.009618129f + r * 0.0013333558f + square * 0.00015403530f;
  return (V)((I)(low + square * square * high) + ((I)whole << 23));
}

template <int KIND>
INLINE V wavelet(V z) {
  const V g = gaussian(z);
  if (KIND == MEXICAN_HAT) return (0.86732507f - 0.86732507f * z * z) * g;
  if (KIND == DOG) return -z * g;
  V s, c;
  tame_sine_and_cosine(5.0f * z, &s, &c);
  return c * g;
}

template <int KIND>
INLINE V wavelet_slope(V z) {
  const V g = gaussian(z), square = z * z;
  if (KIND == MEXICAN_HAT) return 0.86732507f * z * (square - 3.0f) * g;
  if (KIND == DOG) return (square - 1.0f) * g;
  V s, c;
  tame_sine_and_cosine(5.0f * z, &s, &c);
  return (-5.0f * s - z * c) * g;
}

// ---------------------------------------------------------------------------------------------- activations

enum { IDENTITY = 0, SILU = 1, GELU = 2, RELU = 3, PRELU = 4 };  // PRELU with a slope a channel, below zero

template <int ACT>
INLINE V activate(V x, V below = V{}) {
  if (ACT == PRELU) return x > V{} ? x : below * x;
  if (ACT == SILU) return x * sigmoid(x);
  if (ACT == RELU) return positive(x);
  if (ACT == GELU) {
    return 0.5f * x * (1.0f + error_function(x * 0.70710678f, exponential(-0.5f * x * x)));
  }
  return x;
}

INLINE V silu_slope(V x, V gate) { return gate * (1.0f + x * (1.0f - gate)); }

template <int ACT>
INLINE V slope(V x, V below = V{}) {
  if (ACT == PRELU) return x > V{} ? set(1.0f) : below;
  if (ACT == SILU) return silu_slope(x, sigmoid(x));
  if (ACT == RELU) return x > V{} ? set(1.0f) : V{};
  if (ACT == GELU) {
    V gauss = exponential(-0.5f * x * x);
    return 0.5f * (1.0f + error_function(x * 0.70710678f, gauss)) + x * gauss * 0.39894228f;
  }
  return set(1.0f);
}

INLINE V activated(int act, V x) {
  return act == SILU ? activate<SILU>(x) : act == GELU ? activate<GELU>(x) : act == RELU ? activate<RELU>(x) : x;
}

INLINE V slope_of(int act, V x) {
  return act == SILU ? slope<SILU>(x) : act == GELU ? slope<GELU>(x) : act == RELU ? slope<RELU>(x) : set(1.0f);
}

// ---------------------------------------------------------------------------------------------- expansions

enum { NONE, POLYNOMIAL, BERNSTEIN, BSPLINE, RBF, BUMPS, FOURIER, RATIONAL, WAVELET };
enum { SQUASH_IDENTITY = 0, SQUASH_TANH = 1, SQUASH_SIGMOID = 2 };
const int MOST = 33;  // functions at most

}  // namespace

// What one layer expands its input in; the same in Python.
struct Expansion {
  int kind, functions, skip, base, act, squash, order, channels;
  int branches, offset;  // of the buffer: how many there are, and the first of these
  int shared;            // whether the one branch is a sum of the functions, with the factors `low`
  const float* numbers;  // polynomial: a, b, c of each degree from 1; others: centres, then 1 / spacing
  const float* low;      // bumps, factors: (functions, channels); rational: coefficients of P and Q, (order, channels)
  const float* high;
};

namespace {

INLINE V squashed(const Expansion& e, V x) {
  if (e.squash == SQUASH_TANH) return 2.0f * sigmoid(2.0f * x) - 1.0f;
  if (e.squash == SQUASH_SIGMOID) return sigmoid(x);
  return x;
}

INLINE V squash_slope(const Expansion& e, V t) {
  if (e.squash == SQUASH_TANH) return 1.0f - t * t;
  if (e.squash == SQUASH_SIGMOID) return t * (1.0f - t);
  return set(1.0f);
}

// Rows of `low` and of `high`.
INLINE int sets(const Expansion& e) { return e.kind == RATIONAL ? e.order : e.functions; }

// sum of coefficients[k][channel] t^k, and its derivative.
INLINE V horner(const Expansion& e, const float* coefficients, V t, int channel, int count, V* slope) {
  V value = V{};
  *slope = V{};
  for (int k = e.order - 1; k >= 0; --k) {
    *slope = *slope * t + value;
    value = value * t + load_some(coefficients + (Size)k * e.channels + channel, count);
  }
  return value;
}

INLINE V any_wavelet(int which, V z) {
  return which == MEXICAN_HAT ? wavelet<MEXICAN_HAT>(z) : which == MORLET ? wavelet<MORLET>(z) : wavelet<DOG>(z);
}

INLINE V any_wavelet_slope(int which, V z) {
  return which == MEXICAN_HAT ? wavelet_slope<MEXICAN_HAT>(z)
         : which == MORLET    ? wavelet_slope<MORLET>(z)
                              : wavelet_slope<DOG>(z);
}

INLINE float binomial(int n, int k) {
  float value = 1;
  for (int i = 1; i <= k; ++i) value = value * (float)(n - k + i) / (float)i;
  return value;
}

INLINE V power(V base, int exponent) {
  V value = set(1.0f);
  for (int i = 0; i < exponent; ++i) value = value * base;
  return value;
}

// Cardinal B-spline of an order, and its derivative: an alternating sum of truncated powers of |v|.
INLINE V spline(V v, int order) {
  V distance = larger(v, -v), sum = V{};
  const float half = 0.5f * (float)(order + 1);
  float factor = 1;
  for (int i = 2; i <= order; ++i) factor /= (float)i;
  for (int j = 0; (float)j < half; ++j) {
    float weight = (j % 2 ? -1.0f : 1.0f) * binomial(order + 1, j) * factor;
    sum += weight * power(positive(half - (float)j - distance), order);
  }
  return sum;
}

INLINE V spline_slope(V v, int order) {
  V distance = larger(v, -v), sum = V{};
  const float half = 0.5f * (float)(order + 1);
  float factor = (float)order;
  for (int i = 2; i <= order; ++i) factor /= (float)i;
  for (int j = 0; (float)j < half; ++j) {
    float weight = (j % 2 ? -1.0f : 1.0f) * binomial(order + 1, j) * factor;
    V reach = half - (float)j - distance;
    sum += weight * (reach > V{} ? power(reach, order - 1) : V{});
  }
  return v > V{} ? -sum : sum;
}

// Numbers of functions, and the order of the splines, that are known when this is compiled: what most layers have.
template <int KIND>
constexpr int usual() {
  return KIND == NONE ? 0 : KIND == RATIONAL ? 1 : KIND == FOURIER ? 5 : KIND == POLYNOMIAL || KIND == BERNSTEIN ? 4 : 8;
}
const int USUAL_ORDER = 3;

template <int KIND>
INLINE bool is_usual(const Expansion& e) {
  return e.functions == usual<KIND>() && (KIND != BSPLINE || e.order == USUAL_ORDER);
}

// f[0 ... functions - 1] at x; t is what the squash made of it. K: how many there are.
template <int KIND, bool USUAL>
INLINE void evaluate(const Expansion& e, V t, int channel, int count, V* f) {
  const int K = USUAL ? usual<KIND>() : e.functions, order = USUAL ? USUAL_ORDER : e.order;
  if (KIND == POLYNOMIAL) {
    f[0] = set(1.0f);
    for (int n = 1; n < K; ++n) {
      const float* c = e.numbers + 3 * (n - 1);
      V step = (c[0] * t + c[1]) * f[n - 1];
      f[n] = n > 1 ? step - c[2] * f[n - 2] : step;
    }
  }
  if (KIND == BERNSTEIN) {
    V rest = 1.0f - t;
    for (int k = 0; k < K; ++k) f[k] = e.numbers[k] * power(t, k) * power(rest, K - 1 - k);
  }
  if (KIND == BSPLINE) {
    for (int k = 0; k < K; ++k) f[k] = spline((t - e.numbers[k]) * e.numbers[K], order);
  }
  if (KIND == RBF) {
    for (int k = 0; k < K; ++k) {
      V u = (t - e.numbers[k]) * e.numbers[K];
      f[k] = exponential(-u * u);
    }
  }
  if (KIND == BUMPS) {
    for (int k = 0; k < K; ++k) {
      V low = load_some(e.low + (Size)k * e.channels + channel, count);
      V high = load_some(e.high + (Size)k * e.channels + channel, count);
      V bump = positive(t - low) * positive(high - t) * e.numbers[0];
      f[k] = bump * bump;
    }
  }
  if (KIND == FOURIER) {
    f[0] = set(1.0f);
    if (K > 1) sine_and_cosine(t, f + 2, f + 1);
    for (int k = 3; k < K; k += 2) {
      f[k] = 2.0f * f[1] * f[k - 2] - (k > 3 ? f[k - 4] : set(1.0f));
      f[k + 1] = k > 3 ? 2.0f * f[1] * f[k - 1] - f[k - 3] : 2.0f * f[1] * f[k - 1];
    }
  }
  if (KIND == RATIONAL) {
    V unused;
    const V top = horner(e, e.low, t, channel, count, &unused), below = t * horner(e, e.high, t, channel, count, &unused);
    f[0] = top / (1.0f + larger(below, -below));
  }
  if (KIND == WAVELET) {
    for (int k = 0; k < K; ++k) f[k] = any_wavelet(e.order, (t - e.numbers[k]) * e.numbers[K]);
  }
}

// Sums over voxels that gradients of learned numbers are, of one thread: float32 for some thousands of voxels, then
// float64. `phases` has those of `low` and of `high`, (2, sets, channels); each may be null.
struct Sums {
  V inner[MOST];
  double* inner_total;
  float* phases;
  double* phases_total;
};

const Size BLOCK = 1 << 14;  // rows summed in float32

INLINE Sums no_sums(double* inner, float* phases, double* phases_total) {
  Sums sums;
  for (int k = 0; k < MOST; ++k) sums.inner[k] = V{};
  sums.inner_total = inner;
  sums.phases = phases;
  sums.phases_total = phases_total;
  return sums;
}

void to_double(const Expansion& e, Sums& sums) {
  for (int k = 0; sums.inner_total && k < e.functions; ++k) {
    sums.inner_total[k] += total(sums.inner[k]);
    sums.inner[k] = V{};
  }
  const Size count = 2 * (Size)sets(e) * e.channels;
  for (Size i = 0; sums.phases && i < count; ++i) {
    sums.phases_total[i] += sums.phases[i];
    sums.phases[i] = 0;
  }
}

// The gradient at t from those at the functions (g is used up); adds to `inner` those of c (polynomial), to `low` and
// `high` those of the phases (bumps) or coefficients (rational).
template <int KIND, bool USUAL>
INLINE V lead_back(const Expansion& e, V t, int channel, int count, const V* f, V* g, V* inner, float* low, float* high) {
  const int K = USUAL ? usual<KIND>() : e.functions, order = USUAL ? USUAL_ORDER : e.order;
  V at = V{};
  if (KIND == POLYNOMIAL) {
    for (int n = K - 1; n >= 1; --n) {
      const float* c = e.numbers + 3 * (n - 1);
      at += c[0] * f[n - 1] * g[n];
      g[n - 1] += (c[0] * t + c[1]) * g[n];
      if (n > 1) {
        g[n - 2] -= c[2] * g[n];
        inner[n] -= f[n - 2] * g[n];
      }
    }
  }
  if (KIND == BERNSTEIN) {
    V rest = 1.0f - t;
    for (int k = 0; k < K - 1; ++k) {
      V lower = binomial(K - 2, k) * power(t, k) * power(rest, K - 2 - k);
      at += (float)(K - 1) * lower * (g[k + 1] - g[k]);
    }
  }
  if (KIND == BSPLINE) {
    for (int k = 0; k < K; ++k) at += g[k] * spline_slope((t - e.numbers[k]) * e.numbers[K], order);
    at *= e.numbers[K];
  }
  if (KIND == RBF) {
    for (int k = 0; k < K; ++k) at -= g[k] * f[k] * (t - e.numbers[k]);
    at *= 2.0f * e.numbers[K] * e.numbers[K];
  }
  if (KIND == BUMPS) {
    const float scale = 2.0f * e.numbers[0] * e.numbers[0];
    for (int k = 0; k < K; ++k) {
      const Size place = (Size)k * e.channels + channel;
      V a = positive(t - load_some(e.low + place, count));
      V b = positive(load_some(e.high + place, count) - t);
      V both = scale * a * b * g[k];
      at += both * (b - a);
      if (low) {
        store_some(low + place, load_some(low + place, count) - both * b, count);
        store_some(high + place, load_some(high + place, count) + both * a, count);
      }
    }
  }
  if (KIND == FOURIER) {
    for (int k = 1; k < K; k += 2) at += (float)(k / 2 + 1) * (g[k + 1] * f[k] - g[k] * f[k + 1]);
  }
  if (KIND == RATIONAL) {
    V rising, bending;
    const V top = horner(e, e.low, t, channel, count, &rising), q = horner(e, e.high, t, channel, count, &bending);
    const V below = t * q, sign = below > V{} ? set(1.0f) : below < V{} ? set(-1.0f) : V{};
    const V each = g[0] / (1.0f + sign * below);  // the gradient at P
    at += each * (rising - f[0] * sign * (q + t * bending));
    V of_top = each, of_below = -f[0] * sign * t * each;
    for (int k = 0; low && k < e.order; ++k) {
      const Size place = (Size)k * e.channels + channel;
      store_some(low + place, load_some(low + place, count) + of_top, count);
      store_some(high + place, load_some(high + place, count) + of_below, count);
      of_top *= t;
      of_below *= t;
    }
  }
  if (KIND == WAVELET) {
    for (int k = 0; k < K; ++k) at += g[k] * any_wavelet_slope(e.order, (t - e.numbers[k]) * e.numbers[K]);
    at *= e.numbers[K];
  }
  return at;
}

const int TOGETHER = 4;  // vectors; each step is done for all of them, so that none waits for its own last step

// Whether polynomials with SiLU have values that `tame_sigmoid` serves, whatever the input.
INLINE bool is_tame(const Expansion& e) {
  float before = 0, bound = 1, greatest = 1;
  for (int n = 1; n < e.functions; ++n) {
    const float* c = e.numbers + 3 * (n - 1);
    const float next = (__builtin_fabsf(c[0]) + __builtin_fabsf(c[1])) * bound + __builtin_fabsf(c[2]) * before;
    before = bound;
    bound = next;
    if (!(bound <= greatest)) greatest = bound;
  }
  return e.act == SILU && !e.shared && e.squash != SQUASH_IDENTITY && greatest <= TAME_REACH;
}

// The place of one vector: its row, its first channel within the group, and how many lanes of it there are.
struct Lanes {
  Size row;
  int channel, count;
};

// `step` floats lie between two rows of the input: `width` of a group, or more of a voxel of which some channels are
// left out. Which channel it is matters where channels have numbers of their own.
INLINE int channel_of(const Expansion& e, const Lanes& at, int width, Size step) {
  return !e.low || step != width || width == e.channels ? at.channel : (int)(at.row % (e.channels / width)) * width + at.channel;
}

#define TOGETHER_UNROLL _Pragma("GCC unroll 4")

// Call work(lanes, n) for up to TOGETHER vectors at a time, of rows `start` to `stop`. FULL: no vector lacks lanes.
template <bool FULL, class Work>
INLINE void for_lanes(Size start, Size stop, int width, Work work) {
  Size row = start, left = (stop - start) * ((width + W - 1) / W);
  int channel = 0;
  while (left > 0) {
    Lanes lanes[TOGETHER];
    TOGETHER_UNROLL for (int i = 0; i < TOGETHER; ++i) {
      lanes[i] = {row, channel, FULL ? W : width - channel};
      channel += W;
      if (channel >= width) {
        channel = 0;
        ++row;
      }
    }
    if (left >= TOGETHER) {
      work(lanes, TOGETHER);
    } else {
      work(lanes, (int)left);
    }
    left -= TOGETHER;
  }
}

// The one function that channels share: sum of factor times function.
INLINE V mixed(const Expansion& e, const V* f, int functions, int channel, int count) {
  V sum = V{};
  for (int k = 0; k < functions; ++k) sum += load_some(e.low + (Size)k * e.channels + channel, count) * f[k];
  return sum;
}

template <int KIND, bool USUAL, bool TAME, bool FULL>
void expand_lanes(const Expansion& e, const float* x, float* out, Size start, Size stop, int width, Size step) {
  const int K = KIND == NONE ? 0 : USUAL ? usual<KIND>() : e.functions, first = e.base >= 0 ? 1 : 0;
  for_lanes<FULL>(start, stop, width, [&](const Lanes* lanes, int n) __attribute__((always_inline)) {
    V t[TOGETHER], f[TOGETHER][MOST];
    float* to[TOGETHER];
    TOGETHER_UNROLL for (int i = 0; i < n; ++i) {
      const Lanes at = lanes[i];
      const V v = load_some(x + at.row * step + at.channel, at.count);
      to[i] = out + (at.row * e.branches + e.offset) * width + at.channel;
      if (TAME && e.base == SILU && e.squash == SQUASH_TANH) {
        V gate;
        sigmoid_and_tanh(v, &gate, t + i);
        store_some(to[i], v * gate, at.count);
        continue;
      }
      if (e.base >= 0) store_some(to[i], activated(e.base, v), at.count);
      t[i] = squashed(e, v);
    }
    if (KIND == NONE) return;
    TOGETHER_UNROLL for (int i = 0; i < n; ++i) {
      evaluate<KIND, USUAL>(e, t[i], channel_of(e, lanes[i], width, step), lanes[i].count, f[i]);
    }
    for (int i = 0; e.shared && i < n; ++i) {
      const V sum = mixed(e, f[i], K, channel_of(e, lanes[i], width, step), lanes[i].count);
      store_some(to[i] + (Size)first * width, activated(e.act, sum), lanes[i].count);
    }
    if (e.shared) return;
    TOGETHER_UNROLL for (int i = 0; i < n; ++i) {
      for (int k = 0; k < K; ++k) {
        if (k < e.skip) continue;  // the numbers stay in registers where the bounds are known
        store_some(to[i] + (Size)(first + k - e.skip) * width, TAME ? f[i][k] * tame_sigmoid(f[i][k]) : e.act == SILU ? activate<SILU>(f[i][k]) : f[i][k],
                   lanes[i].count);
      }
    }
  });
}

template <int KIND, bool USUAL, bool TAME, bool FULL>
void contract_lanes(
    const Expansion& e, const float* x, const float* upper, float* at_x, Sums& sums, Size start, Size stop, int width,
    Size step) {
  const int K = KIND == NONE ? 0 : USUAL ? usual<KIND>() : e.functions, first = e.base >= 0 ? 1 : 0;
  float* low = sums.phases;
  float* high = low ? low + (Size)sets(e) * e.channels : low;
  for_lanes<FULL>(start, stop, width, [&](const Lanes* lanes, int n) __attribute__((always_inline)) {
    V t[TOGETHER], at[TOGETHER], f[TOGETHER][MOST], g[TOGETHER][MOST];
    int channel[TOGETHER];
    TOGETHER_UNROLL for (int i = 0; i < n; ++i) {
      const V v = load_some(x + lanes[i].row * step + lanes[i].channel, lanes[i].count);
      const float* from = upper + (lanes[i].row * e.branches + e.offset) * width + lanes[i].channel;
      channel[i] = channel_of(e, lanes[i], width, step);
      if (TAME && e.base == SILU && e.squash == SQUASH_TANH) {
        V gate;
        sigmoid_and_tanh(v, &gate, t + i);
        at[i] = load_some(from, lanes[i].count) * silu_slope(v, gate);
        continue;
      }
      at[i] = e.base >= 0 ? load_some(from, lanes[i].count) * slope_of(e.base, v) : V{};
      t[i] = squashed(e, v);
    }
    TOGETHER_UNROLL for (int i = 0; i < n && KIND != NONE; ++i) evaluate<KIND, USUAL>(e, t[i], channel[i], lanes[i].count, f[i]);
    for (int i = 0; KIND != NONE && e.shared && i < n; ++i) {
      const int count = lanes[i].count;
      const float* from = upper + (lanes[i].row * e.branches + e.offset + first) * width + lanes[i].channel;
      V at_sum = load_some(from, count);
      if (e.act != IDENTITY) at_sum *= slope_of(e.act, mixed(e, f[i], K, channel[i], count));
      for (int k = 0; k < K; ++k) {
        const Size place = (Size)k * e.channels + channel[i];
        g[i][k] = at_sum * load_some(e.low + place, count);
        if (low) store_some(low + place, load_some(low + place, count) + at_sum * f[i][k], count);
      }
    }
    TOGETHER_UNROLL for (int i = 0; i < n && KIND != NONE && !e.shared; ++i) {
      const float* from = upper + (lanes[i].row * e.branches + e.offset) * width + lanes[i].channel;
      for (int k = 0; k < K; ++k) {
        g[i][k] = V{};
        if (k < e.skip) continue;
        g[i][k] = load_some(from + (Size)(first + k - e.skip) * width, lanes[i].count);
        if (TAME) {
          g[i][k] *= silu_slope(f[i][k], tame_sigmoid(f[i][k]));
        } else if (e.act == SILU) {
          g[i][k] *= slope<SILU>(f[i][k]);
        }
      }
    }
    TOGETHER_UNROLL for (int i = 0; i < n && KIND != NONE; ++i) {
      at[i] += squash_slope(e, t[i]) *
               lead_back<KIND, USUAL>(e, t[i], channel[i], lanes[i].count, f[i], g[i], sums.inner, low, high);
    }
    if (!at_x) return;
    TOGETHER_UNROLL for (int i = 0; i < n; ++i) {
      float* to = at_x + lanes[i].row * step + lanes[i].channel;
      store_some(to, load_some(to, lanes[i].count) + at[i], lanes[i].count);
    }
  });
}

// Rows of fewer channels than FEW, side by side in memory and with the same numbers for all channels: NARROW of them are
// one row of a buffer, (branches, NARROW * width), which is moved to or from (NARROW, branches, width).
const int FEW = W > 4 ? W / 2 : W;  // those of AVX fill so little of a vector that moving them is faster
const int NARROW = TOGETHER * W, MOST_NARROW = (MOST + 1) * NARROW * (FEW - 1);

INLINE bool is_narrow(const Expansion& e, int width, Size step) { return width < FEW && step == width && !e.low; }

template <class Move>
INLINE void move_narrow(const Expansion& e, int width, Move move) {
  const int made = (e.base >= 0) + (e.kind == NONE ? 0 : e.shared ? 1 : e.functions - e.skip);
  for (int branch = e.offset; branch < e.offset + made; ++branch) {
    for (int row = 0; row < NARROW; ++row) {
      for (int c = 0; c < width; ++c) move((row * e.branches + branch) * width + c, (branch * NARROW + row) * width + c);
    }
  }
}

template <int KIND, bool USUAL, bool TAME>
void expand_rows(const Expansion& e, const float* x, float* out, Size start, Size stop, int width, Size step) {
  if (is_narrow(e, width, step)) {
    float planes[MOST_NARROW];
    for (; start + NARROW <= stop; start += NARROW) {
      expand_lanes<KIND, USUAL, TAME, true>(e, x + start * width, planes, 0, 1, NARROW * width, NARROW * width);
      float* to = out + start * e.branches * width;
      move_narrow(e, width, [&](int at, int plane) { to[at] = planes[plane]; });
    }
  }
  const auto run = width % W ? expand_lanes<KIND, USUAL, TAME, false> : expand_lanes<KIND, USUAL, TAME, true>;
  run(e, x, out, start, stop, width, step);
}

template <int KIND, bool USUAL, bool TAME>
void contract_rows(
    const Expansion& e, const float* x, const float* upper, float* at_x, Sums& sums, Size start, Size stop, int width,
    Size step) {
  if (is_narrow(e, width, step)) {
    float planes[MOST_NARROW];
    for (; start + NARROW <= stop; start += NARROW) {
      const float* from = upper + start * e.branches * width;
      move_narrow(e, width, [&](int at, int plane) { planes[plane] = from[at]; });
      contract_lanes<KIND, USUAL, TAME, true>(
          e, x + start * width, planes, at_x ? at_x + start * width : at_x, sums, 0, 1, NARROW * width, NARROW * width);
    }
  }
  const auto run = width % W ? contract_lanes<KIND, USUAL, TAME, false> : contract_lanes<KIND, USUAL, TAME, true>;
  run(e, x, upper, at_x, sums, start, stop, width, step);
}

typedef void (*Expand)(const Expansion&, const float*, float*, Size, Size, int, Size);
typedef void (*Contract)(const Expansion&, const float*, const float*, float*, Sums&, Size, Size, int, Size);

template <int KIND>
void choose_usual(const Expansion& e, Expand* expand, Contract* contract) {
  const bool usual = is_usual<KIND>(e);
  *expand = usual ? expand_rows<KIND, true, false> : expand_rows<KIND, false, false>;
  *contract = usual ? contract_rows<KIND, true, false> : contract_rows<KIND, false, false>;
  if (KIND == POLYNOMIAL && usual && is_tame(e)) {
    *expand = expand_rows<KIND, true, KIND == POLYNOMIAL>;
    *contract = contract_rows<KIND, true, KIND == POLYNOMIAL>;
  }
}

void choose(const Expansion& e, Expand* expand, Contract* contract) {
  switch (e.kind) {
    case POLYNOMIAL: return choose_usual<POLYNOMIAL>(e, expand, contract);
    case BERNSTEIN: return choose_usual<BERNSTEIN>(e, expand, contract);
    case BSPLINE: return choose_usual<BSPLINE>(e, expand, contract);
    case RBF: return choose_usual<RBF>(e, expand, contract);
    case BUMPS: return choose_usual<BUMPS>(e, expand, contract);
    case FOURIER: return choose_usual<FOURIER>(e, expand, contract);
    case RATIONAL: return choose_usual<RATIONAL>(e, expand, contract);
    case WAVELET: return choose_usual<WAVELET>(e, expand, contract);
    default: return choose_usual<NONE>(e, expand, contract);
  }
}

// ---------------------------------------------------------------------------------------------- normalisation

const int TILE = 64;  // rows summed in float32 before they go to float64

// What takes y to z = (y - mean) scale + shift, numbers a channel.
struct Affine {
  const float *scale, *mean, *shift, *below;  // slopes of PRELU
};

template <int ACT>
void norm_rows(const float* y, float* out, Affine to, Size first, Size last, int channels) {
  for (Size row = first; row < last; ++row) {
    for (int c = 0; c < channels; c += W) {
      const int count = channels - c;
      V apart = load_some(y + row * channels + c, count) - load_some(to.mean + c, count);
      V z = apart * load_some(to.scale + c, count) + load_some(to.shift + c, count);
      store_some(out + row * channels + c, activate<ACT>(z, load_some(to.below + c, count)), count);
    }
  }
}

template <int ACT>
void norm_sums(
    const float* y, const float* grad, Affine to, double* sums, Size first, Size last, int channels) {
  for (int c = 0; c < channels; c += W) {
    const int count = channels - c < W ? channels - c : W;
    const V a = load_some(to.scale + c, count), b = load_some(to.shift + c, count);
    const V m = load_some(to.mean + c, count), k = load_some(to.below + c, count);
    for (Size start = first; start < last; start += TILE) {
      const Size stop = start + TILE < last ? start + TILE : last;
      V plain = V{}, weighted = V{}, negative = V{};
      for (Size row = start; row < stop; ++row) {
        V apart = load_some(y + row * channels + c, count) - m;
        V z = apart * a + b, upper = load_some(grad + row * channels + c, count);
        V g = upper * slope<ACT>(z, k);
        if (ACT == PRELU) negative += upper * smaller(z, V{});
        plain += g;
        weighted += g * apart;
      }
      for (int i = 0; i < count; ++i) {
        sums[c + i] += plain[i];
        sums[channels + c + i] += weighted[i];
        sums[2 * channels + c + i] += negative[i];
      }
    }
  }
}

template <int ACT>
void norm_back(
    const float* y, const float* grad, Affine to, const float* gain, const float* offset, float* out, Size first,
    Size last, int channels) {
  for (Size row = first; row < last; ++row) {
    for (int c = 0; c < channels; c += W) {
      const int count = channels - c;
      const Size place = row * channels + c;
      V apart = load_some(y + place, count) - load_some(to.mean + c, count), a = load_some(to.scale + c, count);
      V z = apart * a + load_some(to.shift + c, count);
      V g = load_some(grad + place, count) * slope<ACT>(z, load_some(to.below + c, count));
      store_some(out + place, g * a + apart * load_some(gain + c, count) + load_some(offset + c, count), count);
    }
  }
}

// sums[c] += sum over rows of (y - mean[c]) ^ power, power 1 or 2
void moment_sums(const float* y, const float* mean, double* sums, int power, Size first, Size last, int channels) {
  for (int c = 0; c < channels; c += W) {
    const int count = channels - c < W ? channels - c : W;
    const V m = load_some(mean + c, count);
    for (Size start = first; start < last; start += TILE) {
      const Size stop = start + TILE < last ? start + TILE : last;
      V sum = V{};
      for (Size row = start; row < stop; ++row) {
        V v = load_some(y + row * channels + c, count) - m;
        sum += power == 2 ? v * v : v;
      }
      for (int i = 0; i < count; ++i) sums[c + i] += sum[i];
    }
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------- exports
// Of expansions a row is the `width` channels of one group of one voxel, else all channels of a voxel. Sums have one
// part a thread.

extern "C" {

void NAME(expand)(const Expansion* e, const float* x, float* out, Size rows, int width, int threads) {
  Expand run;
  Contract unused;
  choose(*e, &run, &unused);
  share_out(rows, threads, [=](Size start, Size stop, int) { run(*e, x, out, start, stop, width, width); });
}

// at_x += gradient; inner (threads, 33), phases and phases_total (threads, 2, sets, channels); each may be null
void NAME(contract)(
    const Expansion* e, const float* x, const float* upper, float* at_x, double* inner, float* phases,
    double* phases_total, Size rows, int width, int threads) {
  Expand unused;
  Contract run;
  choose(*e, &unused, &run);
  share_out(rows, threads, [=](Size start, Size stop, int thread) {
    const Size at = 2 * (Size)thread * sets(*e) * e->channels;
    Sums sums = no_sums(inner ? inner + thread * MOST : inner, phases ? phases + at : phases, phases_total + at);
    for (Size from = start; from < stop; from += BLOCK) {
      run(*e, x, upper, at_x, sums, from, from + BLOCK < stop ? from + BLOCK : stop, width, width);
      to_double(*e, sums);
    }
  });
}

// sums (threads, channels) += sum of (y - mean) ^ power
void NAME(moments)(
    const float* y, const float* mean, double* sums, int power, Size rows, int channels, int threads) {
  share_out(rows, threads, [=](Size start, Size stop, int thread) {
    moment_sums(y, mean, sums + (Size)thread * channels, power, start, stop, channels);
  });
}

#define CHOSEN(f) (act == SILU ? f<SILU> : act == RELU ? f<RELU> : act == PRELU ? f<PRELU> : f<IDENTITY>)

// out = act(z), see `Affine`
void NAME(norm_forward)(
    const float* y, float* out, const float* scale, const float* mean, const float* shift, const float* below,
    int act, Size rows, int channels, int threads) {
  auto run = CHOSEN(norm_rows);
  const Affine to = {scale, mean, shift, below};
  share_out(rows, threads, [=](Size start, Size stop, int) { run(y, out, to, start, stop, channels); });
}

// sums (threads, 3, channels) += sum of g, of g (y - mean), and of what the slopes below zero get; g is the gradient
// at z
void NAME(norm_reduce)(
    const float* y, const float* grad, const float* scale, const float* mean, const float* shift, const float* below,
    double* sums, int act, Size rows, int channels, int threads) {
  auto run = CHOSEN(norm_sums);
  const Affine to = {scale, mean, shift, below};
  share_out(rows, threads, [=](Size start, Size stop, int thread) {
    run(y, grad, to, sums + (Size)thread * 3 * channels, start, stop, channels);
  });
}

// out = g scale + (y - mean) gain + offset
void NAME(norm_backward)(
    const float* y, const float* grad, const float* scale, const float* mean, const float* shift, const float* below,
    const float* gain, const float* offset, float* out, int act, Size rows, int channels, int threads) {
  auto run = CHOSEN(norm_back);
  const Affine to = {scale, mean, shift, below};
  share_out(rows, threads, [=](Size start, Size stop, int) {
    run(y, grad, to, gain, offset, out, start, stop, channels);
  });
}
}
