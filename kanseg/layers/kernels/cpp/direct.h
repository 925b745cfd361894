// Convolution with strides, tap by tap, with what winograd.h says of volumes, sources, slices and kernels; no dilation.
// Included after it.
//
// Planes and rows of the (expanded) input that a box of outputs sees lie in the cache, zeros around them, the voxels of a
// row that one tap sees with a stride beside each other. Products take ROOM floats from voxel to voxel.

namespace {

const Size MOST_HELD = 1 << 19;  // floats of the input of a box
const int MOST_TAPS = 27;
const int MOST_ROOM = 256;

INLINE int room_for(int floats) { return floats <= 16 ? 16 : floats <= 64 ? 64 : floats <= 128 ? 128 : MOST_ROOM; }

// Outputs that are worked on together, in planes and rows; of a gradient that is led back they count strides.
struct Block {
  int sample, depth, depths, row, rows;
};

struct Direct : Slices {
  int taps, room;
  int out[3];                       // outputs; led back the strides that the input has with its padding
  int reach[3], steps[3], pad[3];   // of the source: voxels that one output sees, and from one to the next
  int depths, rows, chunks, bands;  // of a block, and blocks
  int positions;                    // of a row, of each phase
  Size line, plane, held;           // a row, a plane and all that a block sees
  Size panel, products, voxels;     // weight of a slice; outputs of a block
  Size each;

  Direct(const Volume& volume, int of_branches, int threads, int job) : Slices(volume, of_branches, job) {
    const int outs[3] = {v.out_depth, v.out_height, v.out_width}, pads[3] = {v.pad_depth, v.pad_height, v.pad_width};
    taps = v.kernel[0] * v.kernel[1] * v.kernel[2];
    room = room_for(in);
    for (int a = 0; a < 3; ++a) {
      out[a] = back ? (outs[a] - 1 + pads[a]) / v.stride[a] + 1 : outs[a];
      reach[a] = back ? parts(v.kernel[a], v.stride[a]) : v.kernel[a];
      steps[a] = back ? 1 : v.stride[a];
      pad[a] = back ? reach[a] - 1 : pads[a];
    }
    positions = parts(steps[2] * (out[2] - 1) + reach[2], steps[2]);
    line = (Size)steps[2] * positions * room;
    cut(threads);
    chunks = parts(out[0], depths);
    bands = parts(out[1], rows);
    plane = line * seen(1, rows);
    held = plane * seen(0, depths);
    panel = (Size)taps * in * columns;
    voxels = padded((Size)out[2] * columns);
    products = job == FORWARD ? depths * rows * voxels : voxels;
    each = strip + held + products + voxels + (job == WEIGHT ? shared() : 0);
  }

  Size shared() const { return slices * panel; }
  Size boxes() const { return (Size)v.samples * chunks * bands; }
  int seen(int axis, int outputs) const { return steps[axis] * (outputs - 1) + reach[axis]; }

  // Rows and planes of a block: few rows that are made for more than one of them, and enough blocks for the threads.
  void cut(int threads) {
    double best = 0;
    depths = rows = 0;
    for (int d = 1; d <= out[0]; ++d) {
      for (int r = 1; r <= out[1]; ++r) {
        const double lines = (double)seen(0, d) * seen(1, r);
        const bool few = (Size)v.samples * parts(out[0], d) * parts(out[1], r) < threads;
        if (rows && (lines * line > MOST_HELD || few)) break;
        const double cost = lines * parts(out[0], d) * parts(out[1], r);
        if (rows && cost >= best) continue;
        best = cost;
        depths = d;
        rows = r;
      }
    }
  }

  Block block(Size index) const {
    Block b;
    b.depth = (int)(index % chunks) * depths;
    b.depths = least(depths, out[0] - b.depth);
    index /= chunks;
    b.row = (int)(index % bands) * rows;
    b.rows = least(rows, out[1] - b.row);
    b.sample = (int)(index / bands);
    return b;
  }

  // Where an output of a row sees what lies `ahead` of its first voxel.
  Size ahead(int ahead) const { return ((Size)(ahead % steps[2]) * positions + ahead / steps[2]) * room; }
};

// What a block sees of a slice, (planes, rows, phases, positions, room).
void hold(const Direct& plan, const Convolved<Direct>& x, const Block& b, int slice, float* strip, float* to) {
  const Volume& v = plan.v;
  const int floats = plan.rows_of(slice);
  for (int z = 0; z < plan.seen(0, b.depths); ++z) {
    for (int y = 0; y < plan.seen(1, b.rows); ++y) {
      float* line = to + z * plan.plane + y * plan.line;
      const int depth = plan.steps[0] * b.depth + z - plan.pad[0], row = plan.steps[1] * b.row + y - plan.pad[1];
      __builtin_memset(line, 0, sizeof(float) * plan.line);
      if (!inside(depth, v.depth) || !inside(row, v.height)) continue;
      Size step;
      const float* from = x.row(b.sample, depth, row, slice, strip, &step);
      const int end = least(v.width, plan.steps[2] * plan.positions - plan.pad[2]);
      for (int i = 0; i < end; ++i) {
        float* at = line + plan.ahead(i + plan.pad[2]);
        for (int c = 0; c < floats; c += W) store_some(at + c, load(from + i * step + c), floats - c);
      }
    }
  }
}

// Rows of the source and of the weight that belong together.
struct Taps {
  int count;
  const float* left[MOST_TAPS];
  const float* right[MOST_TAPS];

