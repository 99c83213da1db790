// How a grid shares a scan: sequences, or images read in four directions, are cut into chunks; a
// block takes 32 channels of a group (one per lane) and one chunk for each of its warps.
//
// Direction 0 goes through the rows of an image, 1 through its columns, 2 and 3 are the same from
// the end. Nothing is flipped or transposed in memory: chunks are named by the place they cover,
// and a warp goes through its own from either end. A column is far apart in memory, so that the
// warps of a block take chunks that lie side by side and load them together.
#pragma once
#include "device.cuh"
#include "selective_scan.cuh"

namespace qmir {

constexpr int kTile =
    16;  // steps that a warp holds in shared memory at once, unless said otherwise

// Sizes of a launch (backend/cuda/scan_chunks.py makes them). A unit is what the warps of a block
// are apart: `row_steps` of a row; a column, or several where they are short. Columns longer than
// `column_steps` are cut into parts of that many steps.
struct ScanSize {
  int64_t batch, groups, per_group, length;
  int64_t height;  // of the images; 0: sequences
  int64_t row_steps, column_unit, column_steps;
  int64_t slots;        // chunks of the direction that has most
  int64_t time_blocks;  // blocks along the steps of the direction that has most
};

// The chunks of one group, of images or of sequences.
template <bool kImage>
struct Walk {
  bool columns, back;
  int64_t unit, units, parts, length;
  int steps;          // of a chunk, at most
  int steps_at_most;  // the same, of any direction
  int height, width;  // of the image, for columns only

  QMIR_DEVICE Walk(const ScanSize& size, int64_t group)
      : columns(kImage && group % 2 == 1),
        back(kImage && group >= 2),
        unit(columns ? size.column_unit : size.row_steps),
        units((size.length + unit - 1) / unit),
        parts(columns ? (unit + size.column_steps - 1) / size.column_steps : 1),
        length(size.length),
        steps((int)(columns ? size.column_steps : size.row_steps)),
        steps_at_most((int)max_of(size.column_steps, size.row_steps)),
        height((int)size.height),
        width(columns ? (int)(size.length / size.height) : 0) {}

  QMIR_DEVICE int64_t chunks() const {
    return units * parts;
  }
};

// One chunk; steps are counted from `start` of its unit in the order of memory.
struct Span {
  int64_t unit, chunk;
  int start, count;  // count 0: there is no such chunk
};

// One step of a tile: its place within a plane (an image or a sequence of one channel).
struct Place {
  int64_t at;
  int t;  // step within the tile, in the order of the scan
  bool inside;
};

template <bool kImage, int kWarps, int kSteps = kTile>
struct ScanBlock {
  static_assert(kWarp % kWarps == 0 && kWarp % kSteps == 0, "lanes share tiles evenly");
  Walk<kImage> walk;
  int64_t sample, group, channel;  // channel of lane 0 within its group
  int64_t first_unit, part;
  int channels;  // real ones; the other lanes work on nothing
  int lane, warp;
  Span own;     // of this warp
  Span loaded;  // whose elements this thread loads

  QMIR_DEVICE static int64_t blocks(const ScanSize& size) {
    return (size.per_group + kWarp - 1) / kWarp;
  }

  // Blocks of channels follow each other, so that those which read the same B and C run together.
  QMIR_DEVICE explicit ScanBlock(const ScanSize& size)
      : walk(size, (int64_t)blockIdx.x / blocks(size) / size.time_blocks % size.groups) {
    const int64_t rest = (int64_t)blockIdx.x / blocks(size);
    const int64_t time = rest % size.time_blocks;
    channel = (int64_t)blockIdx.x % blocks(size) * kWarp;
    group = rest / size.time_blocks % size.groups;
    sample = rest / size.time_blocks / size.groups;
    channels = (int)min_of<int64_t>(kWarp, size.per_group - channel);
    part = time % walk.parts;
    first_unit = time / walk.parts * kWarps;
    lane = lane_id();
    warp = warp_id();
    own = span(warp);
    loaded = walk.columns ? span(lane % kWarps) : own;
  }

