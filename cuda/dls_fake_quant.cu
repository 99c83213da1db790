// DLS fake quantization, forward and backward. Groups of `count` elements follow each other.
//
// Short groups (tokens): a warp takes one after the other, in one launch. Long ones (samples) are
// cut into tiles of kTile elements, a block each: sums of the tiles, sums of a group from those,
// then the elements. Every sum has a fixed order, and none is shared between groups.
#include "dls_device.cuh"

using namespace qmir;

namespace {

constexpr int kThreads = 256, kPerThread = 32, kTile = kThreads * kPerThread;
constexpr int kRowWarps = 4, kRowsPerWarp = 8;

struct Settings {
  float low, high;
  int cap, clamp;

  __device__ float levels() const {
    return cap ? high - low + 1.0f : 0.0f;
  }
  __device__ Grid grid(const Prediction& found) const {
    return {found.step, found.shift, low, high};
  }
  __device__ double gradient_scale(int64_t count) const {
    return 1.0 / sqrt((double)count * (double)max_of(high, 1.0f));
  }
};

// Calls body(index, x) for the elements of this thread in a tile of a group that begins at `from`.
template <class T, class Body>
QMIR_DEVICE void for_tile(const T* from, int64_t begin, int64_t count, const Body& body) {
  if (count % 4 == 0) {
#pragma unroll
    for (int k = 0; k < kPerThread / 4; ++k) {
      const int64_t at = begin + 4 * (k * kThreads + (int)threadIdx.x);
      if (at >= count) continue;
      float x[4];
      load_four(from + at, x);
      for (int j = 0; j < 4; ++j) body(at + j, x[j]);
    }
  } else {
#pragma unroll 8
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t at = begin + k * kThreads + (int)threadIdx.x;
      if (at < count) body(at, load_float(from + at));
    }
  }
}

// Calls body(x) -> y for the elements of this thread in a tile, and stores y; `other` is read as
// well.
template <class T, class Body>
QMIR_DEVICE void map_tile(const T* from, const T* other, T* to, int64_t begin, int64_t count,
                          const Body& body) {
  if (count % 4 == 0) {
#pragma unroll
    for (int k = 0; k < kPerThread / 4; ++k) {
      const int64_t at = begin + 4 * (k * kThreads + (int)threadIdx.x);
      if (at >= count) continue;
      float x[4], g[4], y[4];
      load_four(from + at, x);
      load_four(other + at, g);
      for (int j = 0; j < 4; ++j) y[j] = body(x[j], g[j]);
      store_four(to + at, y);
    }
  } else {
#pragma unroll 8
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t at = begin + k * kThreads + (int)threadIdx.x;
      if (at < count) store_float(to + at, body(load_float(from + at), load_float(other + at)));
    }
  }
}

template <class T>
QMIR_DEVICE void tile_moments(const T* x, Moments* parts, float* pivots, int64_t count,
                              int64_t tiles) {
  __shared__ Moments scratch[kThreads / kWarp];
  const int64_t group = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const T* from = x + group * count;
  const float pivot = load_float(from);
  Moments mine{0.0, 0.0, pivot, pivot};
  for_tile(from, tile * kTile, count, [&](int64_t, float v) { add_moments(mine, v, pivot); });
  mine = warp_total(mine);
  if (lane_id() == 0) scratch[warp_id()] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) add_moments(mine, scratch[warp]);
  parts[blockIdx.x] = mine;
  if (tile == 0) pivots[group] = pivot;
}

template <class T>
QMIR_DEVICE void tile_forward(const T* x, const Prediction* found, T* y, int64_t count,
                              int64_t tiles, const Settings& set) {
  const int64_t group = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const Prediction at = found[group];
  const Grid grid = set.grid(at);
  const T* from = x + group * count;
  map_tile(from, from, y + group * count, tile * kTile, count,
           [&](float v, float) { return fake_quantized(v, grid, at.stats, set.clamp); });
}

template <class T>
QMIR_DEVICE void tile_sums(const T* grad, const T* x, const Prediction* found, GradientSums* parts,
                           int64_t count, int64_t tiles, const Settings& set) {
  __shared__ GradientSums scratch[kThreads / kWarp];
  const int64_t group = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const Prediction at = found[group];
  const Grid grid = set.grid(at);
  const T* up = grad + group * count;
  GradientSums mine{};
  for_tile(x + group * count, tile * kTile, count, [&](int64_t i, float v) {
    add_gradient(mine, v, load_float(up + i), grid, at.stats, set.clamp);
  });
  mine = warp_total(mine);
  if (lane_id() == 0) scratch[warp_id()] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) add_gradient(mine, scratch[warp]);
  parts[blockIdx.x] = mine;
}

