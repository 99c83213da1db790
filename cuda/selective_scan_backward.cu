// Selective scan of floats, backward; shapes as in qmir_ao/ops/selective_scan.py.
//
// With h the states and g = dL/dh, a chunk needs h before it and g behind it. Both come from sums
// of each chunk alone (qmir_scan_chunk_sums) that are carried over (qmir_scan_carry_both). Then
// every chunk, of one tile, recomputes its states and runs backwards (qmir_scan_backward). Sums
// over the channels of a group and over time are made per block, and of blocks in order
// (qmir_scan_columns, qmir_scan_parameters, qmir_scan_projections): nothing depends on the order in
// which blocks run.
#include "float_scan.cuh"

using namespace qmir;

namespace {

constexpr int kStates = QMIR_STATES;
// Fewer warps where a lane has many states: each needs room for them.
constexpr int kMostWarps = kStates <= 4 ? 8 : kStates == 8 ? 4 : 2;
constexpr int kMostThreads = kMostWarps * kWarp;
// Steps whose states and decays are kept in registers.
constexpr int kKept = kStates <= 4 ? 8 : kStates == 8 ? 4 : 2;
// Values of dB and dC of a lane at one step, in whole eights for the sum over 8 channels.
constexpr int kSums = (2 * kStates + 7) / 8 * 8;
constexpr int kSumRow = kQuarters * kSums + 1;

struct WarpTiles {
  float u[kChannels * kRow], dt[kChannels * kRow], gy[kChannels * kRow];
  float du[kChannels * kRow], ddt[kChannels * kRow];
  float states[kSteps / kKept * kStates * kWarp];  // before each kKept steps
  float sums[kSteps * kSumRow];                    // dB and dC of this warp's channels
};

struct Tiles {
  float b[kSteps * kProjectionRow<kStates>], c[kSteps * kProjectionRow<kStates>];
  WarpTiles warp[kMostWarps];
};

template <class T>
QMIR_DEVICE void load_gradient(const FloatScan<T>& s, const ScanPart& part, const T* grad,
                               int64_t begin, float* gy) {
  const int64_t at = begin + lane_id();
  for (int c = 0; c < kChannels; ++c)
    gy[c * kRow + lane_id()] =
        c < part.width && at < s.length ? load_float(grad + part.row(s, c) * s.length + at) : 0.0f;
}

// One lane's view of its channel.
struct Lane {
  int c, quarter;
  const float *b, *by, *u, *dt, *gy;

  QMIR_DEVICE Lane(const Tiles& tiles, const WarpTiles& own)
      : c(lane_id() % kChannels),
        quarter(lane_id() / kChannels),
        b(tiles.b + quarter * kRoom<kStates>),
        by(tiles.c + quarter * kRoom<kStates>),
        u(own.u + c * kRow),
        dt(own.dt + c * kRow),
        gy(own.gy + c * kRow) {}
};

// Of one chunk: the state at its end from zero at its start, and what it sends back to the chunk
// before it if none comes from behind: the sum of gy * C * decays since the start.
template <bool kClamped>
QMIR_DEVICE void chunk_tile(const Lane& lane, const Rates<kStates>& rates, float (&h)[kStates],
                            float (&back)[kStates], float& total) {
  float since[kStates];
#pragma unroll
  for (int i = 0; i < kStates; ++i) since[i] = 1.0f;
  for (int t = 0; t < kSteps; ++t) {
    float b[kStates], c[kStates];
    load_states(lane.b + t * kProjectionRow<kStates>, b);
    load_states(lane.by + t * kProjectionRow<kStates>, c);
    const float dt = lane.dt[t], dtu = dt * lane.u[t], gy = lane.gy[t];
    total += dt;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      since[i] *= scan_step<kClamped>(h[i], dt, rates.at[i], dtu, b[i]);
      back[i] = fmadd(since[i] * gy, c[i], back[i]);
    }
  }
}

template <class T>
QMIR_DEVICE void chunk_sums(const FloatScan<T>& s, const T* grad, float* ends, float* backs,
                            float* totals) {
  QMIR_DYNAMIC_SHARED(Tiles, tiles);
  WarpTiles& own = tiles->warp[warp_id()];
  const ScanPart part(s);
  const Rates<kStates> rates(s, part);
  const int64_t begin = part.chunk * s.chunk;
  const int64_t projections = (part.sample * s.groups + part.group) * s.states * s.length;
  load_projection<kStates>(s.B + projections, s, begin, tiles->b);
  load_projection<kStates>(s.C + projections, s, begin, tiles->c);
  const float largest = load_channels(s, part, begin, own.u, own.dt);
  load_gradient(s, part, grad, begin, own.gy);
  __syncthreads();
  const Lane lane(*tiles, own);
  float h[kStates] = {}, back[kStates] = {}, total = 0.0f;
  if (rates.clamped(largest))
    chunk_tile<true>(lane, rates, h, back, total);
  else
    chunk_tile<false>(lane, rates, h, back, total);
  if (lane.c >= part.width) return;
  const int64_t at = part.row(s, lane.c) * s.chunks() + part.chunk;
  const int first = lane.quarter * kStates;
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    if (first + i < s.states) {
      ends[at * s.states + first + i] = h[i];
      backs[at * s.states + first + i] = back[i];
    }
  if (first == 0) totals[at] = total;
}

