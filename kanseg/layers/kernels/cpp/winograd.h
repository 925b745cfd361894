// Convolution with a kernel of 3 an axis and stride 1 by Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308):
// F(4, 3) along rows and columns, F(2, 3) along depth; a picture has no depth. Channels-last. Included by rows.h's files
// after it.
//
// A tile of outputs is DO x 4 x 4, of inputs DI x 6 x 6, (DI, DO) = (4, 2) for volumes and (1, 1) for pictures. What is
// convolved is transformed along rows and columns plane by plane, each plane once; these planes stay in the cache while
// the tiles that see them are worked on. For each of the 36 places in a plane the transform along depth, the products
// with the weight and the way back along depth happen in the first cache.
//
// What is convolved may be an expansion (rows.h), made row by row; and the gradient at it goes through its functions
// line by line. So it is never written to main memory.

// Sizes of one call; pad is what lies before the first plane, row and column.
struct Volume {
  int samples, depth, height, width, in, out;     // of the input
  int out_depth, out_height, out_width;           // of the output
  int pad_depth, pad_height, pad_width;
  int kernel[3], stride[3];                       // for direct.h; 3 and 1 here
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

// The weight of the convolution, or its gradient: at[o * of_out + i * of_in + tap], the taps from the last where flipped.
struct Kernel {
  float* at;
  Size of_out, of_in;
  int flipped;
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
const int SLICE = 128;    // floats of a voxel of the expansion worked on together, if channels can be parted so
const int LEFT = 128;     // of them that one product takes
const int GAP = 16;       // floats between two positions, an odd number of cache lines: neighbours fall in different sets
const int TILES = 48;     // rows of a product
const int CHUNK = 256;    // floats of a line of outputs transformed together
const Size MOST_FLOATS = 1 << 19;  // of a box; they stay in the third cache

// The compiler must unroll the loops over the positions of a tile, so that a line of them stays in registers.
#define UNROLL _Pragma("GCC unroll 6")

INLINE int parts(int whole, int part) { return (whole + part - 1) / part; }
INLINE int least(int a, int b) { return a < b ? a : b; }
INLINE int most(int a, int b) { return a > b ? a : b; }
INLINE Size padded(Size floats) { return (floats + 15) / 16 * 16; }
INLINE bool inside(int index, int size) { return index >= 0 && index < size; }

// ---------------------------------------------------------------------------------------------- transforms of a line

// Six voxels -> six numbers, in place.
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

// Number z of four planes, (planes + z)[FIRST[z]] +- (planes + z)[SECOND[z]], minus but for the second.
const int FIRST[4] = {0, 1, 2, 1}, SECOND[4] = {2, 2, 1, 3};

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

// Three taps -> six and four numbers, in place; and the transposes.
INLINE void widen_six(V* w) {
  V a = w[0], b = w[1], c = w[2], even = (a + c) * (-1.0f / 6), far = (a + 4.0f * c) * (1.0f / 24);
  w[0] = 0.25f * a;
  w[1] = even - b * (1.0f / 6);
  w[2] = even + b * (1.0f / 6);
  w[3] = far + b * (1.0f / 12);
  w[4] = far - b * (1.0f / 12);
  w[5] = c;
}

INLINE void widen_four(V* w) {
  V a = w[0], b = w[1], c = w[2], even = 0.5f * (a + c);
  w[1] = even + 0.5f * b;
  w[2] = even - 0.5f * b;
  w[3] = c;
}

INLINE void narrow_six(V* m) {
  V near = (m[1] + m[2]) * (1.0f / 6), tilt = (m[1] - m[2]) * (1.0f / 6);
  V far = (m[3] + m[4]) * (1.0f / 6), steep = (m[3] - m[4]) * (1.0f / 12);
  m[0] = 0.25f * m[0] - near + 0.25f * far;
  m[1] = steep - tilt;
  m[2] = far - near + m[5];
}

INLINE void narrow_four(V* m) {
  V even = 0.5f * (m[1] + m[2]);
  m[0] = m[0] + even;
  m[1] = 0.5f * (m[1] - m[2]);
  m[2] = even + m[3];
}

// N numbers, `step` apart, and back.
template <int N>
INLINE void get(V* line, const float* from, Size step) {
  UNROLL for (int i = 0; i < N; ++i) line[i] = load(from + i * step);
}

template <int N>
INLINE void put(const V* line, float* to, Size step) {
  UNROLL for (int i = 0; i < N; ++i) store(to + i * step, line[i]);
}

// ---------------------------------------------------------------------------------------------- the plan of a call

enum { FORWARD = 0, BACK = 1, WEIGHT = 2 };

// Tiles that are worked on one after another, in planes, rows and columns of tiles.
struct Box {
  int sample, depth, depths, row, rows;
};

// Channels of the expansion are worked on a slice at a time: slices of what is convolved, or where a gradient is led back
// to it slices of the result; the others all together.
struct Slices {
  Volume v;
  bool back, expanded;
  int branches, channels, width, slices;  // of the expansion; the channels of a slice
  int in, columns;                        // floats of a voxel of a slice of what is convolved, and of the result
  Size strip;                             // of memory for a row; its second half is for `few`

