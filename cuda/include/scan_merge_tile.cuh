// Sum of the four directions' images in tiles of one channel, with the statistics of each tile.
#pragma once
#include "part_sums.cuh"
#include "scan_merge.cuh"

namespace qmir {

// A block for each kTile pixels of a channel of a sample, of `length` pixels. Sums wait in shared
// memory for the pivot, which is the first of them, and so that loops need not be unrolled.
template <int kTile, int kThreads>
QMIR_DEVICE void merge_tile(const float* directions, float* y, int64_t length,
                            const PartsRoom& room) {
  constexpr int kBatch = 4, kWarps = kThreads / kWarp;
  static_assert(kTile % (kBatch * kThreads) == 0, "all threads go round equally often");
  __shared__ float tile[kTile];
  __shared__ TilePart scratch[kWarps];
  const int64_t image = blockIdx.x / room.tiles, index = blockIdx.x % room.tiles;
  const int64_t sample = image / room.channels, channel = image % room.channels;
  const int64_t plane = room.channels * length, begin = index * kTile;
  const float* from = directions + sample * 4 * plane + channel * length + begin;
  float* to = y + image * length + begin;
  const int count = (int)min_of<int64_t>(kTile, length - begin);
#pragma unroll 1
  for (int first = threadIdx.x; first < kTile; first += kBatch * kThreads) {
    // Writes may be to what is read, for all the compiler knows: all reads go before them.
    float sums[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * kThreads;
      sums[i] = at < count ? directions_sum(from + at, plane) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * kThreads;
      if (at >= count) continue;
      to[at] = sums[i];
      tile[at] = room.shifted(sums[i], channel);
    }
  }
  __syncthreads();
  const auto value = [&](int i, float& x) {
    const int at = (int)threadIdx.x + i * kThreads;
    if (at >= count) return false;
    x = tile[at];
    return true;
  };
  const TilePart mine = thread_part<kTile / kThreads>(value, tile[0]);
  const TilePart part = block_part<kWarps>(mine, scratch);
  if (threadIdx.x == 0) *room.at(sample, channel, index) = part;
}

}  // namespace qmir
