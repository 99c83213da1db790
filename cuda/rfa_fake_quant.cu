// RFA fake quantization of a weight, forward and backward. The weight is `rows` rows of `count`
// elements with one step each (or one row in all), and one shift for all rows or one each. Kernels
// exist for every power of two of thresholds, T.
//
// Sums have a fixed order: within a tile by thread, tiles and rows by their index. The gradients of
// the thresholds come from a histogram over segments, in which each thread of a block collects one
// segment of one slice of the tile.
#include "device.cuh"
#include "rfa.cuh"

using namespace qmir;

namespace {

constexpr int kThreads = 256, kPerThread = 8, kTile = kThreads * kPerThread;
constexpr int kRowTile = 8192;

struct Weight {
  const float *values, *step, *shift;
  int64_t rows, count, shifts;
  float low, high;

  __device__ int64_t total() const {
    return rows * count;
  }
  __device__ Grid grid(int64_t row) const {
    return {step[row], shift[shifts > 1 ? row : 0], low, high};
  }
};

struct RowSums {
  double kept, passed, error;
};

template <int T>
struct Tables {
  float points[T], middles[T], ascending[T], slopes[T + 1];

  // By all threads of the block. Suffix minima make the tables ascending: of thresholds in order
  // they change nothing, otherwise the count of smaller entries is the last one exceeded.
  __device__ void fill(const float* thresholds) {
    const int j = (int)threadIdx.x;
    float point = INFINITY, middle = INFINITY;
    if (j < T) points[j] = point = thresholds[j];
    __syncthreads();
    if (j + 1 < T) middle = (points[j] + points[j + 1]) * 0.5f;
    if (j > 0 && j < T) slopes[j] = 1.0f / (points[j] - points[j - 1]);
    if (j == 0) slopes[0] = slopes[T] = kOuterSlope;
    for (int offset = 1; offset < T; offset *= 2) {
      if (j < T) ascending[j] = point, middles[j] = middle;
      __syncthreads();
      if (j + offset < T) {
        point = min_of(ascending[j + offset], point);
        middle = min_of(middles[j + offset], middle);
      }
      __syncthreads();
    }
    if (j < T) ascending[j] = point, middles[j] = middle;
    __syncthreads();
  }
};

struct Element {
  float ratio, clipped, code, slope;
  int segment;
};

template <int T>
QMIR_DEVICE Element rounded(float w, const Grid& grid, const Tables<T>& tables) {
  Element e;
  e.ratio = grid_ratio(w, grid);
  e.clipped = rfa_clip(e.ratio, grid);
  e.code = grid.low + (float)rfa_count<T>(e.clipped, tables.middles);
  e.segment = rfa_segment<T>(e.clipped, tables.ascending, tables.points[0], tables.points[T - 1]);
  e.slope = e.clipped == e.ratio ? tables.slopes[e.segment] : 0.0f;
  return e;
}

template <int T>
QMIR_DEVICE void forward(const Weight& w, const float* thresholds, float* y) {
  __shared__ Tables<T> tables;
  tables.fill(thresholds);
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t at = (int64_t)blockIdx.x * kTile + k * kThreads + threadIdx.x;
    if (at >= w.total()) return;
    const Grid grid = w.grid(at / w.count);
    const float ratio = grid_ratio(w.values[at], grid);
    const float code = grid.low + (float)rfa_count<T>(rfa_clip(ratio, grid), tables.middles);
    // What is not finite has no level: its value is NaN.
    y[at] = ratio * 0.0f == 0.0f ? grid_value(code, grid) : NAN;
  }
}

// Parts of the histogram: segments of a tile, collected by slices that are added in order.
template <int T>
struct Histogram {
  static constexpr int kBins = T + 1;
  static constexpr int kSlices = kThreads > kBins ? kThreads / kBins : 1;
  double mass[kSlices * kBins], moment[kSlices * kBins];

  // Calls read(i, bin, mass, moment) for the i in this thread's slice of `count`, then adds slices;
  // the sums are in the first kBins entries.
  template <class Read>
  __device__ void collect(int64_t count, const Read& read) {
    for (int item = threadIdx.x; item < kSlices * kBins; item += kThreads) {
      const int bin = item % kBins, slice = item / kBins;
      double sum = 0.0, turned = 0.0;
      for (int64_t i = count * slice / kSlices; i < count * (slice + 1) / kSlices; ++i)
        read(i, bin, sum, turned);
      mass[item] = sum;
      moment[item] = turned;
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads)
      for (int slice = 1; slice < kSlices; ++slice) {
        mass[bin] += mass[slice * kBins + bin];
        moment[bin] += moment[slice * kBins + bin];
      }
    __syncthreads();
  }
};

// dw of a tile, and its part of the histogram: kBins masses, then kBins moments.
template <int T>
QMIR_DEVICE void backward(const float* grad, const Weight& w, const float* thresholds, float* dw,
                          double* parts) {
  __shared__ Tables<T> tables;
  __shared__ Histogram<T> histogram;
  __shared__ float weighted[kTile], turned[kTile];
  __shared__ uint16_t segments[kTile];
  tables.fill(thresholds);
  const int64_t begin = (int64_t)blockIdx.x * kTile;
  const int64_t size = min_of((int64_t)kTile, w.total() - begin);
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const Grid grid = w.grid((begin + i) / w.count);
    const Element e = rounded<T>(w.values[begin + i], grid, tables);
    const float g = grad[begin + i];
    dw[begin + i] = g * e.slope;
    weighted[i] = grid.step * g;
    turned[i] = weighted[i] * e.clipped;
    segments[i] = (uint16_t)e.segment;
  }
  __syncthreads();
  histogram.collect(size, [&](int64_t i, int bin, double& mass, double& moment) {
    const bool here = segments[i] == bin;
    mass += here ? weighted[i] : 0.0f;
    moment += here ? turned[i] : 0.0f;
  });
  constexpr int kBins = Histogram<T>::kBins;
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    parts[blockIdx.x * 2 * kBins + bin] = histogram.mass[bin];
    parts[blockIdx.x * 2 * kBins + kBins + bin] = histogram.moment[bin];
  }
}