  Slices(const Volume& volume, int of_branches, int job) : v(volume), back(job == BACK) {
    expanded = of_branches && !back;
    branches = most(of_branches, 1);
    channels = (back ? v.out : v.in) / branches;
    width = channels;
    if (channels % 16 == 0) width = least(channels, most(SLICE / branches / 16, 1) * 16);
    slices = parts(channels, width);
    in = back ? v.in : branches * width;
    columns = (int)padded(back ? branches * width : v.out);
    strip = 2 * (padded((Size)v.width * in) + GAP);
  }

  // Whether channels that fill little of a vector can be worked on as if a row of voxels were one voxel.
  bool few(const Source& s) const { return channels < FEW && !s.part[0]->low && !(s.part[1] && s.part[1]->low); }

  // Channels of a slice, from its first on.
  int first(int slice) const { return slice * width; }
  int wide(int slice) const { return least(width, channels - slice * width); }
  int sliced(int slice) const { return branches * wide(slice); }
  // Channel of the expansion that float k of a voxel of a slice is.
  int channel(int slice, int k) const { return k / wide(slice) * channels + first(slice) + k % wide(slice); }
  // Rows and columns of the weight of a slice.
  int rows_of(int slice) const { return back ? v.in : sliced(slice); }
  int columns_of(int slice) const { return back ? (int)padded(sliced(slice)) : columns; }

  // Row k and column j of it in a kernel; null beyond the last channel.
  float* at(const Kernel& kernel, int slice, int k, int j) const {
    if (j >= (back ? sliced(slice) : v.out)) return 0;
    const int out = back ? channel(slice, j) : j, in = back ? k : channel(slice, k);
    return kernel.at + out * kernel.of_out + in * kernel.of_in;
  }
};

// How a call is cut, and its memory in floats.
template <int DI, int DO>
struct Plan : Slices {
  static const int positions = DI * 36;
  int room;                               // floats of a voxel with the gap behind them
  int across, down, deep;                 // tiles in all
  int rows, depths, bands, chunks;        // of a box, and boxes
  int tiles, slots;                       // of a plane of a box, and planes kept
  Size line, lines;                       // the transform of a row, and of six
  Size place, plane;                      // from a position to the next in a plane, and the plane
  Size spot, panel;                       // the same of products, and of the weight
  Size each;                              // memory of one thread
  bool alone;                             // one box: the weight of a slice is transformed when it is its turn

  Plan(const Volume& volume, int of_branches, int threads, int job) : Slices(volume, of_branches, job) {
    room = (int)padded(in);
    across = parts(v.out_width, 4);
    down = parts(v.out_height, 4);
    deep = parts(v.out_depth, DO);
    cut(threads, job == WEIGHT ? 2 : 1);
    bands = parts(down, rows);
    chunks = parts(deep, depths);
    alone = threads == 1 && boxes() == 1;
    tiles = rows * across;
    slots = kept(depths);
    line = (Size)across * room + GAP;
    lines = 36 * line;
    place = (Size)tiles * room + GAP;
    plane = 36 * place;
    spot = (Size)depths * tiles * columns + GAP;
    panel = (Size)DI * in * columns + GAP;
    each = strip + lines + slots * plane + DO * 36 * spot + TILES * (LEFT + (DI + 1) * (Size)columns);
    each += 24 * (Size)most(CHUNK, columns) + padded(4 * (Size)most(CHUNK, columns));
    if (job == WEIGHT) each += shared();
  }

  // The transformed weight, and where that of a slice is in it.
  Size shared() const { return (alone ? 1 : slices) * 36 * panel; }
  Size of_slice(int slice) const { return alone ? 0 : slice * 36 * panel; }
  Size boxes() const { return (Size)v.samples * bands * chunks; }
  int kept(int steps) const { return DO * steps + DI - DO; }
  bool retained() const { return back || slices == 1; }  // whether planes serve the next box

  // Choose rows and depths of a box: few floats moved for a tile, the weight's for all tiles of the box at once and those
  // of voxels which are expanded more than once. Enough boxes for the threads.
  void cut(int threads, int passes) {
    const double weights = (double)passes * positions * in * columns * slices;
    double best = 0;
    rows = depths = 0;
    for (int r = 1; r <= down; ++r) {
      if (r > 1 && parts(down, r) == parts(down, r - 1)) continue;  // of one size
      for (int d = 1; d <= deep; ++d) {
        if (d > 1 && parts(deep, d) == parts(deep, d - 1)) continue;
        const double tiles = (double)r * across * d;
        const double held = 36.0 * r * across * kept(d) * room + DO * 36 * tiles * columns;
        const bool few = (Size)v.samples * parts(down, r) * parts(deep, d) < threads;
        if (rows && (held > MOST_FLOATS || few)) continue;
        const double again = (1 + 0.5 / r) * (retained() ? 1 : kept(d) / (double)(DO * d));
        const double cost = weights / tiles + 3.0 * DO * 16 * in * slices * again;
        if (rows && cost >= best) continue;
        best = cost;
        rows = r;
        depths = d;
      }
    }
  }

  Box box(Size index) const {
    Box b;
    b.depth = (int)(index % chunks) * depths;
    b.depths = least(depths, deep - b.depth);
    index /= chunks;
    b.row = (int)(index % bands) * rows;
    b.rows = least(rows, down - b.row);
    b.sample = (int)(index / bands);
    return b;
  }
};

// The memory of a thread.
struct Memory {
  float *strip, *lines, *planes, *products, *left, *right, *sums, *outputs, *voxels, *weight;

