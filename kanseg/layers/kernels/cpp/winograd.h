// Convolution with a kernel of 3 an axis and stride 1 by Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308):
// F(4, 3) along rows and columns, F(2, 3) along depth; a picture has no depth. Channels-last, multiples of 16 channels.
// A tile of outputs is DO x 4 x 4, of inputs DI x 6 x 6, (DI, DO) = (4, 2) for volumes and (1, 1) for pictures.
// Weights are given transformed, (DI * 36, in, out). Included by rows.h's files after it.
//
// What is convolved may be an expansion (rows.h): some planes of it at a time lie in a ring of memory that fits the
// cache, made when the tiles come to them; and the gradient at it goes through its functions tile by tile. So it is
// never written to main memory.

// Sizes of one call; pad is what lies before the first plane, row and column.
struct Volume {
  int samples, depth, height, width, in, out;     // of the input
  int out_depth, out_height, out_width;           // of the output
  int pad_depth, pad_height, pad_width;
};

// What is convolved: `input[0]` as it is where there are no parts, else what the parts make of their inputs.
struct Source {
  const Expansion* part[2];
  const float* input[2];
  float* gradient[2];     // at the inputs, added to; may be null
  double* inner;          // sums of `contract`, of the second part if there is one
  float* phases;
  double* phases_total;
};

// A number for each output that depends on its distance to the border: table[(depth, row, column), out].
struct Border {
  const int* depth;       // class of each position along the axis
  const int* row;
  const int* column;
  const float* table;
  int rows, columns;      // classes
};

