// Convolution with a kernel of 3 an axis and stride 1 by Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308):
// F(4, 3) along rows and columns, F(2, 3) along depth; a picture has no depth. Channels-last, multiples of 16 channels.
// A tile of outputs is DO x 4 x 4, of inputs DI x 6 x 6, (DI, DO) = (4, 2) for volumes and (1, 1) for pictures.
// Weights are given transformed, (DI * 36, in, out). Included by rows.h's files after it.

// Sizes of one call; pad is what lies before the first plane, row and column.
struct Volume {
  int samples, depth, height, width, in, out;     // of the input
  int out_depth, out_height, out_width;           // of the output
  int pad_depth, pad_height, pad_width;
};

namespace {

#if W == 16
const int MR = 12;  // rows of the product kept in registers, of two vectors each
#elif W == 8
const int MR = 6;
#else
const int MR = 4;
#endif
const int TILES = 24;  // worked on together: their transformed inputs stay in the second cache
const int SLICE = 32;  // channels worked on together
const int GAP = 16;    // floats between two positions, an odd number of cache lines: neighbours fall in different sets
const Size STEP = TILES * SLICE + GAP;  // from one position of the inputs to the next

INLINE void filter_six(V* d, int step) {
  V a = d[0], b = d[step], c = d[2 * step], e = d[3 * step], f = d[4 * step], g = d[5 * step];
  d[0] = 4.0f * a - 5.0f * c + f;
  d[step] = f - 4.0f * c + (e - 4.0f * b);
  d[2 * step] = f - 4.0f * c - (e - 4.0f * b);
  d[3 * step] = f - c + 2.0f * (e - b);
  d[4 * step] = f - c - 2.0f * (e - b);
  d[5 * step] = 4.0f * b - 5.0f * e + g;
}

INLINE void filter_four(V* d, int step) {
  V a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
  d[0] = a - c;
  d[step] = b + c;
  d[2 * step] = c - b;
  d[3 * step] = b - e;
}

// Six products -> four outputs, in place; and its transpose, four -> six.
INLINE void gather_six(V* m, int step) {
  V a = m[step] + m[2 * step], b = m[step] - m[2 * step], c = m[3 * step] + m[4 * step], e = m[3 * step] - m[4 * step];
  m[0] = m[0] + a + c;
  m[step] = b + 2.0f * e;
  m[2 * step] = a + 4.0f * c;
  m[3 * step] = b + 8.0f * e + m[5 * step];
}

INLINE void spread_six(V* y, int step) {
  V a = y[0], b = y[step], c = y[2 * step], e = y[3 * step];
  y[step] = a + b + c + e;
  y[2 * step] = a - b + c - e;
  y[3 * step] = a + 2.0f * b + 4.0f * c + 8.0f * e;
  y[4 * step] = a - 2.0f * b + 4.0f * c - 8.0f * e;
  y[5 * step] = e;
}

INLINE void gather_four(V* m, int step) {
  V a = m[0], b = m[step], c = m[2 * step], e = m[3 * step];
  m[0] = a + b + c;
  m[step] = b - c - e;
}

INLINE void spread_four(V* y, int step) {
  V a = y[0], b = y[step];
  y[step] = a + b;
  y[2 * step] = a - b;
  y[3 * step] = -b;
}

struct Tile {
  int sample, depth, row, column;  // of its first output
};

INLINE Tile tile_at(const Volume& v, Size index, int deep) {
  const int across = (v.out_width + 3) / 4, down = (v.out_height + 3) / 4, planes = (v.out_depth + deep - 1) / deep;
  Tile t;
  t.column = 4 * (int)(index % across);
  index /= across;
  t.row = 4 * (int)(index % down);
  index /= down;
  t.depth = deep * (int)(index % planes);
  t.sample = (int)(index / planes);
  return t;
}

INLINE Size tile_count(const Volume& v, int deep) {
  return (Size)v.samples * ((v.out_depth + deep - 1) / deep) * ((v.out_height + 3) / 4) * ((v.out_width + 3) / 4);
}

INLINE bool inside(int index, int size) { return index >= 0 && index < size; }

// N voxels of a line, zero but for those from `low` up to `high`.
template <int N>
INLINE void read_line(V* line, const float* from, Size across, int low, int high) {
  if (low <= 0 && high >= N) {
    for (int q = 0; q < N; ++q) line[q] = load(from + q * across);
  } else {
    for (int q = 0; q < N; ++q) line[q] = q >= low && q < high ? load(from + q * across) : V{};
  }
}

// Steps between the columns, rows and planes of the outputs, and where those of a tile begin.
struct Place {
  Size across, down, deep, corner;
};

INLINE Place outputs_of(const Volume& v, Tile t) {
  const Size across = v.out, down = across * v.out_width, deep = down * v.out_height;
  return {across, down, deep,
          ((Size)t.sample * v.out_depth + t.depth) * deep + t.row * down + t.column * across};
}

// Transformed inputs of one tile, channels first ... first + count: to[position * stride + channel].
template <int DI>
void read_tile(const Volume& v, const float* x, Tile t, int first, int count, float* to, Size stride) {
  V d[DI * 36];
  const int depth = t.depth - v.pad_depth, row = t.row - v.pad_height, column = t.column - v.pad_width;
  const Size across = v.in, down = across * v.width, deep = down * v.height;
  const float* corner = x + ((Size)t.sample * v.depth + depth) * deep + row * down + column * across + first;
  for (int c = 0; c < count; c += W) {
    for (int z = 0; z < DI; ++z) {
      for (int r = 0; r < 6; ++r) {
        V* line = d + (z * 6 + r) * 6;
        const float* from = corner + z * deep + r * down + c;
        const bool there = inside(depth + z, v.depth) && inside(row + r, v.height);
        read_line<6>(line, from, across, there ? -column : 6, v.width - column);
        filter_six(line, 1);
      }
      for (int q = 0; q < 6; ++q) filter_six(d + z * 36 + q, 6);
    }
    for (int p = 0; p < 36; ++p) {
      if (DI == 4) filter_four(d + p, 36);
      for (int z = 0; z < DI; ++z) store(to + (z * 36 + p) * stride + c, d[z * 36 + p]);
    }
  }
}

// Outputs of one tile from its products, added up over channels: from[position * stride + channel].
template <int DI, int DO>
void write_tile(const Volume& v, float* y, Tile t, const float* from, Size stride) {
  V m[DI * 36];
  const int planes = v.out_depth - t.depth < DO ? v.out_depth - t.depth : DO;
  const int rows = v.out_height - t.row < 4 ? v.out_height - t.row : 4;
  const int columns = v.out_width - t.column < 4 ? v.out_width - t.column : 4;
  const Place at = outputs_of(v, t);
  for (int c = 0; c < v.out; c += W) {
    for (int p = 0; p < 36; ++p) {
      for (int z = 0; z < DI; ++z) m[z * 36 + p] = load(from + (z * 36 + p) * stride + c);
      if (DI == 4) gather_four(m + p, 36);
    }
    for (int z = 0; z < planes; ++z) {
      for (int q = 0; q < 6; ++q) gather_six(m + z * 36 + q, 6);
      for (int r = 0; r < rows; ++r) {
        V* line = m + z * 36 + r * 6;
        gather_six(line, 1);
        float* to = y + at.corner + z * at.deep + r * at.down + c;
        for (int q = 0; q < columns; ++q) store(to + q * at.across, line[q]);
      }
    }
  }
}

// The transpose of write_tile for the gradient y of the outputs.
template <int DI, int DO>
void read_gradient(const Volume& v, const float* y, Tile t, float* to, Size stride) {
  V m[DI * 36];
  const Place at = outputs_of(v, t);
  for (int c = 0; c < v.out; c += W) {
    for (int z = 0; z < DO; ++z) {
      for (int r = 0; r < 4; ++r) {
        V* line = m + z * 36 + r * 6;
        const bool there = t.depth + z < v.out_depth && t.row + r < v.out_height;
        const float* from = y + at.corner + z * at.deep + r * at.down + c;
        read_line<4>(line, from, at.across, there ? 0 : 4, v.out_width - t.column);
        spread_six(line, 1);
      }
      for (int q = 0; q < 6; ++q) spread_six(m + z * 36 + q, 6);
    }
    for (int p = 0; p < 36; ++p) {
      if (DI == 4) spread_four(m + p, 36);
      for (int z = 0; z < DI; ++z) store(to + (z * 36 + p) * stride + c, m[z * 36 + p]);
    }
  }
}

// c[i, :] += sum over k of a[i * row + k * step] * b[k, :], R rows and N vectors.
template <int R, int N>
INLINE void product_block(
    const float* a, Size row, Size step, const float* b, Size b_row, float* c, Size c_row, int depth) {
  V sum[R][N];
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < N; ++j) sum[i][j] = load(c + i * c_row + j * W);
  }
  for (int k = 0; k < depth; ++k) {
    V right[N];
    for (int j = 0; j < N; ++j) right[j] = load(b + k * b_row + j * W);
    for (int i = 0; i < R; ++i) {
      const V left = set(a[i * row + k * step]);
      for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < N; ++j) store(c + i * c_row + j * W, sum[i][j]);
  }
}