// Sums of kRowTile elements of a row.
template <int T>
QMIR_DEVICE void row_sums(const float* grad, const Weight& w, const float* thresholds,
                          const float* dw, RowSums* parts, int64_t tiles) {
  __shared__ Tables<T> tables;
  __shared__ double scratch[3][kThreads / kWarp];
  tables.fill(thresholds);
  const int64_t row = blockIdx.x / tiles, begin = blockIdx.x % tiles * kRowTile;
  const Grid grid = w.grid(row);
  RowSums mine{};
  for (int64_t i = begin + threadIdx.x; i < min_of(begin + kRowTile, w.count); i += kThreads) {
    const int64_t at = row * w.count + i;
    const Element e = rounded<T>(w.values[at], grid, tables);
    const float g = grad[at];
    mine.kept += g;
    mine.passed += dw[at];
    mine.error += g * (e.code - e.slope * e.ratio);
  }
  mine.kept = block_sum<kThreads>(mine.kept, scratch[0]);
  mine.passed = block_sum<kThreads>(mine.passed, scratch[1]);
  mine.error = block_sum<kThreads>(mine.error, scratch[2]);
  if (threadIdx.x == 0) parts[blockIdx.x] = mine;
}

// Everything that is one number a row or a threshold, by one block.
template <int T>
QMIR_DEVICE void finish(const double* histograms, int64_t blocks, const RowSums* parts,
                        int64_t tiles, const Weight& w, const float* thresholds, float* dstep,
                        float* dshift, float* dthresholds) {
  __shared__ Histogram<T> histogram;
  __shared__ float points[T];
  __shared__ double scratch[kThreads / kWarp];
  constexpr int kBins = Histogram<T>::kBins;
  if (threadIdx.x < T) points[threadIdx.x] = thresholds[threadIdx.x];
  histogram.collect(blocks, [&](int64_t i, int bin, double& mass, double& moment) {
    mass += histograms[i * 2 * kBins + bin];
    moment += histograms[i * 2 * kBins + kBins + bin];
  });
  if (threadIdx.x < T)
    dthresholds[threadIdx.x] = (float)rfa_threshold_gradient(histogram.mass, histogram.moment,
                                                             points, T, (int)threadIdx.x);

  const double scale = 1.0 / sqrt((double)w.count * (double)max_of(w.high, 1.0f));
  double shared = 0.0;
  for (int64_t row = threadIdx.x; row < w.rows; row += kThreads) {
    RowSums all{};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const RowSums part = parts[row * tiles + tile];
      all.kept += part.kept;
      all.passed += part.passed;
      all.error += part.error;
    }
    dstep[row] = (float)(scale * all.error);
    shared += all.passed - all.kept;
    if (w.shifts > 1) dshift[row] = (float)(all.passed - all.kept);
  }
  shared = block_sum<kThreads>(shared, scratch);
  if (w.shifts == 1 && threadIdx.x == 0) dshift[0] = (float)shared;
}

}  // namespace

#define QMIR_KERNEL extern "C" __global__ void __launch_bounds__(256)
#define QMIR_WEIGHT(T) \
  {w, step, shift, rows, count, shifts, (float)quant_min, (float)(quant_min + T - 1)}
#define QMIR_OPERANDS                                                                           \
  const float *w, const float *step, const float *shift, const float *thresholds, int64_t rows, \
      int64_t count, int64_t shifts, int32_t quant_min

#define QMIR_RFA_KERNELS(T)                                                                        \
  QMIR_KERNEL qmir_rfa_forward_##T(QMIR_OPERANDS, float* y) {                                      \
    forward<T>(QMIR_WEIGHT(T), thresholds, y);                                                     \
  }                                                                                                \
  QMIR_KERNEL qmir_rfa_backward_##T(QMIR_OPERANDS, const float* grad, float* dw, double* parts) {  \
    backward<T>(grad, QMIR_WEIGHT(T), thresholds, dw, parts);                                      \
  }                                                                                                \
  QMIR_KERNEL qmir_rfa_rows_##T(QMIR_OPERANDS, const float* grad, const float* dw, RowSums* parts, \
                                int64_t tiles) {                                                   \
    row_sums<T>(grad, QMIR_WEIGHT(T), thresholds, dw, parts, tiles);                               \
  }                                                                                                \
  QMIR_KERNEL qmir_rfa_finish_##T(QMIR_OPERANDS, const double* histograms, int64_t blocks,         \
                                  const RowSums* parts, int64_t tiles, float* dstep,               \
                                  float* dshift, float* dthresholds) {                             \
    finish<T>(histograms, blocks, parts, tiles, QMIR_WEIGHT(T), thresholds, dstep, dshift,         \
              dthresholds);                                                                        \
  }

QMIR_RFA_KERNELS(4)
QMIR_RFA_KERNELS(8)
QMIR_RFA_KERNELS(16)
QMIR_RFA_KERNELS(32)
QMIR_RFA_KERNELS(64)
QMIR_RFA_KERNELS(128)
QMIR_RFA_KERNELS(256)
