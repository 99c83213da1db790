// One time step of the selective scan, forward and backward, for one channel (or 16 in lanes).
#pragma once
#include "math.cuh"

namespace qmir {

// h <- exp(dt * a) * h + (dt * u) * b; returns the decay for those who keep it.
template <class F>
QMIR_FN F scan_step(F& h, F dt, F a, F dtu, F b) {
  const F decay = exp_lanes(dt * a);
  h = fmadd(decay, h, dtu * b);
  return decay;
}

// Reverse of one step for one state: g is dL/dh[l], already with gy * C[l] added. Adds this state's
// part of d(dt) and of du / dt, and returns dL/dh[l-1].
template <class F>
QMIR_FN F scan_step_reverse(F g, F decay, F h_before, F dt, F a, F u, F b, F& ddt, F& gb, F& da) {
  const F through = g * decay * h_before;
  const F input = g * b;
  ddt = fmadd(through, a, fmadd(input, u, ddt));
  gb = gb + input;
  da = fmadd(through, dt, da);
  return g * decay;
}

}  // namespace qmir