// Sums over the 8 channels of a warp; afterwards lane c has those of kSums / 8 of the values, from
// the one that its bits, highest first, select.
template <int kCount, int kOffset>
QMIR_DEVICE void scatter_sums(float (&x)[kSums]) {
  const bool upper = lane_id() & kOffset;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float sent = upper ? x[i] : x[i + kCount / 2];
    const float kept = upper ? x[i + kCount / 2] : x[i];
    x[i] = kept + __shfl_xor_sync(kAllLanes, sent, kOffset);
  }
  if constexpr (kOffset > 1) scatter_sums<kCount / 2, kOffset / 2>(x);
}

// The states before each kKept steps of the tile.
template <bool kClamped>
QMIR_DEVICE void keep_states(const Lane& lane, const Rates<kStates>& rates, float (&h)[kStates],
                             float* kept) {
  for (int t = 0; t < kSteps; ++t) {
    if (t % kKept == 0) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) kept[(t / kKept * kStates + i) * kWarp + lane_id()] = h[i];
    }
    float b[kStates];
    load_states(lane.b + t * kProjectionRow<kStates>, b);
    const float dt = lane.dt[t], dtu = dt * lane.u[t];
#pragma unroll
    for (int i = 0; i < kStates; ++i) scan_step<kClamped>(h[i], dt, rates.at[i], dtu, b[i]);
  }
}

struct Reverse {
  float g[kStates], da[kStates];
};

// kKept steps backwards, from `first` + kKept - 1 to `first`.
template <bool kClamped>
QMIR_DEVICE void reverse_steps(const Lane& lane, const Rates<kStates>& rates, WarpTiles& own,
                               float skip, int first, Reverse& r) {
  float h[kKept + 1][kStates], decay[kKept][kStates];
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    h[0][i] = own.states[(first / kKept * kStates + i) * kWarp + lane_id()];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    float b[kStates];
    load_states(lane.b + (first + k) * kProjectionRow<kStates>, b);
    const float dt = lane.dt[first + k], dtu = dt * lane.u[first + k];
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      h[k + 1][i] = h[k][i];
      decay[k][i] = scan_step<kClamped>(h[k + 1][i], dt, rates.at[i], dtu, b[i]);
    }
  }
#pragma unroll
  for (int k = kKept - 1; k >= 0; --k) {
    const int t = first + k;
    float b[kStates], c[kStates], sums[kSums] = {};
    load_states(lane.b + t * kProjectionRow<kStates>, b);
    load_states(lane.by + t * kProjectionRow<kStates>, c);
    const float dt = lane.dt[t], u = lane.u[t], gy = lane.gy[t], dtu = dt * u;
    StepGradient<float> part{0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const float g = fmadd(gy, c[i], r.g[i]);
      sums[i] = g * dtu;
      sums[kStates + i] = gy * h[k + 1][i];
      r.g[i] = scan_step_reverse(g, decay[k][i], h[k][i], dt, rates.at[i].a, b[i], part, r.da[i]);
    }
    scatter_sums<kSums, kChannels / 2>(sums);
#pragma unroll
    for (int m = 0; m < kSums / 8; ++m)
      own.sums[t * kSumRow + lane.quarter * kSums + lane.c * (kSums / 8) + m] = sums[m];
    for (int offset = kChannels; offset < kWarp; offset *= 2) {
      part.gb += __shfl_xor_sync(kAllLanes, part.gb, offset);
      part.decay_part += __shfl_xor_sync(kAllLanes, part.decay_part, offset);
    }
    if (lane.quarter == 0) {
      own.du[lane.c * kRow + t] = fmadd(part.gb, dt, skip * gy);
      own.ddt[lane.c * kRow + t] = fmadd(part.gb, u, part.decay_part);
    }
  }
}

