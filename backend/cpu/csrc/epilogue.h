// The epilogue of integer operators over runs of neighbouring results: what is the same for a run
// is asked once, so that the loops vectorize.
#pragma once
#include "epilogue.cuh"

namespace qmir {

// Results of neighbouring channels, the first of them `channel`, `at` in the residual.
inline void finish_channels(const Epilogue& end, float* y, int64_t at, int64_t channel,
                            int64_t count) {
  if (end.residual && end.scale) {
    const float *other = end.residual + at, *factor = end.scale + channel;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) y[j] = end.add_scaled(y[j], other[j], factor[j]);
  } else if (end.residual) {
    const float* other = end.residual + at;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) y[j] = end.add(y[j], other[j]);
  }
  if (end.activation == ExactActivation::relu)
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) y[j] = end.relu(y[j]);
}

// Results of one channel at neighbouring positions, the first at `at` in the residual and the
// others `pitch` apart.
inline void finish_positions(const Epilogue& end, float* y, int64_t at, int64_t pitch,
                             int64_t channel, int64_t count) {
  if (end.residual) {
    const float* other = end.residual + at;
    const float factor = end.scale ? end.scale[channel] : 1.0f;
    // A product with 1 rounds nothing.
    if (pitch == 1)
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) y[j] = end.add_scaled(y[j], other[j], factor);
    else
      for (int64_t j = 0; j < count; ++j) y[j] = end.add_scaled(y[j], other[j * pitch], factor);
  }
  if (end.activation == ExactActivation::relu)
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) y[j] = end.relu(y[j]);
}

}  // namespace qmir
