// Sums of one channel in one tile (moments.cuh) on the device: of a thread, and over the lanes that
// share the channel.
#pragma once
#include "moments.cuh"
#include "pair_sum.cuh"

namespace qmir {

// Where an operator leaves the parts of its statistics: [sample][channel][tile], or null. What they
// are of is the result plus the offset of its channel, if there are offsets.
struct PartsRoom {
  const float* offset;
  TilePart* parts;
  int64_t channels, tiles;

  QMIR_DEVICE bool wanted() const {
    return parts != nullptr;
  }
  QMIR_DEVICE float shifted(float y, int64_t channel) const {
    return offset ? y + offset[channel] : y;
  }
  QMIR_DEVICE TilePart* at(int64_t sample, int64_t channel, int64_t tile) const {
    return wanted() ? parts + (sample * channels + channel) * tiles + tile : nullptr;
  }
};

#define QMIR_PARTS_ROOM \
  const float *moments_offset, qmir::TilePart *parts, int64_t result_channels, int64_t result_tiles

#define QMIR_PARTS_ROOM_OF                               \
  PartsRoom {                                            \
    moments_offset, parts, result_channels, result_tiles \
  }

template <class Sum, int kCount, class Values>
QMIR_DEVICE void add_deviations(TilePart& part, const Values& value) {
  Sum sum, squares;
#pragma unroll 4
  for (int i = 0; i < kCount; ++i) {
    float x;
    if (!value(i, x)) continue;
    sum.add(x, part.pivot, false);
    squares.add(x, part.pivot, true);
  }
  part.sum = sum.value();
  part.squares = squares.value();
}

// What a thread adds up of a channel: value(i, x) for i below kCount sets x and says whether there
// is one.
template <int kCount, class Values>
QMIR_DEVICE TilePart thread_part(const Values& value, float pivot) {
  TilePart part{0.0, 0.0, pivot, pivot, pivot, 0};
#pragma unroll 4
  for (int i = 0; i < kCount; ++i) {
    float x;
    if (!value(i, x)) continue;
    part.low = min_of(x, part.low);
    part.high = max_of(x, part.high);
    ++part.count;
  }
  if (QMIR_FLOAT_PAIRS) {
    add_deviations<PairSum, kCount>(part, value);
    // Sums of zeros, too, are right.
    if ((part.low == pivot && part.high == pivot) || pairs_hold(part.squares)) return part;
  }
  add_deviations<DoubleSum, kCount>(part, value);
  return part;
}

// Adds what the lane `apart` bits away found about the same pivot; both get the sum.
QMIR_DEVICE void add_lane(TilePart& part, int apart) {
  part.sum += __shfl_xor_sync(kAllLanes, part.sum, apart);
  part.squares += __shfl_xor_sync(kAllLanes, part.squares, apart);
  part.low = min_of(part.low, __shfl_xor_sync(kAllLanes, part.low, apart));
  part.high = max_of(part.high, __shfl_xor_sync(kAllLanes, part.high, apart));
  part.count += __shfl_xor_sync(kAllLanes, part.count, apart);
}

// The part of a block whose threads all have shares of one channel. `scratch` is shared memory of
// kWarps parts; the result is in the first thread.
template <int kWarps>
QMIR_DEVICE TilePart block_part(TilePart part, TilePart* scratch) {
  for (int apart = kWarp / 2; apart > 0; apart /= 2) add_lane(part, apart);
  if (lane_id() == 0) scratch[warp_id()] = part;
  __syncthreads();
  TilePart total = scratch[0];
  for (int warp = 1; warp < kWarps; ++warp) {
    const TilePart& other = scratch[warp];
    total.sum += other.sum;
    total.squares += other.squares;
    total.low = min_of(total.low, other.low);
    total.high = max_of(total.high, other.high);
    total.count += other.count;
  }
  return total;
}

}  // namespace qmir