template <bool kClamped>
QMIR_DEVICE void reverse_tile(const Lane& lane, const Rates<kStates>& rates, WarpTiles& own,
                              float skip, float (&h)[kStates], Reverse& r) {
  keep_states<kClamped>(lane, rates, h, own.states);
  for (int first = kSteps - kKept; first >= 0; first -= kKept)
    reverse_steps<kClamped>(lane, rates, own, skip, first, r);
}

// Writes du and ddelta of the warp's channels, and the chunk's part of dD and dbias.
template <class T>
QMIR_DEVICE void store_channels(const FloatScan<T>& s, const ScanPart& part, const WarpTiles& own,
                                int64_t begin, T* du, T* ddelta, float* dD, float* dbias) {
  const int64_t at = begin + lane_id();
  for (int c = 0; c < part.width; ++c) {
    const int64_t row = part.row(s, c), channel = row % s.channels;
    const int place = c * kRow + lane_id();
    float slope = 0.0f;
    if (at < s.length) {
      slope = own.ddt[place];
      if (s.softplus) {
        float raw = load_float(s.delta + row * s.length + at);
        if (s.bias) raw += s.bias[channel];
        slope *= raw > 20.0f ? 1.0f : sigmoid_lanes(raw);
      }
      store_float(du + row * s.length + at, own.du[place]);
      store_float(ddelta + row * s.length + at, slope);
    }
    const double skips = warp_sum((double)own.gy[place] * (double)own.u[place]);
    const double slopes = warp_sum((double)slope);
    if (lane_id() == 0) {
      dD[channel] = (float)skips;
      dbias[channel] = (float)slopes;
    }
  }
}

// Adds the warps' sums in order and writes dB and dC of this block of channels: rows of states of
// `length`, dC behind all of dB.
template <class T>
QMIR_DEVICE void store_projections(const FloatScan<T>& s, const ScanPart& part, const Tiles& tiles,
                                   int64_t begin, float* parts) {
  const int64_t all = s.batch * s.groups * s.states * s.length;
  float* to =
      parts + part.block * 2 * all + (part.sample * s.groups + part.group) * s.states * s.length;
  for (int item = threadIdx.x; item < 2 * kQuarters * kStates * kSteps; item += blockDim.x) {
    const int t = item % kSteps, kind = item / kSteps % 2, state = item / (2 * kSteps);
    if (state >= s.states || begin + t >= s.length) continue;
    const int at = t * kSumRow + state / kStates * kSums + kind * kStates + state % kStates;
    float total = tiles.warp[0].sums[at];
    for (int warp = 1; warp < (int)blockDim.x / kWarp; ++warp) total += tiles.warp[warp].sums[at];
    to[kind * all + state * s.length + begin + t] = total;
  }
}

// `parameters` has a row for each (sample, chunk): dA (E, N), dD (E), dbias (E).
template <class T>
QMIR_DEVICE void backward(const FloatScan<T>& s, const T* grad, const float* starts,
                          const float* behind, T* du, T* ddelta, float* projections,
                          float* parameters) {
  QMIR_DYNAMIC_SHARED(Tiles, tiles);
  WarpTiles& own = tiles->warp[warp_id()];
  const ScanPart part(s);
  const Rates<kStates> rates(s, part);
  const int64_t begin = part.chunk * s.chunk;
  const int64_t from = (part.sample * s.groups + part.group) * s.states * s.length;
  load_projection<kStates>(s.B + from, s, begin, tiles->b);
  load_projection<kStates>(s.C + from, s, begin, tiles->c);
  const float largest = load_channels(s, part, begin, own.u, own.dt);
  load_gradient(s, part, grad, begin, own.gy);
  __syncthreads();

  const Lane lane(*tiles, own);
  const bool mine = lane.c < part.width;
  const int first = lane.quarter * kStates;
  const int64_t channel = part.row(s, lane.c) % s.channels;
  const int64_t at = (part.row(s, lane.c) * s.chunks() + part.chunk) * s.states + first;
  float h[kStates];
  Reverse r;
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    const bool there = mine && first + i < s.states;
    h[i] = there ? starts[at + i] : 0.0f;
    r.g[i] = there ? behind[at + i] : 0.0f;
    r.da[i] = 0.0f;
  }
  const float skip = s.D && mine ? s.D[channel] : 0.0f;
  if (rates.clamped(largest))
    reverse_tile<true>(lane, rates, own, skip, h, r);
  else
    reverse_tile<false>(lane, rates, own, skip, h, r);
  __syncthreads();

  float* row = parameters + (part.sample * s.chunks() + part.chunk) * s.channels * (s.states + 2);
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    if (mine && first + i < s.states) row[channel * s.states + first + i] = r.da[i];
  float* const dD = row + s.channels * s.states;
  store_channels(s, part, own, begin, du, ddelta, dD, dD + s.channels);
  store_projections(s, part, *tiles, begin, projections);
}

}  // namespace

