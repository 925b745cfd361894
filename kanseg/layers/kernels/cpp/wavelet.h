// u_o = sum over c of conv(psi((x_c - translation_oc) / scale_oc); W_oc), kernel 3, stride 1: a wavelet for every pair of
// channels. Lanes are output channels, multiples of 16; a wavelet is evaluated once, and lives in three planes of a
// ring. A picture is a volume of one row: its rows are the planes. Included by rows.h's files after it.

// Sizes of one call. Parameters are (in, out), weights (in, taps, out), taps of depth, row, column.
struct Waves {
  int kind, samples, depth, height, width, in, out;
  int out_depth, out_height, out_width, pad_depth, pad_height, pad_width;
  const float* inverse;      // 1 / scale
  const float* translation;
  const float* weight;
};

namespace {

// sum[q] += 3 x 3 taps of three lines that begin one voxel of zeros and padding before.
INLINE void add_taps(float* sum, Size step, const V* a, const V* b, const V* c, const V* w, int width) {
  V a0 = a[0], a1 = a[1], b0 = b[0], b1 = b[1], c0 = c[0], c1 = c[1];
  for (int q = 0; q < width; ++q) {
    const V a2 = a[q + 2], b2 = b[q + 2], c2 = c[q + 2];
    V first = load(sum + q * step) + a0 * w[0] + a1 * w[1] + a2 * w[2];
    V second = b0 * w[3] + b1 * w[4] + b2 * w[5];
    V third = c0 * w[6] + c1 * w[7] + c2 * w[8];
    store(sum + q * step, first + (second + third));
    a0 = a1; a1 = a2;
    b0 = b1; b1 = b2;
    c0 = c1; c1 = c2;
  }
}

// Outputs channels first ... first + W of one sample; ring: (3, height, width + 4) and a line of zeros, set to zero.
template <int KIND, int ROWS>
void wave_forward(const Waves& s, const float* x, float* u, V* ring, int first) {
  const Size line = s.width + 4, plane = line * s.height;
  const V* zeros = ring + 3 * plane;
  for (Size i = 0; i < (Size)s.out_depth * s.out_height * s.out_width; ++i) store(u + i * s.out + first, V{});
  for (int c = 0; c < s.in; ++c) {
    const V inverse = load(s.inverse + (Size)c * s.out + first), shift = load(s.translation + (Size)c * s.out + first);
    V w[9 * ROWS];
    for (int t = 0; t < 9 * ROWS; ++t) w[t] = load(s.weight + ((Size)c * 9 * ROWS + t) * s.out + first);
    int made = 0;
    for (int d = 0; d < s.out_depth; ++d) {
      for (; made < s.depth && made <= d - s.pad_depth + 2; ++made) {
        for (int r = 0; r < s.height; ++r) {
          V* to = ring + made % 3 * plane + r * line + 2;
          const float* from = x + (((Size)made * s.height + r) * s.width) * s.in + c;
          for (int q = 0; q < s.width; ++q) to[q] = wavelet<KIND>((from[(Size)q * s.in] - shift) * inverse);
        }
      }
      for (int r = 0; r < s.out_height; ++r) {
        const V* lines[3 * ROWS];
        for (int z = 0; z < 3; ++z) {
          for (int k = 0; k < ROWS; ++k) {
            const int depth = d - s.pad_depth + z, row = r - s.pad_height + k;
            const bool there = depth >= 0 && depth < s.depth && row >= 0 && row < s.height;
            lines[z * ROWS + k] = there ? ring + depth % 3 * plane + row * line + 2 - s.pad_width : zeros;
          }
        }
        float* sum = u + (((Size)d * s.out_height + r) * s.out_width) * s.out + first;
        for (int k = 0; k < ROWS; ++k) {
          add_taps(sum, s.out, lines[3 * k], lines[3 * k + 1], lines[3 * k + 2], w + 9 * k, s.out_width);
        }
      }
    }
  }
}

// Gradients from `grad`, that of u within a border of zeros (samples, out_depth + 4, out_height + 4, out_width + 4, out)
// (a picture has no border of rows, see below), for the input channels start ... stop. line: 3 * width of memory.
template <int KIND, int ROWS>
void wave_back(
    const Waves& s, const float* x, const float* grad, float* at_x, double* at_inverse, double* at_translation,
    double* at_weight, V* line, int start, int stop) {
  const int TAPS = 9 * ROWS, edge = ROWS == 3 ? 2 : 0;
  const Size across = s.out, down = across * (s.out_width + 4), deep = down * (s.out_height + 2 * edge);
  V *value = line, *slope = line + s.width, *upper = slope + s.width;
  for (int c = start; c < stop; ++c) {
    for (int first = 0; first < s.out; first += W) {
      const Size pair = (Size)c * s.out + first;
      const V inverse = load(s.inverse + pair), shift = load(s.translation + pair);
      V w[TAPS];
      for (int t = 0; t < TAPS; ++t) w[t] = load(s.weight + ((Size)c * TAPS + t) * s.out + first);
      for (int n = 0; n < s.samples; ++n) {
        for (int d = 0; d < s.depth; ++d) {
          V of_inverse = V{}, of_translation = V{}, of_weight[TAPS];
          for (int t = 0; t < TAPS; ++t) of_weight[t] = V{};
          for (int r = 0; r < s.height; ++r) {
            const Size voxel = (((Size)n * s.depth + d) * s.height + r) * s.width;
            const float* from = x + voxel * s.in + c;
            for (int q = 0; q < s.width; ++q) {
              const V z = (from[(Size)q * s.in] - shift) * inverse;
              value[q] = wavelet<KIND>(z);
              slope[q] = wavelet_slope<KIND>(z);
              upper[q] = V{};
            }
            for (int z = 0; z < 3; ++z) {
              for (int k = 0; k < ROWS; ++k) {
                // output = input + pad - tap, two voxels of border further on
                const Size depth = d + s.pad_depth - z + 2, row = r + s.pad_height - k + edge;
                const float* g = grad + (Size)n * (s.out_depth + 4) * deep + depth * deep + row * down +
                                 (Size)s.pad_width * across + first;
                const V* taps = w + (z * ROWS + k) * 3;
                V* sums = of_weight + (z * ROWS + k) * 3;
                V g0 = load(g), g1 = load(g + across), sum0 = sums[0], sum1 = sums[1], sum2 = sums[2];
                for (int q = 0; q < s.width; ++q) {
                  const V g2 = load(g + (q + 2) * across), psi = value[q];
                  upper[q] += g0 * taps[2] + g1 * taps[1] + g2 * taps[0];
                  sum0 += psi * g2;
                  sum1 += psi * g1;
                  sum2 += psi * g0;
                  g0 = g1;
                  g1 = g2;
                }
                sums[0] = sum0;
                sums[1] = sum1;
                sums[2] = sum2;
              }
            }
            for (int q = 0; q < s.width; ++q) {
              const V h = upper[q] * slope[q], away = from[(Size)q * s.in] - shift;
              at_x[(voxel + q) * s.in + c] += total(h * inverse);
              of_translation -= h * inverse;
              of_inverse += h * away;
            }
          }
          for (int i = 0; i < W; ++i) {
            at_inverse[pair + i] += of_inverse[i];
            at_translation[pair + i] += of_translation[i];
            for (int t = 0; t < TAPS; ++t) at_weight[((Size)c * TAPS + t) * s.out + first + i] += of_weight[t][i];
          }
        }
      }
    }
  }
}

}  // namespace

