// A tile of an operator's float results in shared memory, 64 positions (rows or pixels) of 64
// channels, where threads take other results than those of their products, in loops that registers
// do not allow: any activation, and the statistics of each channel.
#pragma once
#include "device.cuh"
#include "epilogue.cuh"
#include "part_sums.cuh"

namespace qmir {

struct ResultTile {
  static constexpr int kSide = 64, kThreads = 128;
  // Odd: neither neighbouring positions nor neighbouring channels meet a bank twice.
  static constexpr int kPitch = kSide + 1;

  float* values;

  QMIR_DEVICE float& at(int position, int channel) const {
    return values[position * kPitch + channel];
  }
};

// The share of a thread in writing a tile: neighbouring threads take neighbouring positions, or
// channels. place(position, channel) is the place in the result, -1 where there is none.
template <class Place>
class TileShare {
 public:
  static constexpr int kEach = ResultTile::kSide * ResultTile::kSide / ResultTile::kThreads;

  QMIR_DEVICE TileShare(const ResultTile& tile, bool by_position, int first_channel,
                        const Place& place)
      : tile_(tile), by_position_(by_position), first_channel_(first_channel), place_(place) {}

  // Adds the residual, of which several values are on their way at a time.
  QMIR_DEVICE void add_residual(const Epilogue& end) const {
    constexpr int kBatch = 8;
#pragma unroll 1
    for (int first = 0; first < kEach; first += kBatch) {
      float other[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t at = place_(position(first + i), channel(first + i));
        other[i] = at >= 0 ? end.residual[at] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int p = position(first + i), c = channel(first + i);
        if (place_(p, c) >= 0) tile_.at(p, c) = end.sum(tile_.at(p, c), other[i], first_channel_ + c);
      }
    }
  }

  // Writes the results, and leaves in the tile what the statistics are of.
  QMIR_DEVICE void write(Activation activation, const PartsRoom& parts, float* y) const {
#pragma unroll 2
    for (int i = 0; i < kEach; ++i) {
      const int p = position(i), c = channel(i);
      const int64_t at = place_(p, c);
      if (at < 0) continue;
      const float result = activate(activation, tile_.at(p, c));
      y[at] = result;
      if (parts.wanted()) tile_.at(p, c) = parts.shifted(result, first_channel_ + c);
    }
  }

 private:
  const ResultTile& tile_;
  bool by_position_;
  int first_channel_;
  const Place& place_;

  QMIR_DEVICE static int inner() {
    return (int)threadIdx.x % ResultTile::kSide;
  }
  QMIR_DEVICE static int outer(int i) {
    constexpr int kRows = ResultTile::kThreads / ResultTile::kSide;
    return (int)threadIdx.x / ResultTile::kSide + kRows * i;
  }
  QMIR_DEVICE int position(int i) const {
    return by_position_ ? inner() : outer(i);
  }
  QMIR_DEVICE int channel(int i) const {
    return by_position_ ? outer(i) : inner();
  }
};

// The statistics of a tile's first `channels` channels; two neighbouring threads share one.
// some(position) says whether there are results, which holds at position 0.
template <class Some>
QMIR_DEVICE void add_up_tile(const ResultTile& tile, int channels, const Some& some,
                             TilePart* parts, int64_t pitch) {
  const int channel = (int)threadIdx.x / 2, half = (int)threadIdx.x % 2;
  // Whole warps go on together, so that those beyond the last channel repeat it.
  const int column = min_of(channel, channels - 1);
  const auto value = [&](int i, float& x) {
    const int position = 2 * i + half;
    if (!some(position)) return false;
    x = tile.at(position, column);
    return true;
  };
  TilePart part = thread_part<ResultTile::kSide / 2>(value, tile.at(0, column));
  add_lane(part, 1);
  if (half == 0 && channel < channels) parts[channel * pitch] = part;
}

// Completes a tile that all threads have filled: epilogue, memory and, where there is room for
// them, the parts of its statistics, of which `mine` is the first and others are `pitch` apart.
template <class Place, class Some>
QMIR_DEVICE void finish_tile(const ResultTile& tile, bool by_position, int first_channel,
                             int channels, const Epilogue& end, const PartsRoom& room,
                             TilePart* mine, const Place& place, const Some& some, float* y) {
  const TileShare<Place> share(tile, by_position, first_channel, place);
  __syncthreads();
  if (end.residual) share.add_residual(end);
  share.write(end.activation, room, y);
  if (!room.wanted()) return;
  __syncthreads();
  add_up_tile(tile, channels, some, mine, room.tiles);
}

}  // namespace qmir