  template <class P>
  Memory(const P& plan, int depth_in, int depth_out, float* from) {
    const Size most_columns = most(CHUNK, plan.columns);
    strip = from;
    lines = strip + plan.strip;
    planes = lines + plan.lines;
    products = planes + plan.slots * plan.plane;
    left = products + depth_out * 36 * plan.spot;
    right = left + TILES * LEFT;
    sums = right + TILES * (Size)plan.columns;
    outputs = sums + TILES * depth_in * (Size)plan.columns;
    voxels = outputs + 24 * most_columns;
    weight = voxels + padded(4 * most_columns);
  }
};

// ---------------------------------------------------------------------------------------------- planes

// An expansion as the kernels of rows.h take it for one slice of its channels.
template <class P>
INLINE Expansion slice_of(const P& plan, const Expansion& e, int slice) {
  Expansion part = e;
  if (e.low) part.low += plan.first(slice);
  if (e.high) part.high += plan.first(slice);
  return part;
}

// What one call convolves.
template <class P>
struct Convolved {
  const P& plan;
  const Source& source;
  Expand expand[2];

  Convolved(const P& made, const Source& given) : plan(made), source(given) {
    Contract unused;
    for (int k = 0; k < 2 && source.part[k]; ++k) choose(*source.part[k], expand + k, &unused);
  }

  // Voxels of a row, `step` floats apart: as they are, or copied or expanded to `strip`.
  const float* row(int sample, int depth, int height, int slice, float* strip, Size* step) const {
    const Volume& v = plan.v;
    const Size at = (((Size)sample * v.depth + depth) * v.height + height) * v.width;
    if (plan.expanded) {
      *step = plan.sliced(slice);
      if (plan.few(source)) return few(at, strip);
      for (int k = 0; k < 2 && source.part[k]; ++k) {
        const Expansion e = slice_of(plan, *source.part[k], slice);
        expand[k](e, source.input[k] + at * plan.channels + plan.first(slice), strip, 0, v.width, plan.wide(slice),
                  plan.channels);
      }
      return strip;
    }
    *step = v.in;
    const float* from = source.input[0] + at * v.in + (plan.back ? 0 : plan.first(slice));
    if (v.in % W == 0) return from;
    __builtin_memcpy(strip, from, sizeof(float) * v.width * v.in);  // vectors may reach beyond the last voxel
    return strip;
  }

  // The same of channels that fill no vector: branch by branch, then voxel by voxel.
  const float* few(Size at, float* strip) const {
    const int channels = plan.channels;
    const Size row = (Size)plan.v.width * channels;
    float* by_branch = strip + plan.strip / 2;
    for (int k = 0; k < 2 && source.part[k]; ++k) {
      expand[k](*source.part[k], source.input[k] + at * channels, by_branch, 0, 1, (int)row, row);
    }
    for (Size i = 0; i < plan.v.width; ++i) {
      for (int r = 0; r < plan.branches; ++r) {
        for (int c = 0; c < channels; ++c) *strip++ = by_branch[r * row + i * channels + c];
      }
    }
    return strip - row * plan.branches;
  }
};

// Leads the gradient at rows of voxels of an expansion through its functions.
template <class P>
struct Led {
  const P& plan;
  const Source& source;
  Contract run[2];
  Sums sums[2];
  int slice, voxels, apart;
  bool few;
  const float* upper;

  Led(const P& made, const Source& given, int thread) : plan(made), source(given) {
    Expand unused;
    for (int k = 0; k < 2 && source.part[k]; ++k) {
      const Expansion& e = *source.part[k];
      choose(e, &unused, run + k);
      const Size phases = 2 * (Size)thread * sets(e) * e.channels;
      const bool learned = source.inner && e.kind != NONE;
      sums[k] = no_sums(learned ? source.inner + thread * MOST : 0, learned && source.phases ? source.phases + phases : 0,
                        source.phases_total + phases);
    }
  }

  // The gradient at `count` voxels, at(voxel) each, of a slice; to `memory` as the kernels of rows.h read it. In the
  // input they are `step` voxels from each other.
  template <class At>
  void take(int of_slice, float* memory, int count, int step, At at) {
    slice = of_slice;
    voxels = count;
    apart = step;
    few = plan.few(source) && step == 1;
    upper = memory;
    const int floats = plan.sliced(slice), wide = plan.wide(slice);
    for (int i = 0; i < count; ++i) {
      const float* value = at(i);
      for (int k = 0; few && k < floats; ++k) memory[(k / wide * count + i) * wide + k % wide] = value[k];
      for (int c = 0; !few && c < floats; c += W) store_some(memory + (Size)i * floats + c, load(value + c), floats - c);
    }
  }

  // What was taken, for the voxels of the input from number `at` on.
  void contract(Size at) {
    const int wide = plan.wide(slice), first = plan.first(slice);
    for (int k = 0; k < 2 && source.part[k]; ++k) {
      const Expansion part = slice_of(plan, *source.part[k], slice);
      const Size place = at * plan.channels + first;
      float* gradient = source.gradient[k] ? source.gradient[k] + place : 0;
      if (sums[k].phases) sums[k].phases += first;
      run[k](part, source.input[k] + place, upper, gradient, sums[k], 0, few ? 1 : voxels, few ? voxels * wide : wide,
             few ? voxels * wide : (Size)apart * plan.channels);
      if (sums[k].phases) sums[k].phases -= first;
    }
  }

