// Layer norm of a row of channels, from the sums of its deviations from its first value (Moments).
#pragma once
#include "dls.cuh"

namespace qmir {

struct RowNorm {
  float mean, rstd;
};

// Sums in double, so that their order hardly ever shows in a result.
QMIR_FN RowNorm row_norm(double sum, double squares, float first, int64_t count, float eps) {
  const double variance = max_of((squares - sum * sum / count) / count, 0.0);
  return {(float)(first + sum / count), (float)(1.0 / sqrt(variance + eps))};
}

// Without weights; each operation rounds on its own, as torch does it.
QMIR_FN float normalized(float x, const RowNorm& norm) { return (x - norm.mean) * norm.rstd; }

}  // namespace qmir