  void add(const float* a, const float* b) {
    left[count] = a;
    right[count++] = b;
  }
};

// c[i, :] += or where fresh = sum over taps and k of left[i * ROOM + k] * right[k, :], R rows and N vectors.
template <int R, int N, int ROOM>
INLINE void taps_block(const Taps& taps, Size row, Size column, int in, Size b_row, float* c, Size c_row, bool fresh) {
  V sum[R][N];
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < N; ++j) sum[i][j] = fresh ? V{} : load(c + i * c_row + j * W);
  }
  for (int t = 0; t < taps.count; ++t) {
    const float *a = taps.left[t] + row * ROOM, *b = taps.right[t] + column;
    for (int k = 0; k < in; ++k) {
      V right[N];
      for (int j = 0; j < N; ++j) right[j] = load(b + k * b_row + j * W);
      for (int i = 0; i < R; ++i) {
        const V left = set(a[i * ROOM + k]);
        for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < N; ++j) store(c + i * c_row + j * W, sum[i][j]);
  }
}

template <int N, int ROOM>
void taps_rows(const Taps& taps, int rows, Size column, int in, Size b_row, float* c, Size c_row, bool fresh) {
  int i = 0;
  for (; i + MR <= rows; i += MR) taps_block<MR, N, ROOM>(taps, i, column, in, b_row, c + i * c_row, c_row, fresh);
  for (; i + 4 <= rows; i += 4) taps_block<4, N, ROOM>(taps, i, column, in, b_row, c + i * c_row, c_row, fresh);
  for (; i < rows; ++i) taps_block<1, N, ROOM>(taps, i, column, in, b_row, c + i * c_row, c_row, fresh);
}

// Call run(room) with the room of a plan as a number that is known when this is compiled.
template <int ROOM>
struct Room {
  static const int floats = ROOM;
};

template <class Run>
INLINE void with_room(int room, Run run) {
  if (room == 16) return run(Room<16>());
  if (room == 64) return run(Room<64>());
  if (room == 128) return run(Room<128>());
  run(Room<MOST_ROOM>());
}

// Up to two vectors of columns at a time: work(column, vectors).
template <class Work>
INLINE void for_columns(int columns, Work work) {
  int j = 0;
  for (; j + 2 * W <= columns; j += 2 * W) work(j, Room<2>());
  for (; j < columns; j += W) work(j, Room<1>());
}

void direct_forward(
    const Direct& plan, const Source& s, const float* weight, const Border* border, float* y, float* memory, Size start,
    Size stop) {
  const Volume& v = plan.v;
  float *strip = memory, *held = strip + plan.strip, *products = held + plan.held;
  const Convolved<Direct> x(plan, s);
  for (Size index = start; index < stop; ++index) {
    const Block b = plan.block(index);
    for (int slice = 0; slice < plan.slices; ++slice) {
      const int in = plan.sliced(slice);
      hold(plan, x, b, slice, strip, held);
      with_room(plan.room, [&](auto room) {
        for_columns(plan.columns, [&](int column, auto vectors) {
          for (int i = 0; i < b.depths * b.rows; ++i) {
            Taps taps;
            taps.count = 0;
            for (int t = 0; t < plan.taps; ++t) {
              const int dx = t % v.kernel[2], dy = t / v.kernel[2] % v.kernel[1], dz = t / v.kernel[2] / v.kernel[1];
              const float* line = held + (v.stride[0] * (i / b.rows) + dz) * plan.plane;
              taps.add(line + (v.stride[1] * (i % b.rows) + dy) * plan.line + plan.ahead(dx),
                       weight + slice * plan.panel + (Size)t * in * plan.columns);
            }
            taps_rows<vectors.floats, room.floats>(taps, plan.out[2], column, in, plan.columns,
                                                   products + i * plan.voxels + column, plan.columns, slice == 0);
          }
        });
      });
    }
    for (int i = 0; i < b.depths * b.rows; ++i) {
      const int depth = b.depth + i / b.rows, row = b.row + i % b.rows;
      const int of_row = border ? (border->depth[depth] * border->rows + border->row[row]) * border->columns : 0;
      for (int column = 0; column < v.out_width; ++column) {
        const Size at = (((Size)b.sample * v.out_depth + depth) * v.out_height + row) * v.out_width + column;
        const float* value = products + i * plan.voxels + (Size)column * plan.columns;
        write_voxel(v, value, border, of_row, column, y + at * v.out);
      }
    }
  }
}