  void count() {
    for (int k = 0; k < 2 && source.part[k]; ++k) to_double(*source.part[k], sums[k]);
  }
};

// A row -> six numbers for each of its tiles: to[number * step + tile * room + channel].
INLINE void filter_row(
    const float* from, Size across, int width, int pad, int tiles, int in, int room, float* to, Size step) {
  for (int t = 0; t < tiles; ++t) {
    const int column = 4 * t - pad, low = -column, high = width - column;
    const float* at = from + column * across;
    for (int c = 0; c < in; c += W) {
      V line[6];
      if (low <= 0 && high >= 6) {
        get<6>(line, at + c, across);
      } else {
        UNROLL for (int q = 0; q < 6; ++q) line[q] = q >= low && q < high ? load(at + q * across + c) : V{};
      }
      filter_six(line);
      put<6>(line, to + (Size)t * room + c, step);
    }
  }
}

// The rows of a box in one plane -> its transform, (36, tiles, room).
template <class P>
void filter_plane(const P& plan, const Convolved<P>& x, const Box& b, int depth, int slice, const Memory& m, float* to) {
  const Volume& v = plan.v;
  const int in = plan.back ? plan.in : plan.sliced(slice), top = 4 * b.row - v.pad_height;
  if (!inside(depth, v.depth)) {
    __builtin_memset(to, 0, sizeof(float) * plan.plane);
    return;
  }
  for (int t = 0; t < b.rows; ++t) {
    for (int r = t ? 2 : 0; r < 6; ++r) {
      const int row = top + 4 * t + r;
      float* line = m.lines + (4 * t + r) % 6 * 6 * plan.line;
      if (!inside(row, v.height)) {
        __builtin_memset(line, 0, sizeof(float) * 6 * plan.line);
        continue;
      }
      Size step;
      const float* from = x.row(b.sample, depth, row, slice, m.strip, &step);
      filter_row(from, step, v.width, v.pad_width, plan.across, in, plan.room, line, plan.line);
    }
    const Size count = (Size)plan.across * plan.room;
    for (int q = 0; q < 6; ++q) {
      const float* line[6];
      for (int r = 0; r < 6; ++r) line[r] = m.lines + ((4 * t + r) % 6 * 6 + q) * plan.line;
      float* at = to + q * plan.place + t * count;
      for (Size i = 0; i < count; i += W) {
        V six[6];
        UNROLL for (int r = 0; r < 6; ++r) six[r] = load(line[r] + i);
        filter_six(six);
        put<6>(six, at + i, 6 * plan.place);
      }
    }
  }
}

// Which planes of a band are there.
struct Ring {
  int sample, row, made;  // planes before `made`, counted from the first that the padding has
};

// Make the planes that a box sees.
template <int DI, int DO>
void filter_planes(
    const Plan<DI, DO>& plan, const Convolved<Plan<DI, DO>>& x, const Box& b, int slice, const Memory& m, Ring& ring) {
  const int front = DO * b.depth, end = front + plan.kept(b.depths);
  if (!plan.retained() || ring.sample != b.sample || ring.row != b.row) ring.made = 0;
  for (int d = most(front, ring.made); d < end; ++d) {
    filter_plane(plan, x, b, d - plan.v.pad_depth, slice, m, m.planes + d % plan.slots * plan.plane);
  }
  ring = {b.sample, b.row, end};
}

// Number Z of `count` tiles from `first` on: to[tile * LEFT + channel], channels from ... from + wide.
template <int Z, int DI, int DO>
INLINE void filter_depth(
    const Plan<DI, DO>& plan, const Box& b, int p, int first, int count, int from, int wide, const float* planes,
    float* to) {
  const int tiles = b.rows * plan.across;
  for (int d = first / tiles, begun = first % tiles; count > 0; ++d, begun = 0) {
    const int some = least(count, tiles - begun), depth = DO * (b.depth + d);
    const float* at = planes + p * plan.place + (Size)begun * plan.room + from;
    const float* one = at + (depth + (DI == 4 ? FIRST[Z] : 0)) % plan.slots * plan.plane;
    const float* two = at + (depth + (DI == 4 ? SECOND[Z] : 0)) % plan.slots * plan.plane;
    for (int t = 0; t < some; ++t, to += LEFT, one += plan.room, two += plan.room) {
      for (int c = 0; c < wide; c += W) {
        const V value = load(one + c);
        store(to + c, DI == 1 ? value : Z == 1 ? value + load(two + c) : value - load(two + c));
      }
    }
    count -= some;
  }
}

template <int DI, int DO>
void filter_depth(
    const Plan<DI, DO>& plan, const Box& b, int p, int z, int first, int count, int from, int wide,
    const float* planes, float* to) {
  if (z == 0) return filter_depth<0>(plan, b, p, first, count, from, wide, planes, to);
  if (z == 1) return filter_depth<1>(plan, b, p, first, count, from, wide, planes, to);
  if (z == 2) return filter_depth<2>(plan, b, p, first, count, from, wide, planes, to);
  filter_depth<3>(plan, b, p, first, count, from, wide, planes, to);
}

// ---------------------------------------------------------------------------------------------- products

// c[i, :] += or where FRESH = sum over k of a[i * ROW + k * STEP] * b[k, :], R rows and N vectors.
template <int R, int N, int ROW, int STEP, bool FRESH>
INLINE void product_block(const float* a, const float* b, Size b_row, float* c, Size c_row, int depth) {
  V sum[R][N];
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < N; ++j) sum[i][j] = FRESH ? V{} : load(c + i * c_row + j * W);
  }
  for (int k = 0; k < depth; ++k) {
    V right[N];
    for (int j = 0; j < N; ++j) right[j] = load(b + k * b_row + j * W);
    for (int i = 0; i < R; ++i) {
      const V left = set(a[i * ROW + k * STEP]);
      for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < N; ++j) store(c + i * c_row + j * W, sum[i][j]);
  }
}

