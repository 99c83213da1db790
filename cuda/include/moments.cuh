// Statistics of one channel of a result, from the tiles that its operator made, and of a group from
// those of its channels. What they hold is defined in qmir_ao/ops/_moments.py.
#pragma once
#include "dls.cuh"

namespace qmir {

// Of one channel in one tile: sums of deviations from the pivot, which is one of its values.
struct TilePart {
  double sum, squares;
  float low, high, pivot;
  int32_t count;
};

// Mirrors the last dimension of the tensor.
struct ChannelMoments {
  double mean, squares, low, high;
};

// Sums of a channel about one pivot, to which the tiles are moved: where all values are equal,
// everything stays zero.
struct ChannelSums {
  double pivot, sum, squares;
  float low, high;
  int64_t count;

  QMIR_FN void add(const TilePart& part) {
    const double away = (double)part.pivot - pivot;
    sum += part.sum + part.count * away;
    squares += part.squares + away * (2.0 * part.sum + part.count * away);
    low = min_of(low, part.low);
    high = max_of(high, part.high);
    count += part.count;
  }

  QMIR_FN void add(const ChannelSums& other) {
    sum += other.sum;
    squares += other.squares;
    low = min_of(low, other.low);
    high = max_of(high, other.high);
    count += other.count;
  }

  QMIR_FN ChannelMoments moments() const {
    const double mean = sum / count;
    return {pivot + mean, max_of(squares - sum * mean, 0.0 * squares), low, high};
  }
};

QMIR_FN ChannelSums no_sums(float pivot) {
  return {pivot, 0.0, 0.0, pivot, pivot, 0};
}

// Adds a channel of `count` values to the sums of a group about its pivot.
QMIR_FN void add_channel(Moments& all, float pivot, const ChannelMoments& channel, double count) {
  const double away = channel.mean - (double)pivot;
  all.sum += count * away;
  all.squares += channel.squares + count * away * away;
  all.low = min_of(all.low, (float)channel.low);
  all.high = max_of(all.high, (float)channel.high);
}

}  // namespace qmir
