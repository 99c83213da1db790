// Statistics of groups of activations on the device, in the order of backend/cpu/csrc/reduce.h:
// chunks of 4096, sixteen lanes each. Both targets find the same bytes.
#pragma once
#include "dls_device.cuh"
#include "pair_sum.cuh"

namespace qmir {

constexpr int kChunk = 4096, kLanes = 16;
constexpr int kThreads = 128, kHalfWarps = kThreads / kLanes;

// Sum over 16 neighbouring lanes as Sum8::total adds them, twice over.
QMIR_DEVICE double lanes_sum(double x) {
  x = x + __shfl_xor_sync(kAllLanes, x, 4);
  x = x + __shfl_xor_sync(kAllLanes, x, 2);
  x = x + __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 8);
}

// Lane's share of a chunk: every 16th value. Of the last, partial 16 the first 8 belong to the
// lanes 0 to 7 only where they are all there, otherwise to the lanes from 8 on.
template <class Sum, class Values>
QMIR_DEVICE double lane_sum(const Values& at, int count, float first, int lane, bool squared) {
  Sum sum;
  const int whole = count / kLanes * kLanes, rest = count - whole;
#pragma unroll 8
  for (int i = 0; i < whole; i += kLanes) sum.add(at(i + lane), first, squared);
  const int from = rest < kLanes / 2 ? lane - kLanes / 2 : lane;
  if (from >= 0 && from < rest) sum.add(at(whole + from), first, squared);
  return sum.value();
}

// Both sums of a chunk, in every lane of 32: the lanes 0 to 15 and 16 to 31 each add one of them.
template <class Values>
QMIR_DEVICE void chunk_sums(const Values& at, int count, float first, double& sum,
                            double& squares) {
  const int lane = lane_id() % kLanes;
  const bool squared = lane_id() >= kLanes;
  const auto both = [&](double mine) {
    mine = lanes_sum(mine);
    sum = __shfl_sync(kAllLanes, mine, 0);
    squares = __shfl_sync(kAllLanes, mine, kLanes);
  };
  if (QMIR_FLOAT_PAIRS) {
    both(lane_sum<PairSum>(at, count, first, lane, squared));
    if (pairs_hold(squares)) return;
  }
  both(lane_sum<DoubleSum>(at, count, first, lane, squared));
}

// Both sums of up to 2^31 values, in every lane of a half of a warp; each half adds up its own.
template <class Values>
QMIR_DEVICE void half_warp_sums(const Values& at, int count, float first, double& sum,
                                double& squares) {
  const int lane = lane_id() % kLanes;
  bool trusted = false;
  if (QMIR_FLOAT_PAIRS) {
    sum = lanes_sum(lane_sum<PairSum>(at, count, first, lane, false));
    squares = lanes_sum(lane_sum<PairSum>(at, count, first, lane, true));
    trusted = pairs_hold(squares);
  }
  if (__all_sync(kAllLanes, trusted)) return;
  const double exact_sum = lanes_sum(lane_sum<DoubleSum>(at, count, first, lane, false));
  const double exact = lanes_sum(lane_sum<DoubleSum>(at, count, first, lane, true));
  if (trusted) return;
  sum = exact_sum;
  squares = exact;
}

// Minimum and maximum over each half of a warp.
QMIR_DEVICE void half_warp_range(float& low, float& high) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    low = min_of(low, __shfl_xor_sync(kAllLanes, low, offset));
    high = max_of(high, __shfl_xor_sync(kAllLanes, high, offset));
  }
}

// The same over the block, in every thread.
QMIR_DEVICE void block_range(float& low, float& high, float (&scratch)[2][kHalfWarps]) {
  half_warp_range(low, high);
  if (threadIdx.x % kLanes == 0) {
    scratch[0][threadIdx.x / kLanes] = low;
    scratch[1][threadIdx.x / kLanes] = high;
  }
  __syncthreads();
  for (int i = 0; i < kHalfWarps; ++i) {
    low = min_of(low, scratch[0][i]);
    high = max_of(high, scratch[1][i]);
  }
}

// The sums of a group, and its first element.
struct Group {
  Moments moments;
  float first;
};

QMIR_DEVICE Prediction predict(const Group& group, int64_t count, const Predictor& predictor,
                               float* step, float* shift) {
  const Prediction found = predict_group(group.moments, group.first, count, predictor);
  *step = found.step;
  *shift = found.shift;
  return found;
}

// Statistics of a short group, in every lane of a half of a warp.
template <class Values>
QMIR_DEVICE Group half_warp_group(const Values& at, int count) {
  const float first = at(0);
  float low = first, high = first;
  for (int i = lane_id() % kLanes; i < count; i += kLanes) {
    low = min_of(low, at(i));
    high = max_of(high, at(i));
  }
  half_warp_range(low, high);
  double sum = 0.0, squares = 0.0;
  half_warp_sums(at, count, first, sum, squares);
  return {{sum, squares, low, high}, first};
}

// What the first warp finds of a chunk; `low` and `high` are those of the block.
template <class Values>
QMIR_DEVICE void store_chunk(const Values& at, int count, float first, float low, float high,
                             double* sums, float* ranges) {
  if (threadIdx.x >= kWarp) return;
  double sum, squares;
  chunk_sums(at, count, first, sum, squares);
  if (threadIdx.x > 0) return;
  sums[2 * (int64_t)blockIdx.x] = sum;
  sums[2 * (int64_t)blockIdx.x + 1] = squares;
  ranges[2 * (int64_t)blockIdx.x] = low;
  ranges[2 * (int64_t)blockIdx.x + 1] = high;
}

}  // namespace qmir
