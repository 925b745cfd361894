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

INLINE V load_some(const float* from, int count) {
  if (count >= W) return load(from);
  float lanes[W] = {};
  for (int i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}

INLINE void store_some(float* to, V v, int count) {
  if (count >= W) {
    store(to, v);
    return;
  }
  float lanes[W];
  store(lanes, v);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
}

INLINE V larger(V a, V b) { return a > b ? a : b; }
INLINE V smaller(V a, V b) { return a < b ? a : b; }
INLINE V positive(V a) { return larger(a, V{}); }

INLINE float total(V v) {
  float lanes[W], sum = 0;
  store(lanes, v);
  for (int i = 0; i < W; ++i) sum += lanes[i];
  return sum;
}

// exp(x): x = n ln 2 + r with |r| <= ln(2) / 2, Taylor in r to the 7th power, relative error 2e-7.
INLINE V exponential(V x) {
  x = smaller(larger(x, set(-87.0f)), set(88.0f));
  const V shift = set(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  V n = (x * 1.44269504f + shift) - shift;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = set(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  I power = (__builtin_convertvector(n, I) + 127) << 23;
  return p * (V)power;
}

INLINE V sigmoid(V x) { return 1.0f / (1.0f + exponential(-x)); }

// erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7; `gauss` is exp(-x^2).
INLINE V error_function(V x, V gauss) {
  V distance = larger(x, -x);
  V t = 1.0f / (1.0f + 0.3275911f * distance);
  V p = set(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  V value = 1.0f - p * t * gauss;
  return x < V{} ? -value : value;
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

template <int ACT>
INLINE V slope(V x, V below = V{}) {
  if (ACT == PRELU) return x > V{} ? set(1.0f) : below;
  if (ACT == SILU) {
    V s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
  }
  if (ACT == RELU) return x > V{} ? set(1.0f) : V{};
  if (ACT == GELU) {
    V gauss = exponential(-0.5f * x * x);
    return 0.5f * (1.0f + error_function(x * 0.70710678f, gauss)) + x * gauss * 0.39894228f;
  }
  return set(1.0f);
}

// ---------------------------------------------------------------------------------------------- expansions

enum { NONE = 0, POLYNOMIAL = 1, BERNSTEIN = 2, BSPLINE = 3, RBF = 4, BUMPS = 5 };
enum { SQUASH_IDENTITY = 0, SQUASH_TANH = 1, SQUASH_SIGMOID = 2 };
const int MOST = 33;  // functions at most

}  // namespace

// What one layer expands its input in; the same in Python.
struct Expansion {
  int kind, functions, skip, base, act, squash, order, channels;
  int branches, offset;  // of the buffer: how many there are, and the first of these
  const float* numbers;  // polynomial: a, b, c of each degree from 1; others: centres, then 1 / spacing
  const float* low;      // bumps: (functions, channels)
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

// f[0 ... functions - 1] at x; t is what the squash made of it.
template <int KIND>
INLINE void evaluate(const Expansion& e, V t, int channel, int count, V* f) {
  const int K = e.functions;
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
    for (int k = 0; k < K; ++k) f[k] = spline((t - e.numbers[k]) * e.numbers[K], e.order);
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
}

// The gradient at t from those at the functions (g is used up); `inner` sums those of c (polynomial), `low` and `high`
// those of the phases (bumps).
template <int KIND>
INLINE V lead_back(const Expansion& e, V t, int channel, int count, const V* f, V* g, V* inner, float* low, float* high) {
  const int K = e.functions;
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
    for (int k = 0; k < K; ++k) at += g[k] * spline_slope((t - e.numbers[k]) * e.numbers[K], e.order);
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
  return at;
}

template <int KIND, int BASE, int ACT>
void expand_rows(const Expansion& e, const float* x, float* out, Size start, Size stop, int width) {
  const int K = KIND == NONE ? 0 : e.functions, first = BASE >= 0 ? 1 : 0;
  for (Size row = start; row < stop; ++row) {
    const int group = (int)(row % (e.channels / width)) * width;
    for (int c = 0; c < width; c += W) {
      const int count = width - c;
      V v = load_some(x + row * width + c, count), f[MOST];
      float* to = out + (row * e.branches + e.offset) * width + c;
      if (BASE >= 0) store_some(to, activate<(BASE < 0 ? 0 : BASE)>(v), count);
      if (KIND == NONE) continue;
      evaluate<KIND>(e, squashed(e, v), group + c, count, f);
      for (int k = e.skip; k < K; ++k) {
        store_some(to + (Size)(first + k - e.skip) * width, activate<ACT>(f[k]), count);
      }
    }
  }
}

template <int KIND, int BASE, int ACT>
void contract_rows(
    const Expansion& e, const float* x, const float* upper, float* at_x, float* inner, float* low, float* high,
    Size start, Size stop, int width) {
  const int K = KIND == NONE ? 0 : e.functions, first = BASE >= 0 ? 1 : 0;
  V sums[MOST];
  for (int k = 0; k < K; ++k) sums[k] = V{};
  for (Size row = start; row < stop; ++row) {
    const int group = (int)(row % (e.channels / width)) * width;
    for (int c = 0; c < width; c += W) {
      const int count = width - c;
      V v = load_some(x + row * width + c, count), f[MOST], g[MOST];
      const float* from = upper + (row * e.branches + e.offset) * width + c;
      V at = V{};
      if (BASE >= 0) at = load_some(from, count) * slope<(BASE < 0 ? 0 : BASE)>(v);
      if (KIND != NONE) {
        V t = squashed(e, v);
        evaluate<KIND>(e, t, group + c, count, f);
        for (int k = 0; k < K; ++k) {
          g[k] = k < e.skip ? V{} : load_some(from + (Size)(first + k - e.skip) * width, count) * slope<ACT>(f[k]);
        }
        at += squash_slope(e, t) * lead_back<KIND>(e, t, group + c, count, f, g, sums, low, high);
      }
      if (at_x) {
        float* to = at_x + row * width + c;
        store_some(to, load_some(to, count) + at, count);
      }
    }
  }
  if (inner) {
    for (int k = 0; k < K; ++k) inner[k] += total(sums[k]);
  }
}

typedef void (*Expand)(const Expansion&, const float*, float*, Size, Size, int);
typedef void (*Contract)(
    const Expansion&, const float*, const float*, float*, float*, float*, float*, Size, Size, int);

template <int KIND, int BASE>
void choose_act(int act, Expand* expand, Contract* contract) {
  if (KIND != NONE && act == SILU) {
    *expand = expand_rows<KIND, BASE, SILU>;
    *contract = contract_rows<KIND, BASE, SILU>;
  } else {
    *expand = expand_rows<KIND, BASE, IDENTITY>;
    *contract = contract_rows<KIND, BASE, IDENTITY>;
  }
}

template <int KIND>
void choose_base(const Expansion& e, Expand* expand, Contract* contract) {
  switch (e.base) {
    case IDENTITY: return choose_act<KIND, IDENTITY>(e.act, expand, contract);
    case SILU: return choose_act<KIND, SILU>(e.act, expand, contract);
    case GELU: return choose_act<KIND, GELU>(e.act, expand, contract);
    case RELU: return choose_act<KIND, RELU>(e.act, expand, contract);
    default: return choose_act<KIND, -1>(e.act, expand, contract);
  }
}

void choose(const Expansion& e, Expand* expand, Contract* contract) {
  switch (e.kind) {
    case POLYNOMIAL: return choose_base<POLYNOMIAL>(e, expand, contract);
    case BERNSTEIN: return choose_base<BERNSTEIN>(e, expand, contract);
    case BSPLINE: return choose_base<BSPLINE>(e, expand, contract);
    case RBF: return choose_base<RBF>(e, expand, contract);
    case BUMPS: return choose_base<BUMPS>(e, expand, contract);
    default: return choose_base<NONE>(e, expand, contract);
  }
}

// ---------------------------------------------------------------------------------------------- normalisation

const int TILE = 64;  // rows summed in float32 before they go to float64

template <int ACT>
void norm_rows(
    const float* y, float* out, const float* scale, const float* shift, const float* below, Size first, Size last,
    int channels) {
  for (Size row = first; row < last; ++row) {
    for (int c = 0; c < channels; c += W) {
      const int count = channels - c;
      V z = load_some(y + row * channels + c, count) * load_some(scale + c, count) + load_some(shift + c, count);
      store_some(out + row * channels + c, activate<ACT>(z, load_some(below + c, count)), count);
    }
  }
}

template <int ACT>
void norm_sums(
    const float* y, const float* grad, const float* scale, const float* shift, const float* below, const float* mean,
    double* sums, Size first, Size last, int channels) {
  for (int c = 0; c < channels; c += W) {
    const int count = channels - c < W ? channels - c : W;
    const V a = load_some(scale + c, count), b = load_some(shift + c, count), m = load_some(mean + c, count);
    const V k = load_some(below + c, count);
    for (Size start = first; start < last; start += TILE) {
      const Size stop = start + TILE < last ? start + TILE : last;
      V plain = V{}, weighted = V{}, negative = V{};
      for (Size row = start; row < stop; ++row) {
        V v = load_some(y + row * channels + c, count);
        V z = v * a + b, upper = load_some(grad + row * channels + c, count);
        V g = upper * slope<ACT>(z, k);
        if (ACT == PRELU) negative += upper * smaller(z, V{});
        plain += g;
        weighted += g * (v - m);
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
    const float* y, const float* grad, const float* scale, const float* shift, const float* below, const float* gain,
    const float* offset, float* out, Size first, Size last, int channels) {
  for (Size row = first; row < last; ++row) {
    for (int c = 0; c < channels; c += W) {
      const int count = channels - c;
      const Size place = row * channels + c;
      V v = load_some(y + place, count), a = load_some(scale + c, count);
      V g = load_some(grad + place, count) *
            slope<ACT>(v * a + load_some(shift + c, count), load_some(below + c, count));
      store_some(out + place, g * a + v * load_some(gain + c, count) + load_some(offset + c, count), count);
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
  share_out(rows, threads, [=](Size start, Size stop, int) { run(*e, x, out, start, stop, width); });
}

// at_x += gradient; inner (threads, 33); low, high (threads, functions, channels); each may be null
void NAME(contract)(
    const Expansion* e, const float* x, const float* upper, float* at_x, float* inner, float* low, float* high,
    Size rows, int width, int threads) {
  Expand unused;
  Contract run;
  choose(*e, &unused, &run);
  share_out(rows, threads, [=](Size start, Size stop, int thread) {
    const Size phases = (Size)thread * e->functions * e->channels;
    run(*e, x, upper, at_x, inner ? inner + thread * MOST : inner, low ? low + phases : low,
        high ? high + phases : high, start, stop, width);
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

// out = act(y scale + shift); below: slopes of PRELU
void NAME(norm_forward)(
    const float* y, float* out, const float* scale, const float* shift, const float* below, int act, Size rows,
    int channels, int threads) {
  auto run = CHOSEN(norm_rows);
  share_out(rows, threads, [=](Size start, Size stop, int) {
    run(y, out, scale, shift, below, start, stop, channels);
  });
}

// sums (threads, 3, channels) += sum of g, of g (y - mean), and of what the slopes below zero get; g is the gradient
// before the activation
void NAME(norm_reduce)(
    const float* y, const float* grad, const float* scale, const float* shift, const float* below, const float* mean,
    double* sums, int act, Size rows, int channels, int threads) {
  auto run = CHOSEN(norm_sums);
  share_out(rows, threads, [=](Size start, Size stop, int thread) {
    run(y, grad, scale, shift, below, mean, sums + (Size)thread * 3 * channels, start, stop, channels);
  });
}

// out = g scale + y gain + offset
void NAME(norm_backward)(
    const float* y, const float* grad, const float* scale, const float* shift, const float* below, const float* gain,
    const float* offset, float* out, int act, Size rows, int channels, int threads) {
  auto run = CHOSEN(norm_back);
  share_out(rows, threads, [=](Size start, Size stop, int) {
    run(y, grad, scale, shift, below, gain, offset, out, start, stop, channels);
  });
}
}
