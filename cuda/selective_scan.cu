// Selective scan of floats, forward; shapes as in qmir_ao/ops/selective_scan.py.
//
// A long sequence is cut into chunks: each is scanned from a zero state (qmir_scan_chunks), one
// thread a state carries the ends over (qmir_scan_carry), then every chunk is scanned from its true
// start (qmir_scan_forward). Results depend on the length of a chunk only, which the length of the
// sequence decides. QMIR_STATES is the number of states of a lane, a quarter of a channel's.
#include "float_scan.cuh"

using namespace qmir;

namespace {

constexpr int kStates = QMIR_STATES;
constexpr int kMostThreads = 256, kMostWarps = kMostThreads / kWarp;

struct Tiles {
  float b[kSteps * kProjectionRow<kStates>], c[kSteps * kProjectionRow<kStates>];
  float u[kMostWarps][kChannels * kRow], dt[kMostWarps][kChannels * kRow];
  float y[kMostWarps][kChannels * kRow];
};

// One tile of a warp's channels from state h on.
template <bool kClamped>
QMIR_DEVICE void forward_tile(const Tiles& tiles, const Rates<kStates>& rates, float skip,
                              float (&h)[kStates], float* y) {
  const int c = lane_id() % kChannels, quarter = lane_id() / kChannels;
  const float *u = tiles.u[warp_id()] + c * kRow, *dt = tiles.dt[warp_id()] + c * kRow;
  for (int t = 0; t < kSteps; ++t) {
    const int at = t * kProjectionRow<kStates> + quarter * kRoom<kStates>;
    float b[kStates], by[kStates];
    load_states(tiles.b + at, b);
    load_states(tiles.c + at, by);
    const float dtu = dt[t] * u[t];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      scan_step<kClamped>(h[i], dt[t], rates.at[i], dtu, b[i]);
      sum = fmadd(by[i], h[i], sum);
    }
    sum += __shfl_xor_sync(kAllLanes, sum, kChannels);
    sum += __shfl_xor_sync(kAllLanes, sum, 2 * kChannels);
    if (quarter == 0) y[c * kRow + t] = fmadd(skip, u[t], sum);
  }
}

template <class T>
QMIR_DEVICE void forward(const FloatScan<T>& s, const float* starts, T* y) {
  __shared__ __align__(16) Tiles tiles;
  const ScanPart part(s);
  const Rates<kStates> rates(s, part);
  const int c = lane_id() % kChannels, first = lane_id() / kChannels * kStates;
  const bool mine = c < part.width;
  const float skip = s.D && mine ? s.D[part.row(s, c) % s.channels] : 0.0f;
  float h[kStates];
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    h[i] = starts && mine && first + i < s.states
               ? starts[(part.row(s, c) * s.chunks() + part.chunk) * s.states + first + i]
               : 0.0f;
  const int64_t projections = (part.sample * s.groups + part.group) * s.states * s.length;
  const int64_t end = min_of((part.chunk + 1) * s.chunk, s.length);
  for (int64_t begin = part.chunk * s.chunk; begin < end; begin += kSteps) {
    load_projection<kStates>(s.B + projections, s, begin, tiles.b);
    load_projection<kStates>(s.C + projections, s, begin, tiles.c);
    const float largest = load_channels(s, part, begin, tiles.u[warp_id()], tiles.dt[warp_id()]);
    __syncthreads();
    if (rates.clamped(largest))
      forward_tile<true>(tiles, rates, skip, h, tiles.y[warp_id()]);
    else
      forward_tile<false>(tiles, rates, skip, h, tiles.y[warp_id()]);
    __syncthreads();
    for (int row = 0; row < part.width; ++row)
      if (begin + lane_id() < s.length)
        store_float(y + part.row(s, row) * s.length + begin + lane_id(),
                    tiles.y[warp_id()][row * kRow + lane_id()]);
  }
}

