// Selective scan of floats on the device: how a block lays out its work and reads its operands.
//
// A warp takes 8 channels of one group; four lanes share a channel, kStates states each: lane =
// channel + 8 * quarter. The warps of a block take neighbouring channels at the same time steps, so
// that they share B and C. Sequences are cut into chunks, which different blocks take.
#pragma once
#include "device.cuh"
#include "selective_scan.cuh"

namespace qmir {

constexpr int kChannels = 8, kQuarters = 4, kSteps = 32;
constexpr int kRow = kSteps + 1;  // of a tile, so that channels lie in different banks

template <class T>
struct FloatScan {
  const T *u, *delta, *B, *C;
  const float *A, *D, *bias;
  int64_t batch, channels, groups, states, length;
  int softplus;
  int64_t chunk;  // time steps of a chunk, a multiple of kSteps

  QMIR_DEVICE int64_t per_group() const {
    return channels / groups;
  }
  QMIR_DEVICE int64_t chunks() const {
    return (length + chunk - 1) / chunk;
  }
};

// What a block and its warps work on.
struct ScanPart {
  int64_t sample, group, block, chunk;  // block: of channels within the group
  int64_t first;                        // channel of this warp within its group
  int width;                            // channels of this warp, 0 where there are none left

  template <class T>
  QMIR_DEVICE explicit ScanPart(const FloatScan<T>& s) {
    const int64_t per_block = blockDim.x / kWarp * kChannels;
    const int64_t blocks = (s.per_group() + per_block - 1) / per_block;
    int64_t rest = blockIdx.x;
    chunk = rest % s.chunks();
    rest /= s.chunks();
    block = rest % blocks;
    rest /= blocks;
    group = rest % s.groups;
    sample = rest / s.groups;
    first = block * per_block + warp_id() * kChannels;
    const int64_t left = s.per_group() - first;
    width = (int)clamp_to<int64_t>(left, 0, kChannels);
  }

  // Channel `c` of this warp, counted over all groups and samples.
  template <class T>
  QMIR_DEVICE int64_t row(const FloatScan<T>& s, int c) const {
    return sample * s.channels + group * s.per_group() + first + c;
  }
};

// Room of a quarter's states in a row of a B or C tile: whole vectors where they are read as such.
template <int kStates>
constexpr int kRoom = kStates == 3 ? 4 : kStates;
// Four floats more, so that neighbouring steps lie in different banks.
template <int kStates>
constexpr int kProjectionRow = kQuarters * kRoom<kStates> + 4;

template <int kStates>
QMIR_DEVICE void load_states(const float* from, float (&x)[kStates]) {
  if constexpr (kRoom<kStates> % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kRoom<kStates>; i += 4) {
      float four[4];
      load_four(from + i, four);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (i + j < kStates) x[i + j] = four[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kStates; ++i) x[i] = from[i];
  }
}

// A state's place in a row of a tile.
template <int kStates>
QMIR_DEVICE int place_of(int64_t state) {
  return (int)(state / kStates * kRoom<kStates> + state % kStates);
}

// B or C of a tile, rows of kProjectionRow by time step, by all threads of the block. Zero beyond
// the sequence and the states.
template <int kStates, class T>
QMIR_DEVICE void load_projection(const T* from, const FloatScan<T>& s, int64_t begin, float* tile) {
  for (int item = threadIdx.x; item < kQuarters * kStates * kSteps; item += blockDim.x) {
    const int state = item / kSteps, t = item % kSteps;
    const bool there = state < s.states && begin + t < s.length;
    tile[t * kProjectionRow<kStates> + place_of<kStates>(state)] =
        there ? load_float(from + state * s.length + begin + t) : 0.0f;
  }
}

// u and the time steps of a warp's channels; returns the largest |dt| of this lane. Both are zero
// beyond the sequence and the channels, where a step changes nothing.
template <class T>
QMIR_DEVICE float load_channels(const FloatScan<T>& s, const ScanPart& part, int64_t begin,
                                float* u, float* dt) {
  const int64_t at = begin + lane_id();
  float largest = 0.0f;
  for (int c = 0; c < kChannels; ++c) {
    float value = 0.0f, step = 0.0f;
    if (c < part.width && at < s.length) {
      const int64_t row = part.row(s, c);
      value = load_float(s.u + row * s.length + at);
      step = load_float(s.delta + row * s.length + at);
      if (s.bias) step += s.bias[row % s.channels];
      if (s.softplus) step = softplus_lanes(step);
    }
    u[c * kRow + lane_id()] = value;
    dt[c * kRow + lane_id()] = step;
    // NaN must count as large: the comparison below is then false.
    largest = lane_abs(step) <= largest ? largest : lane_abs(step);
  }
  return largest;
}

// The decay rates of this lane's states, zero where there are none.
template <int kStates>
struct Rates {
  DecayRate<float> at[kStates];
  float largest = 0.0f;

  template <class T>
  QMIR_DEVICE Rates(const FloatScan<T>& s, const ScanPart& part) {
    const int c = lane_id() % kChannels, first = lane_id() / kChannels * kStates;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const bool there = c < part.width && first + i < s.states;
      const int64_t channel = part.row(s, c) % s.channels;
      at[i] = decay_rate(there ? s.A[channel * s.states + first + i] : 0.0f);
      const float size = lane_abs(at[i].high);
      largest = size <= largest ? largest : size;
    }
  }

  // Whether exp2_product needs its clamps for some lane of the warp.
  QMIR_DEVICE bool clamped(float largest_step) const {
    return !__all_sync(kAllLanes, warp_max(largest_step) * largest < kExponentReach) ||
           !__all_sync(kAllLanes, largest_step == largest_step);
  }
};

}  // namespace qmir