template <int N>
void product_columns(
    int rows, const float* a, Size row, Size step, const float* b, Size b_row, float* c, Size c_row, int depth) {
  int i = 0;
  for (; i + MR <= rows; i += MR) {
    product_block<MR, N>(a + i * row, row, step, b, b_row, c + i * c_row, c_row, depth);
  }
  for (; i + 4 <= rows; i += 4) product_block<4, N>(a + i * row, row, step, b, b_row, c + i * c_row, c_row, depth);
  for (; i < rows; ++i) product_block<1, N>(a + i * row, row, step, b, b_row, c + i * c_row, c_row, depth);
}

void product(
    int rows, int columns, const float* a, Size row, Size step, const float* b, Size b_row, float* c, Size c_row,
    int depth) {
  int j = 0;
  for (; j + 2 * W <= columns; j += 2 * W) {
    product_columns<2>(rows, a, row, step, b + j, b_row, c + j, c_row, depth);
  }
  for (; j < columns; j += W) product_columns<1>(rows, a, row, step, b + j, b_row, c + j, c_row, depth);
}

template <int DI, int DO>
void filter_tiles(const Volume& v, const float* x, const float* weight, float* y, float* scratch, Size start, Size stop) {
  const int positions = DI * 36;
  const Size step = (Size)TILES * v.out + GAP;
  float* inputs = scratch;                                        // (positions, TILES, SLICE)
  float* products = scratch + positions * STEP;    // (positions, TILES, out)
  for (Size block = start; block < stop; block += TILES) {
    const int tiles = (int)(stop - block < TILES ? stop - block : TILES);
    __builtin_memset(products, 0, sizeof(float) * positions * step);
    for (int first = 0; first < v.in; first += SLICE) {
      const int count = v.in - first < SLICE ? v.in - first : SLICE;
      for (int t = 0; t < tiles; ++t) {
        read_tile<DI>(v, x, tile_at(v, block + t, DO), first, count, inputs + t * SLICE, STEP);
      }
      for (int p = 0; p < positions; ++p) {
        product(tiles, v.out, inputs + p * STEP, SLICE, 1, weight + ((Size)p * v.in + first) * v.out,
                v.out, products + p * step, v.out, count);
      }
    }
    for (int t = 0; t < tiles; ++t) {
      write_tile<DI, DO>(v, y, tile_at(v, block + t, DO), products + (Size)t * v.out, step);
    }
  }
}

