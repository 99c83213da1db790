// What follows the float result of an integer operator within it: a residual, whose channels may
// have factors, and an activation. Each operation rounds on its own, as separate operators do.
#pragma once
#include "activations.cuh"

namespace qmir {

struct Epilogue {
  const float* residual;  // lies like the results, or null
  const float* scale;     // one for each output channel, or null
  Activation activation;

  QMIR_FN float add(float y, float other) const { return other + y; }

  QMIR_FN float add_scaled(float y, float other, float factor) const { return other * factor + y; }

  // Of result y of a channel, `at` in the residual.
  QMIR_FN float operator()(float y, int64_t at, int64_t channel) const {
    if (residual)
      y = scale ? add_scaled(y, residual[at], scale[channel]) : add(y, residual[at]);
    return activate(activation, y);
  }
};

}  // namespace qmir