template <int N, int ROW, int STEP, bool FRESH>
void product_columns(int rows, const float* a, const float* b, Size b_row, float* c, Size c_row, int depth) {
  int i = 0;
  for (; i + MR <= rows; i += MR) {
    product_block<MR, N, ROW, STEP, FRESH>(a + i * ROW, b, b_row, c + i * c_row, c_row, depth);
  }
  for (; i + 4 <= rows; i += 4) product_block<4, N, ROW, STEP, FRESH>(a + i * ROW, b, b_row, c + i * c_row, c_row, depth);
  for (; i < rows; ++i) product_block<1, N, ROW, STEP, FRESH>(a + i * ROW, b, b_row, c + i * c_row, c_row, depth);
}

template <int ROW, int STEP, bool FRESH>
void product(int rows, int columns, const float* a, const float* b, Size b_row, float* c, Size c_row, int depth) {
  int j = 0;
  for (; j + 2 * W <= columns; j += 2 * W) {
    product_columns<2, ROW, STEP, FRESH>(rows, a, b + j, b_row, c + j, c_row, depth);
  }
  for (; j < columns; j += W) product_columns<1, ROW, STEP, FRESH>(rows, a, b + j, b_row, c + j, c_row, depth);
}

// Products of a slice for the tiles of a box, back from depth: products[(plane * 36 + p) * spot + tile * columns + out],
// added to where not `fresh`; weight (36, DI, in, columns).
template <int DI, int DO>
void multiply(
    const Plan<DI, DO>& plan, const Box& b, int in, int columns, const float* weight, bool fresh, const Memory& m) {
  const int tiles = b.depths * b.rows * plan.across;
  for (int p = 0; p < 36; ++p) {
    for (int first = 0; first < tiles; first += TILES) {
      const int count = least(tiles - first, TILES);
      for (int from = 0; from < in; from += LEFT) {
        const int wide = least(in - from, LEFT);
        for (int z = 0; z < DI; ++z) {
          filter_depth(plan, b, p, z, first, count, from, wide, m.planes, m.left);
          const float* right = weight + p * plan.panel + ((Size)z * in + from) * columns;
          float* to = DI == 4 ? m.sums + z * TILES * (Size)columns : m.products + p * plan.spot + (Size)first * columns;
          if (from || (DI == 1 && !fresh)) {
            product<LEFT, 1, false>(count, columns, m.left, right, columns, to, columns, wide);
          } else {
            product<LEFT, 1, true>(count, columns, m.left, right, columns, to, columns, wide);
          }
        }
      }
      if (DI == 1) continue;
      const Size next = TILES * (Size)columns;
      float *one = m.products + p * plan.spot + (Size)first * columns, *two = one + 36 * plan.spot;
      for (Size i = 0; i < (Size)count * columns; i += W) {
        V z[4];
        get<4>(z, m.sums + i, next);
        const V even = z[0] + z[1] + z[2], odd = z[1] - z[2] - z[3];
        store(one + i, fresh ? even : load(one + i) + even);
        store(two + i, fresh ? odd : load(two + i) + odd);
      }
    }
  }
}

