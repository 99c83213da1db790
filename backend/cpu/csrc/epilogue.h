// The epilogue of integer operators over runs of neighbouring results: what is the same for a run
// is asked once, so that the loops vectorize.
#pragma once
#include "activation_spans.h"
#include "epilogue.cuh"

namespace qmir {

// Asks for residuals that a tile reads in pieces later: the processor sees no stream in them.
inline void fetch_residuals(const Epilogue& end, int64_t at, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(float);
  if (!end.residual) return;
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(end.residual + at + i, 0, 2);
  __builtin_prefetch(end.residual + at + count - 1, 0, 2);
}

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
  activate_span(end.activation, y, count);
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
  activate_span(end.activation, y, count);
}

}  // namespace qmir
