// Layer norm of a row of channels, from the sums of its deviations from its first value (Moments).
#pragma once
#include "dls.cuh"
#include "math.cuh"

namespace qmir {

struct RowNorm {
  float mean, rstd;
};

// Sums in double, so that their order hardly ever shows in a result.
QMIR_FN RowNorm row_norm(double sum, double squares, float first, int64_t count, float eps) {
  const double variance = max_of((squares - sum * sum / count) / count, 0.0);
  return {(float)(first + sum / count), (float)(1.0 / sqrt(variance + eps))};
}

// One channel of the result; weight and bias may be null. Rounded as torch's CPU kernel does it.
QMIR_FN float norm_value(float x, const RowNorm& norm, const float* weight, const float* bias,
                         int64_t channel) {
  const float y = (x - norm.mean) * norm.rstd;
  if (weight && bias) return fmadd(y, weight[channel], bias[channel]);
  if (weight) return y * weight[channel];
  return bias ? y + bias[channel] : y;
}

}  // namespace qmir