namespace {

#if W == 16
const int MR = 12;  // rows of the product kept in registers, of two vectors each
#elif W == 8
const int MR = 6;
#else
const int MR = 4;
#endif
const int SLICE = 32;     // channels worked on together
const int COLUMNS = 64;   // channels of the output that are, where there are many
const int GAP = 16;       // floats between two positions, an odd number of cache lines: neighbours fall in different sets
const int MOST_TILES = 48;
const Size CACHE = 1 << 18;  // floats of the second cache, one core's own
const Size RING = 3 << 19;   // floats of an expansion that stay in the third

// In place: six voxels of a line -> six numbers; four planes -> four.
INLINE void filter_six(V* d) {
  V a = d[0], b = d[1], c = d[2], e = d[3], f = d[4], g = d[5];
  V low = f - 4.0f * c, high = e - 4.0f * b, far = f - c, near = e - b;
  d[0] = (f - 5.0f * c) + 4.0f * a;
  d[1] = low + high;
  d[2] = low - high;
  d[3] = far + 2.0f * near;
  d[4] = far - 2.0f * near;
  d[5] = (g - 5.0f * e) + 4.0f * b;
}

INLINE void filter_four(V* d) {
  V a = d[0], b = d[1], c = d[2], e = d[3];
  d[0] = a - c;
  d[1] = b + c;
  d[2] = c - b;
  d[3] = b - e;
}

// Six products -> four outputs, in place; and its transpose, four -> six.
INLINE void gather_six(V* m) {
  V a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
  m[0] = m[0] + a + c;
  m[1] = b + 2.0f * e;
  m[2] = a + 4.0f * c;
  m[3] = b + 8.0f * e + m[5];
}

INLINE void spread_six(V* y) {
  V even = y[0] + y[2], odd = y[1] + y[3], wide = y[0] + 4.0f * y[2], steep = 2.0f * y[1] + 8.0f * y[3];
  y[5] = y[3];
  y[1] = even + odd;
  y[2] = even - odd;
  y[3] = wide + steep;
  y[4] = wide - steep;
}

// Four products -> two outputs; and its transpose.
INLINE void gather_four(V* m) {
  V a = m[0], b = m[1], c = m[2], e = m[3];
  m[0] = a + b + c;
  m[1] = b - c - e;
}

INLINE void spread_four(V* y) {
  V a = y[0], b = y[1];
  y[1] = a + b;
  y[2] = a - b;
  y[3] = -b;
}

struct Tile {
  int sample, depth, row, column;  // of its first output
};

// Tiles that are worked on one after another, in planes, rows and columns of tiles.
struct Box {
  int sample, depth, depths, row, rows;
};

// How a call is cut: boxes of so many planes and rows of tiles, `tiles` of a box at once.
struct Cut {
  int across, down, deep;          // tiles in all
  int depths, rows, tiles;
  int chunks, bands;               // boxes along depth and rows
  Size slot, slots;                // floats of a plane in the ring, and planes
};

INLINE int parts(int whole, int part) { return (whole + part - 1) / part; }
INLINE int least(int a, int b) { return a < b ? a : b; }

// Bytes that move for one tile: the weight once for all that are worked on together, and what the second cache cannot
// hold of their transforms.
INLINE Size traffic(Size positions, int in, int out, int tiles, int passes) {
  const Size weights = passes * positions * in * out / tiles;
  const Size held = positions * tiles * (SLICE + out);
  return weights + (held > CACHE ? (Size)parts(in, SLICE) * 6 * positions * out : 0);
}

template <int DI, int DO>
Cut cut(const Volume& v, bool ring, int threads, int passes, int columns) {
  Cut c;
  c.across = parts(v.out_width, 4);
  c.down = parts(v.out_height, 4);
  c.deep = parts(v.out_depth, DO);
  c.rows = c.down;
  c.depths = c.deep;
  const Size row = (Size)v.width * v.in;
  if (ring) {
    const Size plane = row * v.height;
    if ((2 * DO + DI - DO) * plane > RING) {
      c.depths = 1;
      const Size rows = (RING / (DI * row) - 2) / 4;
      c.rows = rows < 1 ? 1 : rows < c.down ? (int)rows : c.down;
      if (c.rows > 1) c.rows = parts(c.down, parts(c.down, c.rows));  // of one size
    } else {
      const Size depths = (RING / plane - (DI - DO)) / DO;
      if (depths < c.deep) c.depths = (int)depths;
    }
  }
  // enough boxes for the threads
  while (v.samples * parts(c.deep, c.depths) * parts(c.down, c.rows) < threads && c.depths > 1) --c.depths;
  while (v.samples * parts(c.deep, c.depths) * parts(c.down, c.rows) < threads && c.rows > 1) --c.rows;
  c.chunks = parts(c.deep, c.depths);
  c.bands = parts(c.down, c.rows);
  c.slot = ring ? row * (c.rows == c.down ? v.height : 4 * c.rows + 2) : 0;
  c.slots = c.depths * DO + DI - DO;
  c.tiles = MR;
  for (int tiles = 2 * MR; tiles <= MOST_TILES; tiles += MR) {
    const Size now = traffic(DI * 36, v.in, columns, tiles, passes);
    if (now < traffic(DI * 36, v.in, columns, c.tiles, passes)) c.tiles = tiles;
  }
  return c;
}

INLINE Size box_count(const Volume& v, const Cut& c) { return (Size)v.samples * c.bands * c.chunks; }

INLINE Box box_at(const Cut& c, Size index) {
  Box b;
  b.depth = (int)(index % c.chunks) * c.depths;
  b.depths = least(c.depths, c.deep - b.depth);
  index /= c.chunks;
  b.row = (int)(index % c.bands) * c.rows;
  b.rows = least(c.rows, c.down - b.row);
  b.sample = (int)(index / c.bands);
  return b;
}

template <int DO>
INLINE Tile tile_at(const Cut& c, const Box& b, int index) {
  Tile t;
  t.column = 4 * (index % c.across);
  index /= c.across;
  t.row = 4 * (b.row + index % b.rows);
  t.depth = DO * (b.depth + index / b.rows);
  t.sample = b.sample;
  return t;
}

INLINE bool inside(int index, int size) { return index >= 0 && index < size; }

// The compiler must unroll the loops over the positions of a tile, so that a line of them stays in registers.
#define UNROLL _Pragma("GCC unroll 6")

// N voxels of a line, zero but for those from `low` up to `high`.
template <int N>
INLINE void read_line(V* line, const float* from, Size across, int low, int high) {
  if (low <= 0 && high >= N) {
    UNROLL for (int q = 0; q < N; ++q) line[q] = load(from + q * across);
  } else {
    UNROLL for (int q = 0; q < N; ++q) line[q] = q >= low && q < high ? load(from + q * across) : V{};
  }
}

// N positions of d, `step` apart.
template <int N>
INLINE void get(V* line, const V* d, int step) {
  UNROLL for (int i = 0; i < N; ++i) line[i] = d[i * step];
}

template <int N>
INLINE void put(const V* line, V* d, int step) {
  UNROLL for (int i = 0; i < N; ++i) d[i * step] = line[i];
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

// Planes of the input where a box sees them: plane d is at base + (d % slots) * plane, from its row `first` on.
struct Window {
  const float* base;
  Size plane;
  int slots, first;
};

// The expansion in the ring of one thread; planes before `made` are there for boxes of that sample and those rows.
struct Ring {
  float* memory;
  int sample, row, made;
};

template <int DI, int DO>
Window window_at(const Volume& v, const Source& s, const Expand* expand, const Cut& c, const Box& b, Ring& ring) {
  const Size row = (Size)v.width * v.in, plane = row * v.height;
  if (!s.part[0]) return {s.input[0] + b.sample * v.depth * plane, plane, v.depth, 0};
  const int top = 4 * b.row - v.pad_height, bottom = 4 * (b.row + b.rows) + 2 - v.pad_height;
  const int first = top > 0 ? top : 0, last = least(bottom, v.height);
  const int front = DO * b.depth - v.pad_depth, back = DO * (b.depth + b.depths) + DI - DO - v.pad_depth;
  if (ring.sample != b.sample || ring.row != b.row) ring.made = 0;
  for (int d = front > ring.made ? front : ring.made; d < least(back, v.depth); ++d) {
    for (int k = 0; k < 2 && s.part[k]; ++k) {
      const Size at = ((Size)b.sample * v.depth + d) * v.height + first;
      const Size channels = s.part[k]->channels;
      expand[k](*s.part[k], s.input[k] + at * v.width * channels, ring.memory + (d % c.slots) * c.slot, 0,
                (Size)(last - first) * v.width, (int)channels);
    }
    ring.made = d + 1;
  }
  ring.sample = b.sample;
  ring.row = b.row;
  return {ring.memory, c.slot, (int)c.slots, first};
}

// Transformed inputs of one tile, channels first ... first + count: to[position * stride + channel].
template <int DI>
void read_tile(const Volume& v, const Window& w, Tile t, int first, int count, float* to, Size stride) {
  V d[DI * 36];
  const int depth = t.depth - v.pad_depth, row = t.row - v.pad_height, column = t.column - v.pad_width;
  const Size across = v.in, down = across * v.width;
  const float* planes[DI];
  for (int z = 0; z < DI; ++z) {
    const bool there = inside(depth + z, v.depth);
    planes[z] = there ? w.base + ((depth + z) % w.slots) * w.plane + (row - w.first) * down + column * across + first : 0;
  }
  for (int c = 0; c < count; c += W) {
    for (int z = 0; z < DI; ++z) {
      UNROLL for (int r = 0; r < 6; ++r) {
        const bool there = planes[z] && inside(row + r, v.height);
        V line[6];
        read_line<6>(line, planes[z] + r * down + c, across, there ? -column : 6, v.width - column);
        filter_six(line);
        put<6>(line, d + (z * 6 + r) * 6, 1);
      }
      UNROLL for (int q = 0; q < 6; ++q) {
        V line[6];
        get<6>(line, d + z * 36 + q, 6);
        filter_six(line);
        if (DI == 4) {
          put<6>(line, d + z * 36 + q, 6);
        } else {
          UNROLL for (int r = 0; r < 6; ++r) store(to + (r * 6 + q) * stride + c, line[r]);
        }
      }
    }
    if (DI == 4) {
      UNROLL for (int p = 0; p < 36; ++p) {
        V line[4];
        get<4>(line, d + p, 36);
        filter_four(line);
        UNROLL for (int z = 0; z < 4; ++z) store(to + (z * 36 + p) * stride + c, line[z]);
      }
    }
  }
}

// `count` channels of the outputs of one tile at y + place from their products, added up over the channels of the
// input: from[position * stride + channel].
template <int DI, int DO>
void write_tile(
    const Volume& v, float* y, Place at, Tile t, int count, const float* from, Size stride, const Border* border) {
  V m[DO * 36];
  const int planes = least(v.out_depth - t.depth, DO);
  const int rows = least(v.out_height - t.row, 4), columns = least(v.out_width - t.column, 4);
  for (int c = 0; c < count; c += W) {
    UNROLL for (int p = 0; p < 36; ++p) {
      V line[DI];
      UNROLL for (int z = 0; z < DI; ++z) line[z] = load(from + (z * 36 + p) * stride + c);
      if (DI == 4) gather_four(line);
      put<DO>(line, m + p, 36);
    }
    for (int z = 0; z < planes; ++z) {
      UNROLL for (int q = 0; q < 6; ++q) {
        V line[6];
        get<6>(line, m + z * 36 + q, 6);
        gather_six(line);
        put<4>(line, m + z * 36 + q, 6);
      }
      for (int r = 0; r < rows; ++r) {
        V line[6];
        get<6>(line, m + z * 36 + r * 6, 1);
        gather_six(line);
        if (border) {
          const int of_row = (border->depth[t.depth + z] * border->rows + border->row[t.row + r]) * border->columns;
          UNROLL for (int q = 0; q < 4; ++q) {
            const int column = border->column[t.column + (q < columns ? q : 0)];
            line[q] += load(border->table + (Size)(of_row + column) * v.out + c);
          }
        }
        float* to = y + at.corner + z * at.deep + r * at.down + c;
        UNROLL for (int q = 0; q < 4; ++q) {
          if (q < columns) store(to + q * at.across, line[q]);
        }
      }
    }
  }
}

// The transpose of write_tile for the gradient y of the outputs.
template <int DI, int DO>
void read_gradient(const Volume& v, const float* y, Tile t, float* to, Size stride) {
  V m[DO * 36];
  const Place at = outputs_of(v, t);
  for (int c = 0; c < v.out; c += W) {
    for (int z = 0; z < DO; ++z) {
      UNROLL for (int r = 0; r < 4; ++r) {
        const bool there = t.depth + z < v.out_depth && t.row + r < v.out_height;
        V line[6];
        read_line<4>(line, y + at.corner + z * at.deep + r * at.down + c, at.across, there ? 0 : 4, v.out_width - t.column);
        spread_six(line);
        put<6>(line, m + z * 36 + r * 6, 1);
      }
      UNROLL for (int q = 0; q < 6; ++q) {
        V line[6];
        get<4>(line, m + z * 36 + q, 6);
        spread_six(line);
        put<6>(line, m + z * 36 + q, 6);
      }
    }
    UNROLL for (int p = 0; p < 36; ++p) {
      V line[DI];
      get<DO>(line, m + p, 36);
      if (DI == 4) spread_four(line);
      UNROLL for (int z = 0; z < DI; ++z) store(to + (z * 36 + p) * stride + c, line[z]);
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

enum { FORWARD = 0, BACK = 1, WEIGHT = 2 };

// One call: how it is cut, and the memory of one thread, in floats.
template <int DI, int DO>
struct Plan {
  static const int positions = DI * 36;
  Volume v;
  Cut c;
  int columns;            // of the output that are worked on together
  bool held;              // whether all transformed inputs of a tile are kept
  Size in_step, out_step;  // from one position to the next
  Size inputs, products, voxels, ring;

  Plan(const Volume& volume, bool expanded, int threads, int job) : v(volume) {
    held = job == BACK;
    columns = held ? least(v.out, COLUMNS) : v.out;
    c = cut<DI, DO>(v, expanded && job != BACK, threads, job == WEIGHT ? 2 : 1, columns);
    in_step = (Size)c.tiles * SLICE + GAP;
    out_step = (Size)c.tiles * columns + GAP;
    inputs = (held ? parts(v.in, SLICE) : 1) * positions * in_step;
    products = positions * out_step;
    voxels = held ? (Size)c.tiles * DO * 16 * v.out : 0;
    ring = c.slots * c.slot;
  }

  Size scratch() const { return inputs + products + voxels + ring; }
  Size boxes() const { return box_count(v, c); }
};

// Call work(box, window, first tile, tiles) for what the boxes from `start` to `stop` hold.
template <int DI, int DO, class Work>
INLINE void for_tiles(const Plan<DI, DO>& plan, const Source& s, float* ring, Size start, Size stop, Work work) {
  Ring made = {ring, -1, -1, 0};
  Expand expand[2];
  Contract unused;
  for (int k = 0; k < 2 && s.part[k]; ++k) choose(*s.part[k], expand + k, &unused);
  for (Size index = start; index < stop; ++index) {
    const Box box = box_at(plan.c, index);
    const Window window = window_at<DI, DO>(plan.v, s, expand, plan.c, box, made);
    const int total = box.depths * box.rows * plan.c.across;
    for (int first = 0; first < total; first += plan.c.tiles) {
      work(box, window, first, least(total - first, plan.c.tiles));
    }
  }
}

// Products of `wide` columns of the output from `column` on, for the tiles of a block.
template <int DI, int DO>
void multiply(
    const Plan<DI, DO>& plan, const Box& box, const Window& window, int block, int tiles, const float* weight,
    int column, int wide, float* inputs, float* products) {
  const Volume& v = plan.v;
  __builtin_memset(products, 0, sizeof(float) * plan.products);
  for (int first = 0; first < v.in; first += SLICE) {
    const int count = least(v.in - first, SLICE);
    float* slice = inputs + (plan.held ? first / SLICE * plan.positions * plan.in_step : 0);
    for (int t = 0; t < tiles && column == 0; ++t) {
      read_tile<DI>(v, window, tile_at<DO>(plan.c, box, block + t), first, count, slice + t * SLICE, plan.in_step);
    }
    for (int p = 0; p < plan.positions; ++p) {
      product(tiles, wide, slice + p * plan.in_step, SLICE, 1, weight + ((Size)p * v.in + first) * v.out + column, v.out,
              products + p * plan.out_step, plan.columns, count);
    }
  }
}

template <int DI, int DO>
void forward(
    const Plan<DI, DO>& plan, const Source& s, const float* weight, const Border* border, float* y, float* scratch,
    Size start, Size stop) {
  float *inputs = scratch, *products = inputs + plan.inputs;
  for_tiles<DI, DO>(plan, s, products + plan.products, start, stop, [&](const Box& box, const Window& w, int block, int tiles) {
    multiply<DI, DO>(plan, box, w, block, tiles, weight, 0, plan.columns, inputs, products);
    for (int t = 0; t < tiles; ++t) {
      const Tile tile = tile_at<DO>(plan.c, box, block + t);
      write_tile<DI, DO>(plan.v, y, outputs_of(plan.v, tile), tile, plan.columns, products + (Size)t * plan.columns,
                         plan.out_step, border);
    }
  });
}

// Lead the gradient at the voxels of one tile, (DO * 16, out), through the functions of the source.
template <int DO>
INLINE void contract_tile(
    const Volume& v, const Source& s, const Contract* contract, Sums* sums, Tile tile, const float* upper) {
  for (int line = 0; line < DO * 4; ++line) {
    const int depth = tile.depth + line / 4, row = tile.row + line % 4;
    if (depth >= v.out_depth || row >= v.out_height) continue;
    const Size voxel = (((Size)tile.sample * v.out_depth + depth) * v.out_height + row) * v.out_width + tile.column;
    for (int k = 0; k < 2 && s.part[k]; ++k) {
      const Size at = voxel * s.part[k]->channels;
      contract[k](*s.part[k], s.input[k] + at, upper + (Size)line * 4 * v.out, s.gradient[k] ? s.gradient[k] + at : 0,
                  sums[k], 0, least(v.out_width - tile.column, 4), s.part[k]->channels);
    }
  }
}

template <int DI, int DO>
void back(
    const Plan<DI, DO>& plan, const Source& s, const float* weight, const float* grad, float* scratch, Size start,
    Size stop, int thread) {
  const Volume& v = plan.v;
  float *inputs = scratch, *products = inputs + plan.inputs, *voxels = products + plan.products;
  Contract contract[2];
  Sums sums[2];
  Expand unused;
  for (int k = 0; k < 2 && s.part[k]; ++k) {
    choose(*s.part[k], &unused, contract + k);
    const Size phases = 2 * (Size)thread * s.part[k]->functions * s.part[k]->channels;
    const bool learned = s.inner && s.part[k]->kind != NONE;
    sums[k] = no_sums(learned ? s.inner + thread * MOST : 0, learned && s.phases ? s.phases + phases : 0,
                      s.phases_total + phases);
  }
  const Source upper = {{0, 0}, {grad, 0}};
  for_tiles<DI, DO>(plan, upper, 0, start, stop, [&](const Box& box, const Window& w, int block, int tiles) {
    for (int column = 0; column < v.out; column += plan.columns) {
      const int wide = least(v.out - column, plan.columns);
      multiply<DI, DO>(plan, box, w, block, tiles, weight, column, wide, inputs, products);
      for (int t = 0; t < tiles; ++t) {
        const Place local = {v.out, 4 * v.out, 16 * v.out, (Size)t * DO * 16 * v.out};
        write_tile<DI, DO>(v, voxels + column, local, tile_at<DO>(plan.c, box, block + t), wide,
                           products + (Size)t * plan.columns, plan.out_step, 0);
      }
    }
    for (int t = 0; t < tiles; ++t) {
      contract_tile<DO>(v, s, contract, sums, tile_at<DO>(plan.c, box, block + t), voxels + (Size)t * DO * 16 * v.out);
    }
    for (int k = 0; k < 2 && s.part[k]; ++k) to_double(*s.part[k], sums[k]);
  });
}

template <int DI, int DO>
void weigh(
    const Plan<DI, DO>& plan, const Source& s, const float* grad, float* sums, float* scratch, Size start, Size stop) {
  const Volume& v = plan.v;
  float *inputs = scratch, *outputs = inputs + plan.inputs;
  for_tiles<DI, DO>(plan, s, outputs + plan.products, start, stop, [&](const Box& box, const Window& w, int block, int tiles) {
    for (int t = 0; t < tiles; ++t) {
      read_gradient<DI, DO>(v, grad, tile_at<DO>(plan.c, box, block + t), outputs + (Size)t * v.out, plan.out_step);
    }
    for (int first = 0; first < v.in; first += SLICE) {
      const int count = least(v.in - first, SLICE);
      for (int t = 0; t < tiles; ++t) {
        read_tile<DI>(v, w, tile_at<DO>(plan.c, box, block + t), first, count, inputs + t * SLICE, plan.in_step);
      }
      for (int p = 0; p < plan.positions; ++p) {
        product(count, v.out, inputs + p * plan.in_step, 1, SLICE, outputs + p * plan.out_step, v.out,
                sums + ((Size)p * v.in + first) * v.out, v.out, tiles);
      }
    }
  });
}

// run(plan, start, stop, thread) on all threads, for a volume or a picture.
template <class Run>
void run_plan(const Volume& v, int volume, bool expanded, int threads, int job, Run run) {
  if (volume) {
    const Plan<4, 2> plan(v, expanded, threads, job);
    share_out(plan.boxes(), threads, [&](Size start, Size stop, int thread) { run(plan, start, stop, thread); });
  } else {
    const Plan<1, 1> plan(v, expanded, threads, job);
    share_out(plan.boxes(), threads, [&](Size start, Size stop, int thread) { run(plan, start, stop, thread); });
  }
}

}  // namespace

extern "C" {

// Floats of scratch that one thread needs; job: 0 winograd, 1 winograd_back, 2 winograd_weight.
Size NAME(winograd_scratch)(const Volume* v, int volume, int expanded, int threads, int job) {
  return volume ? Plan<4, 2>(*v, expanded, threads, job).scratch() : Plan<1, 1>(*v, expanded, threads, job).scratch();
}

// y = convolution of the source, plus the border's numbers if there are any; scratch (threads, winograd_scratch)
void NAME(winograd)(
    const Volume* v, int volume, const Source* s, const float* weight, const Border* border, float* y, float* scratch,
    Size each, int threads) {
  run_plan(*v, volume, s->part[0], threads, FORWARD, [=](const auto& plan, Size start, Size stop, int thread) {
    forward(plan, *s, weight, border, y, scratch + thread * each, start, stop);
  });
}

// Leads grad, the gradient at the output, back through the convolution and the functions of the source. v describes
// the convolution that does so, from grad to the expansion; weight is its kernel
void NAME(winograd_back)(
    const Volume* v, int volume, const Source* s, const float* weight, const float* grad, float* scratch, Size each,
    int threads) {
  run_plan(*v, volume, true, threads, BACK, [=](const auto& plan, Size start, Size stop, int thread) {
    back(plan, *s, weight, grad, scratch + thread * each, start, stop, thread);
  });
}

// sums (threads, positions, in, out) += gradient at the transformed weight
void NAME(winograd_weight)(
    const Volume* v, int volume, const Source* s, const float* grad, float* sums, float* scratch, Size each,
    int threads) {
  const Size size = (Size)(volume ? 144 : 36) * v->in * v->out;
  run_plan(*v, volume, s->part[0], threads, WEIGHT, [=](const auto& plan, Size start, Size stop, int thread) {
    weigh(plan, *s, grad, sums + thread * size, scratch + thread * each, start, stop);
  });
}
}