template <bool kClamped>
QMIR_DEVICE void chunk_tile(const Tiles& tiles, const Rates<kStates>& rates, float (&h)[kStates],
                            float& total) {
  const int c = lane_id() % kChannels, quarter = lane_id() / kChannels;
  const float *u = tiles.u[warp_id()] + c * kRow, *dt = tiles.dt[warp_id()] + c * kRow;
  for (int t = 0; t < kSteps; ++t) {
    float b[kStates];
    load_states(tiles.b + t * kProjectionRow<kStates> + quarter * kRoom<kStates>, b);
    const float dtu = dt[t] * u[t];
    total += dt[t];
#pragma unroll
    for (int i = 0; i < kStates; ++i) scan_step<kClamped>(h[i], dt[t], rates.at[i], dtu, b[i]);
  }
}

// State at the end of each chunk, from zero at its start, and the sum of its time steps.
template <class T>
QMIR_DEVICE void chunk_ends(const FloatScan<T>& s, float* ends, float* totals) {
  __shared__ __align__(16) Tiles tiles;
  const ScanPart part(s);
  const Rates<kStates> rates(s, part);
  float h[kStates] = {}, total = 0.0f;
  const int64_t projections = (part.sample * s.groups + part.group) * s.states * s.length;
  const int64_t end = min_of((part.chunk + 1) * s.chunk, s.length);
  for (int64_t begin = part.chunk * s.chunk; begin < end; begin += kSteps) {
    load_projection<kStates>(s.B + projections, s, begin, tiles.b);
    const float largest = load_channels(s, part, begin, tiles.u[warp_id()], tiles.dt[warp_id()]);
    __syncthreads();
    if (rates.clamped(largest))
      chunk_tile<true>(tiles, rates, h, total);
    else
      chunk_tile<false>(tiles, rates, h, total);
    __syncthreads();
  }
  const int c = lane_id() % kChannels, first = lane_id() / kChannels * kStates;
  if (c >= part.width) return;
  const int64_t at = part.row(s, c) * s.chunks() + part.chunk;
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    if (first + i < s.states) ends[at * s.states + first + i] = h[i];
  if (first == 0) totals[at] = total;
}

}  // namespace

#define QMIR_KERNEL extern "C" __global__ void __launch_bounds__(256, 1)

// Turns the ends of chunks into the states before them, in place. A thread takes one state of one
// channel; `rows` counts channels of all samples.
QMIR_KERNEL qmir_scan_carry(const float* A, const float* totals, float* ends, int64_t rows,
                            int64_t channels, int64_t states, int64_t chunks) {
  const int64_t index = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (index >= rows * states) return;
  const int64_t row = index / states, state = index % states;
  const DecayRate<float> rate = decay_rate(A[row % channels * states + state]);
  float h = 0.0f;
  for (int64_t j = 0; j < chunks; ++j) {
    float& at = ends[(row * chunks + j) * states + state];
    const float end = at;
    at = h;
    h = fmadd(exp2_product<true>(totals[row * chunks + j], rate.high, rate.low), h, end);
  }
}

#define QMIR_OPERANDS(T)                                                                  \
  const T *u, const T *delta, const float *A, const T *B, const T *C, const float *D,     \
      const float *bias, int64_t batch, int64_t channels, int64_t groups, int64_t states, \
      int64_t length, int32_t softplus, int64_t chunk
#define QMIR_SCAN(T)                                                                     \
  FloatScan<T> {                                                                         \
    u, delta, B, C, A, D, bias, batch, channels, groups, states, length, softplus, chunk \
  }

#define QMIR_SCAN_KERNELS(name, T)                                                    \
  QMIR_KERNEL qmir_scan_forward_##name(QMIR_OPERANDS(T), const float* starts, T* y) { \
    forward(QMIR_SCAN(T), starts, y);                                                 \
  }                                                                                   \
  QMIR_KERNEL qmir_scan_chunks_##name(QMIR_OPERANDS(T), float* ends, float* totals) { \
    chunk_ends(QMIR_SCAN(T), ends, totals);                                           \
  }

QMIR_SCAN_KERNELS(f32, float)
QMIR_SCAN_KERNELS(bf16, Bf16)
