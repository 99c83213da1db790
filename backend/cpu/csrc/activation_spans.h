// Activations of neighbouring values, in place and on lanes.
#pragma once
#include "simd.h"  // before the headers whose templates run on its lanes

#include "activations.cuh"

namespace qmir {

template <Activation kActivation>
void activate_span(float* v, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(v + i, activate<kActivation>(load(v + i)));
  if (i == count) return;
  alignas(64) float rest[kLanes] = {};
  std::memcpy(rest, v + i, (count - i) * sizeof(float));
  store(rest, activate<kActivation>(load(rest)));
  std::memcpy(v + i, rest, (count - i) * sizeof(float));
}

inline void activate_span(Activation activation, float* v, int64_t count) {
  switch (activation) {
    case Activation::none:
      return;
    case Activation::relu:
      return activate_span<Activation::relu>(v, count);
    case Activation::sigmoid:
      return activate_span<Activation::sigmoid>(v, count);
    case Activation::silu:
      return activate_span<Activation::silu>(v, count);
    case Activation::gelu:
      return activate_span<Activation::gelu>(v, count);
    case Activation::gelu_tanh:
      return activate_span<Activation::gelu_tanh>(v, count);
  }
}

}  // namespace qmir
