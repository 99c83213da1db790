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

  // Of result y of a channel and its residual.
  QMIR_FN float sum(float y, float other, int64_t channel) const {
    return scale ? add_scaled(y, other, scale[channel]) : add(y, other);
  }

  // Of result y of a channel, `at` in the residual.
  QMIR_FN float operator()(float y, int64_t at, int64_t channel) const {
    if (residual) y = sum(y, residual[at], channel);
    return activate(activation, y);
  }

  // The same where the activation is none or relu, which take few instructions.
  QMIR_FN float exact(float y, int64_t at, int64_t channel) const {
    if (residual) y = sum(y, residual[at], channel);
    return activation == Activation::relu ? activate<Activation::relu>(y) : y;
  }
};

}  // namespace qmir