#define KIND_OF(f, rows) \
  (s->kind == MEXICAN_HAT ? f<MEXICAN_HAT, rows> : s->kind == MORLET ? f<MORLET, rows> : f<DOG, rows>)

extern "C" {

// Floats of memory that one thread needs.
Size NAME(wavelet_scratch)(const Waves* s) { return W * ((Size)s->width + 4) * (3 * s->height + 3); }

// u (samples, voxels, out); scratch (threads, wavelet_scratch), zeros
void NAME(wavelet_forward)(const Waves* s, int volume, const float* x, float* u, float* scratch, Size each, int threads) {
  auto run = volume ? KIND_OF(wave_forward, 3) : KIND_OF(wave_forward, 1);
  const int blocks = s->out / W;
  share_out((Size)s->samples * blocks, threads, [=](Size start, Size stop, int thread) {
    for (Size unit = start; unit < stop; ++unit) {
      const Size n = unit / blocks, voxels = (Size)s->depth * s->height * s->width;
      const Size outputs = (Size)s->out_depth * s->out_height * s->out_width;
      run(*s, x + n * voxels * s->in, u + n * outputs * s->out, (V*)(scratch + thread * each), (int)(unit % blocks) * W);
    }
  });
}

// Adds to at_x (as x) and to at_inverse, at_translation, at_weight (as the parameters)
void NAME(wavelet_back)(
    const Waves* s, int volume, const float* x, const float* grad, float* at_x, double* at_inverse,
    double* at_translation, double* at_weight, float* scratch, Size each, int threads) {
  auto run = volume ? KIND_OF(wave_back, 3) : KIND_OF(wave_back, 1);
  share_out(s->in, threads, [=](Size start, Size stop, int thread) {
    run(*s, x, grad, at_x, at_inverse, at_translation, at_weight, (V*)(scratch + thread * each), (int)start, (int)stop);
  });
}
}