#define QMIR_KERNEL extern "C" __global__ void __launch_bounds__(256, 1)

// Turns the ends of chunks into the states before them, and what chunks send back into what comes
// from behind them, in place. A thread takes one state of one channel.
QMIR_KERNEL qmir_scan_carry_both(const float* A, const float* totals, float* ends, float* backs,
                                 int64_t rows, int64_t channels, int64_t states, int64_t chunks) {
  const int64_t index = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (index >= rows * states) return;
  const int64_t row = index / states, state = index % states;
  const DecayRate<float> rate = decay_rate(A[row % channels * states + state]);
  float h = 0.0f, g = 0.0f;
  for (int64_t j = 0; j < chunks; ++j) {
    const int64_t at = row * chunks + j;
    const float end = ends[at * states + state];
    ends[at * states + state] = h;
    h = fmadd(exp2_product<true>(totals[at], rate.high, rate.low), h, end);
  }
  for (int64_t j = chunks - 1; j >= 0; --j) {
    const int64_t at = row * chunks + j;
    const float back = backs[at * states + state];
    backs[at * states + state] = g;
    g = fmadd(exp2_product<true>(totals[at], rate.high, rate.low), g, back);
  }
}

// Sum of some rows of a column, in order.
template <class In>
QMIR_DEVICE double sum_rows(const In* from, int64_t first, int64_t last, int64_t columns) {
  double total = 0.0;
#pragma unroll 8
  for (int64_t row = first; row < last; ++row) total += from[row * columns];
  return total;
}

// Sums of `span` rows at a time; block (x, y) makes row y.
QMIR_KERNEL qmir_scan_columns(const float* from, double* to, int64_t rows, int64_t columns,
                              int64_t span) {
  const int64_t column = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const int64_t first = blockIdx.y * span, last = min_of(first + span, rows);
  to[blockIdx.y * columns + column] = sum_rows(from + column, first, last, columns);
}

// Sums of all rows, whose columns are dA (E, N), dD (E) and dbias (E).
QMIR_KERNEL qmir_scan_parameters(const double* from, float* dA, float* dD, float* dbias,
                                 int64_t rows, int64_t channels, int64_t states) {
  const int64_t columns = channels * (states + 2);
  const int64_t column = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const float total = (float)sum_rows(from + column, 0, rows, columns);
  const int64_t behind = column - channels * states;
  if (behind < 0)
    dA[column] = total;
  else if (behind < channels)
    dD[behind] = total;
  else
    dbias[behind - channels] = total;
}

// dB and dC, of `count` elements each: sums over the blocks of channels, in order.
template <class T>
QMIR_DEVICE void sum_projections(const float* parts, T* dB, T* dC, int64_t blocks, int64_t count) {
  const int64_t at = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (at >= 2 * count) return;
  float total = parts[at];
  for (int64_t block = 1; block < blocks; ++block) total += parts[block * 2 * count + at];
  store_float(at < count ? dB + at : dC + (at - count), total);
}

#define QMIR_OPERANDS(T)                                                                  \
  const T *u, const T *delta, const float *A, const T *B, const T *C, const float *D,     \
      const float *bias, int64_t batch, int64_t channels, int64_t groups, int64_t states, \
      int64_t length, int32_t softplus, int64_t chunk
#define QMIR_SCAN(T)                                                                     \
  FloatScan<T> {                                                                         \
    u, delta, B, C, A, D, bias, batch, channels, groups, states, length, softplus, chunk \
  }

#define QMIR_SCAN_KERNELS(name, T)                                                                 \
  extern "C" __global__ void __launch_bounds__(kMostThreads, 1) qmir_scan_chunk_sums_##name(       \
      QMIR_OPERANDS(T), const T* grad, float* ends, float* backs, float* totals) {                 \
    chunk_sums(QMIR_SCAN(T), grad, ends, backs, totals);                                           \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(kMostThreads, 1) qmir_scan_backward_##name(         \
      QMIR_OPERANDS(T), const T* grad, const float* starts, const float* behind, T* du, T* ddelta, \
      float* projections, float* parameters) {                                                     \
    backward(QMIR_SCAN(T), grad, starts, behind, du, ddelta, projections, parameters);             \
  }                                                                                                \
  QMIR_KERNEL qmir_scan_projections_##name(const float* parts, T* dB, T* dC, int64_t blocks,       \
                                           int64_t count) {                                        \
    sum_projections(parts, dB, dC, blocks, count);                                                 \
  }

QMIR_SCAN_KERNELS(f32, float)
QMIR_SCAN_KERNELS(bf16, Bf16)
