// Statistics of the channels of a result while its tiles lie in the cache. A tile adds up by itself;
// tiles are merged in index order, so that no sum depends on threads.
#pragma once
#include <algorithm>
#include <vector>

#include "moments.cuh"
#include "statistics.h"

namespace qmir {

class MomentParts {
 public:
  static constexpr int64_t kLongest = 256;  // values of a channel that are added at once

  // Where `moments` is null nothing is kept. It has room for samples * channels results.
  MomentParts(int64_t samples, int64_t channels, int64_t tiles, const float* offset,
              double* moments)
      : channels_(channels),
        tiles_(tiles),
        offset_(offset),
        moments_(reinterpret_cast<ChannelMoments*>(moments)),
        parts_(moments ? samples * channels * tiles : 0) {}

  bool wanted() const {
    return moments_ != nullptr;
  }

  // The next values of a channel's tile, at most kLongest; a tile is one thread's.
  void add(int64_t sample, int64_t channel, int64_t tile, const float* y, int64_t count) const {
    alignas(32) float shifted[kLongest];
    if (offset_) {
      const float offset = offset_[channel];
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) shifted[i] = y[i] + offset;
      y = shifted;
    }
    TilePart& part = at(sample, channel, tile);
    if (part.count == 0) part = {0.0, 0.0, y[0], y[0], y[0], 0};
    const Moments m = moments_of(y, count, part.pivot);
    part.sum += m.sum;
    part.squares += m.squares;
    part.low = min_of(part.low, m.low);
    part.high = max_of(part.high, m.high);
    part.count += (int32_t)count;
  }

  // A tile of rows, channels [first, last) of each, `pitch` values apart.
  void add_rows(int64_t sample, int64_t tile, const float* y, int64_t pitch, int64_t rows,
                int64_t first, int64_t last) const {
    for (int64_t c = first; c < last; c += 8)
      add_columns(sample, tile, y + c, pitch, rows, c, std::min<int64_t>(8, last - c));
  }

  void finish() const {
    const int64_t all = parts_.size() / std::max<int64_t>(tiles_, 1);
#pragma omp parallel for if ((int64_t)parts_.size() > kParallelFrom / 4)
    for (int64_t i = 0; i < all; ++i) {
      const TilePart* parts = parts_.data() + i * tiles_;
      ChannelSums sums = no_sums(parts[0].pivot);
      for (int64_t t = 0; t < tiles_; ++t) sums.add(parts[t]);
      moments_[i] = sums.moments();
    }
  }

 private:
  void add_columns(int64_t sample, int64_t tile, const float* y, int64_t pitch, int64_t rows,
                   int64_t channel, int64_t count) const {
    const f8 offset = offset_ ? load8(offset_ + channel, count, 0.0f) : f8{};
    const auto row = [&](int64_t r) {
      const f8 v = count == 8 ? load8(y + r * pitch) : load8(y + r * pitch, count, 0.0f);
      return offset_ ? v + offset : v;
    };
    const f8 pivot = row(0);
    const d8 wide = widen(pivot);
    Sum8 sum, squares;
    f8 low = pivot, high = pivot;
    for (int64_t r = 0; r < rows; ++r) {
      const f8 v = row(r);
      const d8 d = widen(v) - wide;
      sum.add(d);
      squares.add(d.square());
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    double sums[8], square_sums[8];
    std::memcpy(sums, &sum.lanes, sizeof sums);
    std::memcpy(square_sums, &squares.lanes, sizeof square_sums);
    for (int64_t i = 0; i < count; ++i)
      at(sample, channel + i, tile) = {sums[i],  square_sums[i], low[i],
                                       high[i], pivot[i],       (int32_t)rows};
  }

  TilePart& at(int64_t sample, int64_t channel, int64_t tile) const {
    return parts_[(sample * channels_ + channel) * tiles_ + tile];
  }

  int64_t channels_, tiles_;
  const float* offset_;
  ChannelMoments* moments_;
  mutable std::vector<TilePart> parts_;  // [sample][channel][tile]
};

}  // namespace qmir