  // The same for all threads of a block: another direction has more blocks.
  QMIR_DEVICE bool idle() const {
    return first_unit >= walk.units;
  }

  QMIR_DEVICE Span span(int owner) const {
    Span s;
    s.unit = first_unit + owner;
    s.chunk = s.unit * walk.parts + part;
    s.start = (int)part * walk.steps;
    const int64_t rest = min_of(walk.length - s.unit * walk.unit, walk.unit) - s.start;
    s.count = (int)clamp_to<int64_t>(rest, 0, walk.steps);
    return s;
  }

  QMIR_DEVICE bool valid() const {
    return lane < channels;
  }

  // Tiles of this warp's loop. Columns are loaded by all warps, which go on together.
  QMIR_DEVICE int tiles() const {
    return ((walk.columns ? walk.steps : own.count) + kSteps - 1) / kSteps;
  }

  QMIR_DEVICE static int steps_in(const Span& span, int tile) {
    return clamp_to(span.count - tile * kSteps, 0, kSteps);
  }

  QMIR_DEVICE void sync() const {
    if (kImage && walk.columns)
      __syncthreads();
    else
      __syncwarp();
  }

  // Element i of a tile, in the order of memory.
  QMIR_DEVICE Place place(int tile, int i) const {
    const int steps = steps_in(loaded, tile);
    const int done = tile * kSteps;
    const int q = loaded.start + (walk.back ? loaded.count - done - steps : done) + i;
    Place p;
    p.inside = i < steps;
    p.t = walk.back ? steps - 1 - i : i;
    if (walk.columns) {
      const int column = q / walk.height;
      p.at = (int64_t)(q - column * walk.height) * walk.width +
             loaded.unit * (walk.unit / walk.height) + column;
    } else {
      p.at = loaded.unit * walk.unit + q;
    }
    return p;
  }

  // visit(owner, item, place) for kItems planes and the steps of a tile: those of this warp's chunk
  // by its lanes, those of all the block's chunks by all threads where they lie side by side. A
  // thread's visits go out kAhead at a time.
  template <int kItems, int kAhead, class Visit>
  QMIR_DEVICE void each(int tile, const Visit& visit) const {
    if constexpr (kImage) {
      if (walk.columns) return each_of_columns<kItems, kAhead>(tile, visit);
    }
    const Place p = place(tile, lane % kSteps);
    if (!p.inside) return;
#pragma unroll kAhead
    for (int item = lane / kSteps; item < kItems; item += kWarp / kSteps) visit(warp, item, p);
  }

  template <int kItems, int kAhead, class Visit>
  QMIR_DEVICE void each_of_columns(int tile, const Visit& visit) const {
    constexpr int kRows = kWarp / kWarps;
#pragma unroll
    for (int first = 0; first < kSteps; first += kRows) {
      const int i = first + lane / kWarps;
      const Place p = place(tile, i);
      if (i >= kSteps || !p.inside) continue;
#pragma unroll kAhead
      for (int item = warp; item < kItems; item += kWarps) visit(lane % kWarps, item, p);
    }
  }
};

// A warp's tile of floats of 32 channels. Slots lie without conflicts between banks for those who
// take one step of 32 channels, the steps of a few, or one step of a few channels of several warps.
template <int kWarps, int kSteps = kTile>
struct ChannelTile {
  static constexpr int kFloats = kWarp * kSteps + kWarp / kWarps;

  QMIR_DEVICE static int slot(int channel, int t) {
    return channel * kSteps + (t ^ (channel / (kWarp / kSteps) % kSteps));
  }
};

// A warp's tile of B or C, four states of a step at a time. kPitch is odd and so are the fours of a
// warp: eight steps, and one step of eight warps, lie in different banks.
template <int kStates, int kSteps = kTile>
struct ProjectionTile {
  static constexpr int kQuads = (kStates + 3) / 4;
  static constexpr int kPitch = kQuads | 1;
  static constexpr int kFloats = (kSteps * kPitch + 1) * 4;