void direct_back(
    const Direct& plan, const Source& s, const float* weight, const float* grad, float* memory, Size start, Size stop,
    int thread) {
  const Volume& v = plan.v;
  float *strip = memory, *held = strip + plan.strip, *products = held + plan.held, *voxels = products + plan.products;
  const Source upper = {{0, 0}, {grad, 0}};
  const Convolved<Direct> x(plan, upper);
  Led<Direct> led(plan, s, thread);
  for (Size index = start; index < stop; ++index) {
    const Block b = plan.block(index);
    hold(plan, x, b, 0, strip, held);
    for (int slice = 0; slice < plan.slices; ++slice) {
      const int columns = plan.columns_of(slice);
      // the voxels of the input that see the same taps, a row at a time
      for (int i = 0; i < b.depths * v.stride[0] * b.rows * v.stride[1] * v.stride[2]; ++i) {
        const int px = i % v.stride[2], y = i / v.stride[2] % (b.rows * v.stride[1]), py = y % v.stride[1];
        const int z = i / v.stride[2] / (b.rows * v.stride[1]), pz = z % v.stride[0];
        const int depth = b.depth * v.stride[0] + z - v.pad_depth, row = b.row * v.stride[1] + y - v.pad_height;
        if (!inside(depth, v.out_depth) || !inside(row, v.out_height)) continue;
        Taps taps;
        taps.count = 0;
        for (int dz = pz; dz < v.kernel[0]; dz += v.stride[0]) {
          for (int dy = py; dy < v.kernel[1]; dy += v.stride[1]) {
            for (int dx = px; dx < v.kernel[2]; dx += v.stride[2]) {
              const float* line = held + (z / v.stride[0] + plan.pad[0] - dz / v.stride[0]) * plan.plane;
              taps.add(line + (y / v.stride[1] + plan.pad[1] - dy / v.stride[1]) * plan.line +
                           plan.ahead(plan.pad[2] - dx / v.stride[2]),
                       weight + slice * plan.panel + ((Size)(dz * v.kernel[1] + dy) * v.kernel[2] + dx) * v.in * columns);
            }
          }
        }
        with_room(plan.room, [&](auto room) {
          for_columns(columns, [&](int column, auto vectors) {
            taps_rows<vectors.floats, room.floats>(taps, plan.out[2], column, v.in, columns, products + column, columns, true);
          });
        });
        // position q is voxel stride * q + px - pad
        const int first = v.pad_width > px ? parts(v.pad_width - px, v.stride[2]) : 0;
        const int voxel = v.stride[2] * first + px - v.pad_width;
        const int count = least(parts(v.out_width - voxel, v.stride[2]), plan.out[2] - first);
        if (count <= 0) continue;
        led.take(slice, voxels, count, v.stride[2], [=](int k) { return products + (Size)(first + k) * columns; });
        led.contract((((Size)b.sample * v.out_depth + depth) * v.out_height + row) * v.out_width + voxel);
      }
    }
    led.count();
  }
}

