// Activations of a network, over the lane type of math.cuh. NaN stays NaN, and where the exact
// result of an infinite argument is infinite or NaN, so is this one.
#pragma once
#include "math.cuh"

namespace qmir {

// In the order of `ACTIVATIONS` of qmir_ao/ops/_activations.py.
enum class Activation : int64_t { none, relu, sigmoid, silu, gelu, gelu_tanh };

// Share of the standard normal distribution above |x|: exp(-x^2 / 2) * t * p(t) with
// t = 1 / (1 + 0.35 |x|). The polynomial is a minimax fit of the relative error, 3.3e-8.
template <class F>
QMIR_FN F normal_tail(F a) {
  const F t = 1.0f / fmadd(a, F{} + 0.35f, F{} + 1.0f);
  F p = F{} - 2.9125748697e-2f;
  p = fmadd(p, t, F{} + 1.4387111691e-1f);
  p = fmadd(p, t, F{} - 2.5550092878e-1f);
  p = fmadd(p, t, F{} + 1.5892340615e-1f);
  p = fmadd(p, t, F{} - 2.2931747765e-2f);
  p = fmadd(p, t, F{} + 1.0543003097e-1f);
  p = fmadd(p, t, F{} + 1.1985334252e-1f);
  p = fmadd(p, t, F{} + 1.3985893313e-1f);
  p = fmadd(p, t, F{} + 1.3962157975e-1f);
  return exp_lanes(a * (a * -0.5f)) * (p * t);
}

// x times the share of the distribution below x, without a branch on its sign.
template <class F>
QMIR_FN F gelu_lanes(F x) {
  const F a = lane_abs(x);
  return lane_max(F{}, x) - a * normal_tail(a);
}

template <Activation kActivation, class F>
QMIR_FN F activate(F x) {
  if constexpr (kActivation == Activation::relu) return lane_max(F{}, x);
  if constexpr (kActivation == Activation::sigmoid) return sigmoid_lanes(x);
  if constexpr (kActivation == Activation::silu) return x / (exp_lanes(F{} - x) + 1.0f);
  if constexpr (kActivation == Activation::gelu) return gelu_lanes(x);
  // 1 + tanh(y) = 2 * sigmoid(2 * y)
  if constexpr (kActivation == Activation::gelu_tanh) {
    const F cubic = fmadd(x * x, F{} + 0.044715f, F{} + 1.0f);
    return x * sigmoid_lanes(x * cubic * 1.5957691216057308f);
  }
  return x;
}

// The same where the activation is known when the kernel runs.
template <class F>
QMIR_FN F activate(Activation which, F x) {
  switch (which) {
    case Activation::none:
      return x;
    case Activation::relu:
      return activate<Activation::relu>(x);
    case Activation::sigmoid:
      return activate<Activation::sigmoid>(x);
    case Activation::silu:
      return activate<Activation::silu>(x);
    case Activation::gelu:
      return activate<Activation::gelu>(x);
    case Activation::gelu_tanh:
      return activate<Activation::gelu_tanh>(x);
  }
  return x;
}

}  // namespace qmir
