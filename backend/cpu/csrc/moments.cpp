// Statistics of the channels of a result (samples, channels, positions) that is there already.
#include "moments.h"

using namespace qmir;

extern "C" void qmir_channel_moments(const float* y, const float* offset, int64_t samples,
                                     int64_t channels, int64_t positions, double* moments) {
  constexpr int64_t kTile = MomentParts::kLongest;
  const MomentParts parts(samples, channels, (positions + kTile - 1) / kTile, offset, moments);
#pragma omp parallel for if (samples * channels * positions >= kParallelFrom)
  for (int64_t i = 0; i < samples * channels; ++i)
    for (int64_t at = 0; at < positions; at += kTile)
      parts.add(i / channels, i % channels, at / kTile, y + i * positions + at,
                std::min(kTile, positions - at));
  parts.finish();
}