// sums[r, :] += sum over rows and voxels i of a[i * ROOM + r] * b[i, :], R rows and N vectors.
template <int R, int N, int ROOM>
INLINE void weight_block(
    const Direct& plan, const Block& b, const float* a, const float* grad, float* sums, Size sums_row) {
  V sum[R][N];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) sum[r][j] = load(sums + r * sums_row + j * W);
  }
  const Volume& v = plan.v;
  for (int d = 0; d < b.depths; ++d) {
    for (int y = 0; y < b.rows; ++y) {
      const float* left = a + v.stride[0] * d * plan.plane + v.stride[1] * y * plan.line;
      const float* right = grad + ((Size)d * v.out_height + y) * v.out_width * v.out;
      for (int i = 0; i < v.out_width; ++i, left += ROOM, right += v.out) {
        V of[N];
        for (int j = 0; j < N; ++j) of[j] = load(right + j * W);
        for (int r = 0; r < R; ++r) {
          const V value = set(left[r]);
          for (int j = 0; j < N; ++j) sum[r][j] += value * of[j];
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) store(sums + r * sums_row + j * W, sum[r][j]);
  }
}

// The number of outputs is a multiple of the vectors' width.
void direct_weigh(const Direct& plan, const Source& s, const float* grad, float* memory, Size start, Size stop) {
  const Volume& v = plan.v;
  float *strip = memory, *held = strip + plan.strip, *sums = memory + plan.each - plan.shared();
  const Convolved<Direct> x(plan, s);
  for (Size index = start; index < stop; ++index) {
    const Block b = plan.block(index);
    const Size at = (((Size)b.sample * v.out_depth + b.depth) * v.out_height + b.row) * v.out_width * v.out;
    for (int slice = 0; slice < plan.slices; ++slice) {
      const int in = plan.sliced(slice);
      hold(plan, x, b, slice, strip, held);
      with_room(plan.room, [&](auto room) {
        for_columns(plan.columns, [&](int column, auto vectors) {
          for (int t = 0; t < plan.taps; ++t) {
            const int dx = t % v.kernel[2], dy = t / v.kernel[2] % v.kernel[1], dz = t / v.kernel[2] / v.kernel[1];
            const float* left = held + dz * plan.plane + dy * plan.line + plan.ahead(dx);
            float* to = sums + slice * plan.panel + (Size)t * in * plan.columns + column;
            int k = 0;
            for (; k + MR <= in; k += MR) {
              weight_block<MR, vectors.floats, room.floats>(plan, b, left + k, grad + at + column, to + k * (Size)plan.columns, plan.columns);
            }
            for (; k + 4 <= in; k += 4) {
              weight_block<4, vectors.floats, room.floats>(plan, b, left + k, grad + at + column, to + k * (Size)plan.columns, plan.columns);
            }
            for (; k < in; ++k) {
              weight_block<1, vectors.floats, room.floats>(plan, b, left + k, grad + at + column, to + k * (Size)plan.columns, plan.columns);
            }
          }
        });
      });
    }
  }
}

// Row k of a slice of the weight, (taps, in, columns) in memory, from or to the kernel.
template <class Move>
INLINE void move_row(const Direct& plan, int slice, int k, const Kernel& kernel, Move move) {
  const int columns = plan.columns_of(slice);
  for (int j = 0; j < columns; ++j) {
    float* at = plan.at(kernel, slice, k, j);
    for (int t = 0; t < plan.taps; ++t) {
      move(at ? at + t : at, slice * plan.panel + ((Size)t * plan.rows_of(slice) + k) * columns + j);
    }
  }
}

INLINE void direct_weight(const Direct& plan, const Kernel& kernel, int threads, float* to) {
  for_weight(plan, threads, [&](int slice, int k) {
    move_row(plan, slice, k, kernel, [=](const float* from, Size place) { to[place] = from ? *from : 0; });
  });
}

}  // namespace

extern "C" {

// As the functions of winograd.h.
Size NAME(direct_scratch)(const Volume* v, int, int branches, int threads, int job) {
  const Direct plan(*v, branches, threads, job);
  return threads * plan.each + (job == WEIGHT ? 0 : plan.shared());
}

void NAME(direct)(
    const Volume* v, int, int branches, const Source* s, const Kernel* kernel, const Border* border, float* y,
    float* scratch, int threads) {
  const Direct plan(*v, branches, threads, FORWARD);
  direct_weight(plan, *kernel, threads, scratch);
  share_out(plan.boxes(), threads, [&](Size start, Size stop, int thread) {
    direct_forward(plan, *s, scratch, border, y, scratch + plan.shared() + thread * plan.each, start, stop);
  });
}

void NAME(direct_back)(
    const Volume* v, int, int branches, const Source* s, const Kernel* kernel, const float* grad, float* scratch,
    int threads) {
  const Direct plan(*v, branches, threads, BACK);
  direct_weight(plan, *kernel, threads, scratch);
  share_out(plan.boxes(), threads, [&](Size start, Size stop, int thread) {
    direct_back(plan, *s, scratch, grad, scratch + plan.shared() + thread * plan.each, start, stop, thread);
  });
}

void NAME(direct_weight)(
    const Volume* v, int, int branches, const Source* s, const Kernel* kernel, const float* grad, float* scratch,
    int threads) {
  const Direct plan(*v, branches, threads, WEIGHT);
  const Size sums = plan.each - plan.shared();
  for (int t = 0; t < threads; ++t) __builtin_memset(scratch + t * plan.each + sums, 0, sizeof(float) * plan.shared());
  share_out(plan.boxes(), threads, [&](Size start, Size stop, int thread) {
    direct_weigh(plan, *s, grad, scratch + thread * plan.each, start, stop);
  });
  for_weight(plan, threads, [&](int slice, int k) {
    move_row(plan, slice, k, *kernel, [&](float* to, Size place) {
      float sum = 0;
      for (int t = 0; t < threads; ++t) sum += scratch[t * plan.each + sums + place];
      if (to) *to = sum;
    });
  });
}
}