template <class T>
QMIR_DEVICE void tile_backward(const T* grad, const T* x, const Prediction* found,
                               const InputGradient* through, T* dx, int64_t count, int64_t tiles,
                               const Settings& set) {
  const int64_t group = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const Prediction at = found[group];
  const InputGradient by = through[group];
  const Grid grid = set.grid(at);
  map_tile(x + group * count, grad + group * count, dx + group * count, tile * kTile, count,
           [&](float v, float g) { return input_gradient(v, g, grid, at.stats, by, set.clamp); });
}

// Prediction for one short group, by a whole warp.
template <class T>
QMIR_DEVICE Prediction predict_row(const T* from, int64_t count, const Predictor& predictor) {
  const float pivot = load_float(from);
  Moments mine{0.0, 0.0, pivot, pivot};
  for (int64_t i = lane_id(); i < count; i += kWarp) add_moments(mine, load_float(from + i), pivot);
  return predict_group(warp_total(mine), pivot, count, predictor);
}

// Calls body(group) for the groups of this warp.
template <class Body>
QMIR_DEVICE void for_rows(int64_t groups, const Body& body) {
  const int64_t first = ((int64_t)blockIdx.x * kRowWarps + warp_id()) * kRowsPerWarp;
  for (int64_t group = first; group < min_of(first + kRowsPerWarp, groups); ++group) body(group);
}

template <class T>
QMIR_DEVICE void row_forward(const T* x, const float* w, const float* v, T* y, int64_t groups,
                             int64_t count, const Settings& set) {
  const Predictor predictor{w, v, set.levels()};
  for_rows(groups, [&](int64_t group) {
    const T* from = x + group * count;
    const Prediction at = predict_row(from, count, predictor);
    const Grid grid = set.grid(at);
    for (int64_t i = lane_id(); i < count; i += kWarp)
      store_float(y + group * count + i,
                  fake_quantized(load_float(from + i), grid, at.stats, set.clamp));
  });
}

QMIR_DEVICE void add_scalars(ScalarGradients& to, const ScalarGradients& from) {
  for (int i = 0; i < 4; ++i) {
    to.scale[i] += from.scale[i];
    to.shift[i] += from.shift[i];
  }
}

template <class T>
QMIR_DEVICE void row_backward(const T* grad, const T* x, const float* w, const float* v, T* dx,
                              ScalarGradients* parts, int64_t groups, int64_t count,
                              const Settings& set) {
  __shared__ ScalarGradients scratch[kRowWarps];
  const Predictor predictor{w, v, set.levels()};
  const double scale = set.gradient_scale(count);
  ScalarGradients total{};
  for_rows(groups, [&](int64_t group) {
    const T *from = x + group * count, *up = grad + group * count;
    const Prediction at = predict_row(from, count, predictor);
    const Grid grid = set.grid(at);
    GradientSums sums{};
    for (int64_t i = lane_id(); i < count; i += kWarp)
      add_gradient(sums, load_float(from + i), load_float(up + i), grid, at.stats, set.clamp);
    ScalarGradients scalars{};
    const InputGradient by =
        dls_gradient(at, warp_total(sums), predictor, set.cap, count, scale, scalars);
    add_scalars(total, scalars);
    for (int64_t i = lane_id(); i < count; i += kWarp)
      store_float(dx + group * count + i, input_gradient(load_float(from + i), load_float(up + i),
                                                         grid, at.stats, by, set.clamp));
  });
  if (lane_id() == 0) scratch[warp_id()] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kRowWarps; ++warp) add_scalars(total, scratch[warp]);
  parts[blockIdx.x] = total;
}

}  // namespace

#define QMIR_KERNEL extern "C" __global__ void __launch_bounds__(256)
#define QMIR_ROW_KERNEL extern "C" __global__ void __launch_bounds__(128, 1)

// The tiles' sums of a group, and its step and shift; a block each.
QMIR_KERNEL qmir_dls_predict(const Moments* parts, const float* pivots, const float* w,
                             const float* v, Prediction* found, int64_t count, int64_t tiles,
                             int32_t quant_min, int32_t quant_max, int32_t cap) {
  __shared__ Moments scratch[kThreads / kWarp];
  const float pivot = pivots[blockIdx.x];
  Moments mine{0.0, 0.0, pivot, pivot};
  for (int64_t i = threadIdx.x; i < tiles; i += kThreads)
    add_moments(mine, parts[blockIdx.x * tiles + i]);
  mine = warp_total(mine);
  if (lane_id() == 0) scratch[warp_id()] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) add_moments(mine, scratch[warp]);
  const Settings set{(float)quant_min, (float)quant_max, cap, 0};
  found[blockIdx.x] = predict_group(mine, pivot, count, {w, v, set.levels()});
}