  QMIR_DEVICE static float* at(float* base, int owner, int t, int quad) {
    return base + owner * kFloats + (t * kPitch + quad) * 4;
  }

  QMIR_DEVICE static void load(const float* base, int owner, int t, int quad, float (&four)[4]) {
    const float4 v =
        *reinterpret_cast<const float4*>(base + owner * kFloats + (t * kPitch + quad) * 4);
    four[0] = v.x;
    four[1] = v.y;
    four[2] = v.z;
    four[3] = v.w;
  }

  // value(state, place) for all states at the steps of a tile.
  template <int kAhead, class Block, class Value>
  QMIR_DEVICE static void fill(const Block& block, int tile, float* base, const Value& value) {
    block.template each<kQuads, kAhead>(tile, [&](int owner, int quad, const Place& p) {
      float four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] = value(min_of(4 * quad + i, kStates - 1), p.at);
      *reinterpret_cast<float4*>(at(base, owner, p.t, quad)) =
          make_float4(four[0], four[1], four[2], four[3]);
    });
  }
};

// exp2_product's rate of A in two floats, without float64, which most GPUs do slowly.
QMIR_DEVICE DecayRate<float> real_rate(float a) {
  constexpr float kHigh = (float)kLog2E, kLow = (float)(kLog2E - (double)kHigh);
  const float high = a * kHigh;
  const float low = fmadd(a, kHigh, -high) + a * kLow;
  return {a, high, low == low ? low : 0.0f};  // infinite a: inf - inf
}

// A sum over the steps of a chunk that keeps what its additions round off.
struct LongSum {
  float sum, rest;

  QMIR_DEVICE void add(float x) {
    const float next = sum + x, taken = next - sum;
    rest = rest + ((sum - (next - taken)) + (x - taken));
    sum = next;
  }

  QMIR_DEVICE float total() const {
    return sum + rest;
  }
};

// One state at the start of each chunk of a group, from the product of the chunk's decays and the
// state that it ends with when it starts at zero: h <- decay * h + end. Written over `end`.
// Backwards in time for the gradient of the state, from the last chunk on.
template <bool kReverse>
QMIR_DEVICE void carry_states(int64_t chunks, bool back, const float* decay, float* end,
                              int64_t stride) {
  constexpr int kAhead = 8;  // loads in flight
  const bool from_end = back != kReverse;
  float h = 0.0f;
  for (int64_t first = 0; first < chunks; first += kAhead) {
    float decays[kAhead], ends[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t c = min_of(first + i, chunks - 1);
      const int64_t at = (from_end ? chunks - 1 - c : c) * stride;
      decays[i] = decay[at];
      ends[i] = end[at];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= chunks) break;
      end[(from_end ? chunks - 1 - first - i : first + i) * stride] = h;
      // A product of growing decays may be infinite where there is no state to grow.
      h = h == 0.0f ? ends[i] : decays[i] * h + ends[i];
    }
  }
}

// A thread carries one of `rows` values of one channel, of tensors (batch, groups, slots, rows,
// per_group).
template <bool kImage, bool kReverse>
QMIR_DEVICE void carry_scan(const ScanSize& size, int rows, const float* decay, float* end) {
  const int64_t thread = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t stride = rows * size.per_group, group = thread / stride;
  if (group >= size.batch * size.groups) return;
  const int64_t at = group * size.slots * stride + thread % stride;
  const Walk<kImage> walk(size, group % size.groups);
  carry_states<kReverse>(walk.chunks(), walk.back, decay + at, end + at, stride);
}

}  // namespace qmir

// Parameters of kernels: a ScanSize, field by field as in backend/cuda/scan_chunks.py.
#define QMIR_SCAN_SIZES                                                                       \
  long long batch, long long groups, long long per_group, long long length, long long height, \
      long long row_steps, long long column_unit, long long column_steps, long long slots,    \
      long long time_blocks
#define QMIR_SCAN_SIZE                                                                     \
  qmir::ScanSize {                                                                         \
    batch, groups, per_group, length, height, row_steps, column_unit, column_steps, slots, \
        time_blocks                                                                        \
  }