// Gradient at the transformed weight of a slice, (36, DI, in, out), added to it where not `fresh`; products hold that at the outputs.
template <int DI, int DO>
void weigh(const Plan<DI, DO>& plan, const Box& b, int in, float* weight, bool fresh, const Memory& m) {
  const int tiles = b.depths * b.rows * plan.across, columns = plan.columns;
  for (int p = 0; p < 36; ++p) {
    for (int first = 0; first < tiles; first += TILES) {
      const int count = least(tiles - first, TILES);
      const float *one = m.products + p * plan.spot + (Size)first * columns, *two = one + 36 * plan.spot;
      for (int z = 0; z < DI; ++z) {
        const float* right = z || DI == 1 ? m.right : one;
        for (Size i = 0; z && i < (Size)count * columns; i += W) {
          const V back = load(two + i);
          store(m.right + i, z == 3 ? -back : z == 1 ? load(one + i) + back : load(one + i) - back);
        }
        if (DI == 1) right = one;
        for (int from = 0; from < in; from += LEFT) {
          const int wide = least(in - from, LEFT);
          filter_depth(plan, b, p, z, first, count, from, wide, m.planes, m.left);
          float* to = weight + p * plan.panel + ((Size)z * in + from) * columns;
          if (fresh && first == 0) {
            product<1, LEFT, true>(wide, columns, m.left, right, columns, to, columns, count);
          } else {
            product<1, LEFT, false>(wide, columns, m.left, right, columns, to, columns, count);
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- outputs

// A line of `tiles` tiles of outputs from products, row by row: work(row, out), out[(6 numbers, tiles, columns)] then
// four outputs in the first four of the six.
template <class P, class Work>
INLINE void gather_tiles(const P& plan, const float* products, int tiles, int columns, int rows, float* line, Work work) {
  const Size count = (Size)tiles * columns;
  for (int q = 0; q < 6; ++q) {
    for (Size i = 0; i < count; i += W) {
      V six[6];
      get<6>(six, products + q * plan.spot + i, 6 * plan.spot);
      gather_six(six);
      put<4>(six, line + q * count + i, 6 * count);
    }
  }
  for (int r = 0; r < rows; ++r) {
    float* out = line + 6 * r * count;
    for (Size i = 0; i < count; i += W) {
      V six[6];
      get<6>(six, out + i, count);
      gather_six(six);
      put<4>(six, out + i, count);
    }
    work(r, out);
  }
}

// Call work(depth, row, column of the output, tiles, voxels) for each row of outputs of a box, some tiles at a time;
// voxels[number in the tile * step + tile * columns + channel].
template <int DI, int DO, class Work>
INLINE void gather_box(const Plan<DI, DO>& plan, const Box& b, int columns, const Memory& m, Work work) {
  const Volume& v = plan.v;
  const int together = most(CHUNK / columns, 1);
  for (int d = 0; d < DO * b.depths; ++d) {
    const int depth = DO * b.depth + d;
    for (int t = 0; t < b.rows && depth < v.out_depth; ++t) {
      const int row = 4 * (b.row + t);
      for (int first = 0; first < plan.across; first += together) {
        const int tiles = least(together, plan.across - first);
        const Size tile = ((Size)(d / DO) * b.rows + t) * plan.across + first;
        const float* from = m.products + d % DO * 36 * plan.spot + tile * columns;
        gather_tiles(plan, from, tiles, columns, least(4, v.out_height - row), m.outputs,
                     [&](int r, const float* out) { work(depth, row + r, 4 * first, tiles, out); });
      }
    }
  }
}

// A voxel of the output, and what the border adds.
INLINE void write_voxel(const Volume& v, const float* value, const Border* border, int of_row, int column, float* to) {
  const float* added = border ? border->table + (Size)(of_row + border->column[column]) * v.out : 0;
  for (int c = 0; c < v.out; c += W) {
    const V sum = added ? load(value + c) + load_some(added + c, v.out - c) : load(value + c);
    store_some(to + c, sum, v.out - c);
  }
}

// Gradient at the outputs of a box, to where its products would be.
template <int DI, int DO>
void spread_box(const Plan<DI, DO>& plan, const Box& b, const float* y, const Memory& m) {
  const Volume& v = plan.v;
  const int columns = plan.columns, together = most(CHUNK / columns, 1);
  for (int d = 0; d < DO * b.depths; ++d) {
    const int depth = DO * b.depth + d;
    for (int t = 0; t < b.rows; ++t) {
      for (int first = 0; first < plan.across; first += together) {
        const int tiles = least(together, plan.across - first);
        const Size count = (Size)tiles * columns;
        const Size tile = ((Size)(d / DO) * b.rows + t) * plan.across + first;
        float* to = m.products + d % DO * 36 * plan.spot + tile * columns;
        for (int r = 0; r < 4; ++r) {
          const int row = 4 * (b.row + t) + r;
          const bool there = depth < v.out_depth && row < v.out_height;
          for (int i = 0; i < tiles; ++i) {
            const int column = 4 * (first + i), high = there ? v.out_width - column : 0;
            const float* from = y + ((((Size)b.sample * v.out_depth + depth) * v.out_height + row) * v.out_width + column) * v.out;
            for (int c = 0; c < columns; c += W) {
              V line[6];
              UNROLL for (int q = 0; q < 4; ++q) line[q] = q < high && c < v.out ? load_some(from + q * v.out + c, v.out - c) : V{};
              spread_six(line);
              put<6>(line, m.outputs + r * 6 * count + (Size)i * columns + c, count);
            }
          }
        }
        for (int q = 0; q < 6; ++q) {
          for (Size i = 0; i < count; i += W) {
            V line[6];
            get<4>(line, m.outputs + q * count + i, 6 * count);
            spread_six(line);
            put<6>(line, to + q * plan.spot + i, 6 * plan.spot);
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- the weight

template <int DI>
INLINE float* tap_of(float* at, const Kernel& kernel, int tap) {
  const int taps = DI == 4 ? 27 : 9;
  return at + (kernel.flipped ? taps - 1 - tap : tap);
}

// Transform row k of a slice of the weight: to (36, DI, in, columns).
template <int DI, int DO>
void widen_row(const Plan<DI, DO>& plan, int number, int k, const Kernel& kernel, float* to) {
  const int rows_in = plan.rows_of(number), columns = plan.columns_of(number);
  const int planes = DI == 4 ? 3 : 1;
  for (int j = 0; j < columns; j += W) {
    float taps[planes * 9][W];
    for (int i = 0; i < W; ++i) {
      float* from = plan.at(kernel, number, k, j + i);
      for (int tap = 0; tap < planes * 9; ++tap) taps[tap][i] = from ? *tap_of<DI>(from, kernel, tap) : 0;
    }
    V d[planes][36];
    for (int z = 0; z < planes; ++z) {
      V rows[3][6];
      for (int r = 0; r < 3; ++r) {
        UNROLL for (int q = 0; q < 3; ++q) rows[r][q] = load(taps[(z * 3 + r) * 3 + q]);
        widen_six(rows[r]);
      }
      for (int q = 0; q < 6; ++q) {
        V line[6] = {rows[0][q], rows[1][q], rows[2][q]};
        widen_six(line);
        UNROLL for (int r = 0; r < 6; ++r) d[z][r * 6 + q] = line[r];
      }
    }
    for (int p = 0; p < 36; ++p) {
      V line[4] = {d[0][p]};
      if (DI == 4) {
        line[1] = d[planes / 2][p];
        line[2] = d[planes - 1][p];
        widen_four(line);
      }
      put<DI>(line, to + p * plan.panel + (Size)k * columns + j, (Size)rows_in * columns);
    }
  }
}

// The transpose of widen_row: the sum over `threads` parts, `next` floats apart, to the gradient of the kernel.
template <int DI, int DO>
void narrow_row(
    const Plan<DI, DO>& plan, int number, int k, const float* from, int threads, Size next, const Kernel& kernel) {
  const int rows_in = plan.rows_of(number), columns = plan.columns_of(number);
  const int planes = DI == 4 ? 3 : 1;
  for (int j = 0; j < columns; j += W) {
    V d[planes][36];
    for (int p = 0; p < 36; ++p) {
      V line[4] = {};
      for (int t = 0; t < threads; ++t) {
        const float* at = from + t * next + p * plan.panel + (Size)k * columns + j;
        UNROLL for (int z = 0; z < DI; ++z) line[z] += load(at + (Size)z * rows_in * columns);
      }
      if (DI == 4) narrow_four(line);
      for (int z = 0; z < planes; ++z) d[z][p] = line[z];
    }
    float taps[planes * 9][W];
    for (int z = 0; z < planes; ++z) {
      V rows[3][6];
      for (int q = 0; q < 6; ++q) {
        V line[6];
        UNROLL for (int r = 0; r < 6; ++r) line[r] = d[z][r * 6 + q];
        narrow_six(line);
        UNROLL for (int r = 0; r < 3; ++r) rows[r][q] = line[r];
      }
      for (int r = 0; r < 3; ++r) {
        narrow_six(rows[r]);
        UNROLL for (int q = 0; q < 3; ++q) store(taps[(z * 3 + r) * 3 + q], rows[r][q]);
      }
    }
    for (int i = 0; i < W; ++i) {
      float* to = plan.at(kernel, number, k, j + i);
      for (int tap = 0; to && tap < planes * 9; ++tap) *tap_of<DI>(to, kernel, tap) = taps[tap][i];
    }
  }
}

template <int DI, int DO>
void widen_slice(const Plan<DI, DO>& plan, int slice, const Kernel& kernel, float* to) {
  for (int k = 0; k < plan.rows_of(slice); ++k) widen_row(plan, slice, k, kernel, to);
}

// Call work(slice, row) for the rows of the transformed weight, on all threads.
template <class P, class Work>
void for_weight(const P& plan, int threads, Work work) {
  const int rows = plan.in;
  share_out((Size)plan.slices * rows, threads, [&](Size start, Size stop, int) {
    for (Size i = start; i < stop; ++i) {
      const int number = (int)(i / rows), k = (int)(i % rows);
      if (k < plan.rows_of(number)) work(number, k);
    }
  });
}

// ---------------------------------------------------------------------------------------------- calls

template <int DI, int DO>
void widen(const Plan<DI, DO>& plan, int threads, const Kernel& kernel, float* to) {
  if (plan.alone) return;
  for_weight(plan, threads, [&](int slice, int k) { widen_row(plan, slice, k, kernel, to + plan.of_slice(slice)); });
}

template <int DI, int DO>
void forward(
    const Plan<DI, DO>& plan, const Source& s, const Kernel& kernel, float* weight, const Border* border, float* y,
    float* memory, Size start, Size stop) {
  const Volume& v = plan.v;
  const Memory m(plan, DI, DO, memory);
  const Convolved<Plan<DI, DO>> x(plan, s);
  Ring ring = {-1, -1, 0};
  for (Size index = start; index < stop; ++index) {
    const Box b = plan.box(index);
    for (int slice = 0; slice < plan.slices; ++slice) {
      filter_planes(plan, x, b, slice, m, ring);
      if (plan.alone) widen_slice(plan, slice, kernel, weight);
      multiply(plan, b, plan.sliced(slice), plan.columns, weight + plan.of_slice(slice), slice == 0, m);
    }
    gather_box(plan, b, plan.columns, m, [&](int depth, int row, int column, int tiles, const float* from) {
      const Size step = (Size)tiles * plan.columns;
      const int of_row = border ? (border->depth[depth] * border->rows + border->row[row]) * border->columns : 0;
      for (int i = 0; i < 4 * tiles && column + i < v.out_width; ++i) {
        const Size at = (((Size)b.sample * v.out_depth + depth) * v.out_height + row) * v.out_width + column + i;
        const float* value = from + i % 4 * step + i / 4 * plan.columns;
        write_voxel(v, value, border, of_row, column + i, y + at * v.out);
      }
    });
  }
}

template <int DI, int DO>
void back(
    const Plan<DI, DO>& plan, const Source& s, const Kernel& kernel, float* weight, const float* grad, float* memory,
    Size start, Size stop, int thread) {
  const Volume& v = plan.v;
  const Memory m(plan, DI, DO, memory);
  Led<Plan<DI, DO>> led(plan, s, thread);
  const Source upper = {{0, 0}, {grad, 0}};
  const Convolved<Plan<DI, DO>> x(plan, upper);
  Ring ring = {-1, -1, 0};
  for (Size index = start; index < stop; ++index) {
    const Box b = plan.box(index);
    filter_planes(plan, x, b, 0, m, ring);
    for (int slice = 0; slice < plan.slices; ++slice) {
      const int columns = plan.columns_of(slice);
      if (plan.alone) widen_slice(plan, slice, kernel, weight);
      multiply(plan, b, v.in, columns, weight + plan.of_slice(slice), true, m);
      gather_box(plan, b, columns, m, [&](int depth, int row, int column, int tiles, const float* from) {
        const Size step = (Size)tiles * columns;
        const int count = least(4 * tiles, v.out_width - column);
        led.take(slice, m.voxels, count, 1, [=](int i) { return from + i % 4 * step + i / 4 * columns; });
        led.contract((((Size)b.sample * v.out_depth + depth) * v.out_height + row) * v.out_width + column);
      });
    }
    led.count();
  }
}

template <int DI, int DO>
void weigh_boxes(
    const Plan<DI, DO>& plan, const Source& s, const Kernel& kernel, const float* grad, float* memory, Size start,
    Size stop) {
  const Memory m(plan, DI, DO, memory);
  const Convolved<Plan<DI, DO>> x(plan, s);
  Ring ring = {-1, -1, 0};
  for (Size index = start; index < stop; ++index) {
    const Box b = plan.box(index);
    spread_box(plan, b, grad, m);
    for (int slice = 0; slice < plan.slices; ++slice) {
      filter_planes(plan, x, b, slice, m, ring);
      weigh(plan, b, plan.sliced(slice), m.weight + plan.of_slice(slice), index == start, m);
      for (int k = 0; plan.alone && k < plan.rows_of(slice); ++k) {
        narrow_row(plan, slice, k, m.weight, 1, 0, kernel);
      }
    }
  }
}

// run(plan) for a volume or a picture.
template <class Run>
INLINE auto with_plan(const Volume& v, int volume, int branches, int threads, int job, Run run) {
  if (volume) return run(Plan<4, 2>(v, branches, threads, job));
  return run(Plan<1, 1>(v, branches, threads, job));
}

}  // namespace

extern "C" {

// Floats of scratch that a call needs; branches of the expansion, 0 for none; job: 0 winograd, 1 winograd_back,
// 2 winograd_weight.
Size NAME(winograd_scratch)(const Volume* v, int volume, int branches, int threads, int job) {
  return with_plan(*v, volume, branches, threads, job, [=](const auto& plan) {
    return threads * plan.each + (job == WEIGHT ? 0 : plan.shared());
  });
}

// y = convolution of the source, plus the border's numbers if there are any
void NAME(winograd)(
    const Volume* v, int volume, int branches, const Source* s, const Kernel* kernel, const Border* border, float* y,
    float* scratch, int threads) {
  with_plan(*v, volume, branches, threads, FORWARD, [=](const auto& plan) {
    float *weight = scratch, *memory = scratch + plan.shared();
    widen(plan, threads, *kernel, weight);
    share_out(plan.boxes(), threads, [&](Size start, Size stop, int thread) {
      forward(plan, *s, *kernel, weight, border, y, memory + thread * plan.each, start, stop);
    });
  });
}

// Leads grad, the gradient at the output, back through the convolution and the functions of the source. v describes
// the convolution that does so, from grad to the expansion; kernel is its weight
void NAME(winograd_back)(
    const Volume* v, int volume, int branches, const Source* s, const Kernel* kernel, const float* grad, float* scratch,
    int threads) {
  with_plan(*v, volume, branches, threads, BACK, [=](const auto& plan) {
    float *weight = scratch, *memory = scratch + plan.shared();
    widen(plan, threads, *kernel, weight);
    share_out(plan.boxes(), threads, [&](Size start, Size stop, int thread) {
      back(plan, *s, *kernel, weight, grad, memory + thread * plan.each, start, stop, thread);
    });
  });
}

// kernel = gradient at the weight from grad, that at the output
void NAME(winograd_weight)(
    const Volume* v, int volume, int branches, const Source* s, const Kernel* kernel, const float* grad, float* scratch,
    int threads) {
  with_plan(*v, volume, branches, threads, WEIGHT, [=](const auto& plan) {
    const Size sums = plan.each - plan.shared();
    for (int t = 1; t < threads; ++t) {  // one may get no box
      __builtin_memset(scratch + t * plan.each + sums, 0, sizeof(float) * plan.shared());
    }
    share_out(plan.boxes(), threads, [&](Size start, Size stop, int thread) {
      weigh_boxes(plan, *s, *kernel, grad, scratch + thread * plan.each, start, stop);
    });
    if (plan.alone) return;
    for_weight(plan, threads, [&](int slice, int k) {
      narrow_row(plan, slice, k, scratch + sums + slice * 36 * plan.panel, threads, plan.each, *kernel);
    });
  });
}
}
