// Statistics of the channels of an operator's result, from the tiles that it made, and step and
// shift of a quantizer's groups from those. What they hold is defined in qmir_ao/ops/_moments.py.
#include "dls_sums.cuh"
#include "moments.cuh"

using namespace qmir;

// A warp for each channel of each sample. Lanes take every 32nd tile, and add up in a tree: the
// order depends on nothing but the number of tiles.
extern "C" __global__ void __launch_bounds__(128)
    qmir_moments_merge(const TilePart* parts, ChannelMoments* moments, int64_t channels,
                       int64_t tiles) {
  const int64_t channel = (int64_t)blockIdx.x * (kThreads / kWarp) + warp_id();
  if (channel >= channels) return;
  const TilePart* mine = parts + channel * tiles;
  ChannelSums sums = no_sums(mine[0].pivot);
#pragma unroll 4
  for (int64_t tile = lane_id(); tile < tiles; tile += kWarp) sums.add(mine[tile]);
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    sums.add(ChannelSums{sums.pivot, __shfl_xor_sync(kAllLanes, sums.sum, apart),
                         __shfl_xor_sync(kAllLanes, sums.squares, apart),
                         __shfl_xor_sync(kAllLanes, sums.low, apart),
                         __shfl_xor_sync(kAllLanes, sums.high, apart),
                         __shfl_xor_sync(kAllLanes, sums.count, apart)});
  }
  if (lane_id() == 0) moments[channel] = sums.moments();
}

// Step and shift of a group for each block, of `samples` samples and so many chosen channels of
// each (all, where `channels` is null), with `count` values. Threads make the terms of 128 channels
// at a time; two of them add these up in the order of backend/cpu/csrc/chain_quantize.cpp, so that
// both targets find the same bytes. A channel that is none of the features makes the group NaN.
extern "C" __global__ void __launch_bounds__(128)
    qmir_moments_steps(const ChannelMoments* moments, const int64_t* channels, const float* w,
                       const float* v, float* step, float* shift, int64_t samples, int64_t chosen,
                       int64_t features, int64_t count, float levels) {
  __shared__ double terms[2][kThreads], totals[2];
  __shared__ float scratch[2][kHalfWarps];
  const int64_t group = blockIdx.x, all = samples * chosen;
  const double each = (double)count / (double)all;
  const auto at = [&](int64_t i) {
    const int64_t channel = channels ? channels[i % chosen] : i % chosen;
    if (channel < 0 || channel >= features) return ChannelMoments{NAN, NAN, NAN, NAN};
    return moments[(group * samples + i / chosen) * features + channel];
  };
  const ChannelMoments first = at(0);
  const float pivot = (float)first.mean;
  float low = (float)first.low, high = (float)first.high;
  double total = 0.0;
  for (int64_t begin = 0; begin < all; begin += kThreads) {
    const int used = (int)min_of<int64_t>(kThreads, all - begin);
    if (threadIdx.x < used) {
      Moments one{0.0, 0.0, low, high};
      add_channel(one, pivot, at(begin + threadIdx.x), each);
      low = one.low;
      high = one.high;
      terms[0][threadIdx.x] = one.sum;
      terms[1][threadIdx.x] = one.squares;
    }
    __syncthreads();
    if (threadIdx.x < 2)
      for (int i = 0; i < used; ++i) total += terms[threadIdx.x][i];
    __syncthreads();
  }
  if (threadIdx.x < 2) totals[threadIdx.x] = total;
  block_range(low, high, scratch);
  if (threadIdx.x == 0)
    predict({{totals[0], totals[1], low, high}, pivot}, count, {w, v, levels}, step + group,
            shift + group);
}