template <int DI, int DO>
void weigh_tiles(
    const Volume& v, const float* x, const float* grad, float* sums, float* scratch, Size start, Size stop) {
  const int positions = DI * 36;
  const Size step = (Size)TILES * v.out + GAP;
  float* inputs = scratch;                                      // (positions, TILES, SLICE)
  float* outputs = scratch + positions * STEP;   // (positions, TILES, out)
  for (Size block = start; block < stop; block += TILES) {
    const int tiles = (int)(stop - block < TILES ? stop - block : TILES);
    for (int t = 0; t < tiles; ++t) {
      read_gradient<DI, DO>(v, grad, tile_at(v, block + t, DO), outputs + (Size)t * v.out, step);
    }
    for (int first = 0; first < v.in; first += SLICE) {
      const int count = v.in - first < SLICE ? v.in - first : SLICE;
      for (int t = 0; t < tiles; ++t) {
        read_tile<DI>(v, x, tile_at(v, block + t, DO), first, count, inputs + t * SLICE, STEP);
      }
      for (int p = 0; p < positions; ++p) {
        product(count, v.out, inputs + p * STEP, 1, SLICE, outputs + p * step, v.out,
                sums + ((Size)p * v.in + first) * v.out, v.out, tiles);
      }
    }
  }
}

}  // namespace

extern "C" {

// Floats of scratch that one thread needs.
Size NAME(winograd_scratch)(const Volume* v, int volume) {
  return (volume ? 144 : 36) * (STEP + (Size)TILES * v->out + GAP);
}

// y = convolution of x; scratch (threads, winograd_scratch)
void NAME(winograd)(
    const Volume* v, int volume, const float* x, const float* weight, float* y, float* scratch, Size each, int threads) {
  share_out(tile_count(*v, volume ? 2 : 1), threads, [=](Size start, Size stop, int thread) {
    auto run = volume ? filter_tiles<4, 2> : filter_tiles<1, 1>;
    run(*v, x, weight, y, scratch + thread * each, start, stop);
  });
}

// sums (threads, positions, in, out) += gradient at the transformed weight
void NAME(winograd_weight)(
    const Volume* v, int volume, const float* x, const float* grad, float* sums, float* scratch, Size each,
    int threads) {
  const Size size = (Size)(volume ? 144 : 36) * v->in * v->out;
  share_out(tile_count(*v, volume ? 2 : 1), threads, [=](Size start, Size stop, int thread) {
    auto run = volume ? weigh_tiles<4, 2> : weigh_tiles<1, 1>;
    run(*v, x, grad, sums + thread * size, scratch + thread * each, start, stop);
  });
}
}
