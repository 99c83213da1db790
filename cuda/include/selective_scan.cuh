// One time step of the selective scan, forward and backward, for one channel (or one in each lane).
#pragma once
#include "math.cuh"

namespace qmir {

// A state's row of A, and A * log2(e) in two parts for exp2_product.
template <class F>
struct DecayRate {
  F a, high, low;
};

QMIR_FN DecayRate<float> decay_rate(float a) {
  const double exact = (double)a * kLog2E;
  const float high = (float)exact;
  const float rest = (float)(exact - (double)high);
  return {a, high, rest == rest ? rest : 0.0f};  // infinite a: inf - inf
}

// h <- exp(dt * a) * h + (dt * u) * b; returns the decay for those who keep it.
template <bool kClamped, class F>
QMIR_FN F scan_step(F& h, F dt, const DecayRate<F>& rate, F dtu, F b) {
  const F decay = exp2_product<kClamped>(dt, rate.high, rate.low);
  h = fmadd(decay, h, dtu * b);
  return decay;
}

// Sums over the states of one step: d(dt) through the decays, and of g * b, which gives
// du = dt * gb and the rest of d(dt) = u * gb.
template <class F>
struct StepGradient {
  F decay_part, gb;
};

// Reverse of one step for one state: g is dL/dh[l], already with gy * C[l] added. Adds this state's
// parts of the step's gradients and of dA, and returns dL/dh[l-1].
template <class F>
QMIR_FN F scan_step_reverse(F g, F decay, F h_before, F dt, F a, F b, StepGradient<F>& step,
                            F& da) {
  const F before = g * decay;
  const F through = before * h_before;
  step.decay_part = fmadd(through, a, step.decay_part);
  step.gb = fmadd(g, b, step.gb);
  da = fmadd(through, dt, da);
  return before;
}

}  // namespace qmir