// The tiles' sums of a group, and what its gradients need; a block each.
QMIR_KERNEL qmir_dls_gradient(const GradientSums* parts, const Prediction* found, const float* w,
                              const float* v, InputGradient* through, ScalarGradients* scalars,
                              int64_t count, int64_t tiles, int32_t quant_min, int32_t quant_max,
                              int32_t cap) {
  __shared__ GradientSums scratch[kThreads / kWarp];
  GradientSums mine{};
  for (int64_t i = threadIdx.x; i < tiles; i += kThreads)
    add_gradient(mine, parts[blockIdx.x * tiles + i]);
  mine = warp_total(mine);
  if (lane_id() == 0) scratch[warp_id()] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) add_gradient(mine, scratch[warp]);
  const Settings set{(float)quant_min, (float)quant_max, cap, 0};
  ScalarGradients out{};
  through[blockIdx.x] = dls_gradient(found[blockIdx.x], mine, {w, v, set.levels()}, cap, count,
                                     set.gradient_scale(count), out);
  scalars[blockIdx.x] = out;
}

// Gradients of the eight scalars: sums of `count` parts, by one block.
QMIR_KERNEL qmir_dls_scalars(const ScalarGradients* parts, float* dw, float* dv, int64_t count) {
  __shared__ double scratch[kThreads / kWarp];
  ScalarGradients mine{};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) add_scalars(mine, parts[i]);
  for (int i = 0; i < 8; ++i) {
    const double total =
        block_sum<kThreads>(i < 4 ? mine.scale[i % 4] : mine.shift[i % 4], scratch);
    if (threadIdx.x == 0) (i < 4 ? dw : dv)[i % 4] = (float)total;
    __syncthreads();
  }
}

#define QMIR_DLS_KERNELS(name, T)                                                                 \
  QMIR_KERNEL qmir_dls_moments_##name(const T* x, Moments* parts, float* pivots, int64_t count,   \
                                      int64_t tiles) {                                            \
    tile_moments(x, parts, pivots, count, tiles);                                                 \
  }                                                                                               \
  QMIR_KERNEL qmir_dls_forward_##name(const T* x, const Prediction* found, T* y, int64_t count,   \
                                      int64_t tiles, int32_t quant_min, int32_t quant_max,        \
                                      int32_t clamp) {                                            \
    tile_forward(x, found, y, count, tiles, {(float)quant_min, (float)quant_max, 0, clamp});      \
  }                                                                                               \
  QMIR_KERNEL qmir_dls_sums_##name(const T* grad, const T* x, const Prediction* found,            \
                                   GradientSums* parts, int64_t count, int64_t tiles,             \
                                   int32_t quant_min, int32_t quant_max, int32_t clamp) {         \
    tile_sums(grad, x, found, parts, count, tiles,                                                \
              {(float)quant_min, (float)quant_max, 0, clamp});                                    \
  }                                                                                               \
  QMIR_KERNEL qmir_dls_backward_##name(                                                           \
      const T* grad, const T* x, const Prediction* found, const InputGradient* through, T* dx,    \
      int64_t count, int64_t tiles, int32_t quant_min, int32_t quant_max, int32_t clamp) {        \
    tile_backward(grad, x, found, through, dx, count, tiles,                                      \
                  {(float)quant_min, (float)quant_max, 0, clamp});                                \
  }                                                                                               \
  QMIR_ROW_KERNEL qmir_dls_rows_forward_##name(const T* x, const float* w, const float* v, T* y,  \
                                               int64_t groups, int64_t count, int32_t quant_min,  \
                                               int32_t quant_max, int32_t cap, int32_t clamp) {   \
    row_forward(x, w, v, y, groups, count, {(float)quant_min, (float)quant_max, cap, clamp});     \
  }                                                                                               \
  QMIR_ROW_KERNEL qmir_dls_rows_backward_##name(const T* grad, const T* x, const float* w,        \
                                                const float* v, T* dx, ScalarGradients* parts,    \
                                                int64_t groups, int64_t count, int32_t quant_min, \
                                                int32_t quant_max, int32_t cap, int32_t clamp) {  \
    row_backward(grad, x, w, v, dx, parts, groups, count,                                         \
                 {(float)quant_min, (float)quant_max, cap, clamp});                               \
  }

QMIR_DLS_KERNELS(f32, float)
QMIR_DLS_KERNELS(bf16, Bf16)
