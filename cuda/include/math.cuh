// exp and softplus from additions and multiplications only, so that they vectorize on the CPU and
// give the scan one definition on every device. Each is a template over the lane type: float here,
// and the 16-lane vector of backend/cpu/csrc/simd.h on the host.
#pragma once
#include "common.cuh"

namespace qmir {

// Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low mantissa bits.
constexpr float kRoundMagic = 12582912.0f;

QMIR_FN float fmadd(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#elif defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// 2^n from the float whose low mantissa bits hold n after the magic addition.
QMIR_FN float pow2_of_magic(float shifted) {
#if defined(__CUDA_ARCH__)
  return __int_as_float((__float_as_int(shifted) + 127) << 23);
#else
  return __builtin_bit_cast(
      float, (__builtin_bit_cast(uint32_t, shifted) + 127u) << 23);
#endif
}

QMIR_FN float lane_max(float a, float b) { return a > b ? a : b; }
QMIR_FN float lane_min(float a, float b) { return a < b ? a : b; }
QMIR_FN float lane_abs(float a) { return a < 0.0f ? -a : a; }

// exp(x), relative error below 2 ulp; saturates outside [-87, 88].
template <class F>
QMIR_FN F exp_lanes(F x) {
  x = lane_min(lane_max(x, F{} - 87.0f), F{} + 88.0f);
  const F shifted = fmadd(x, F{} + 1.44269504088896341f, F{} + kRoundMagic);
  const F n = shifted - kRoundMagic;
  F r = fmadd(n, F{} - 0.693359375f, x);
  r = fmadd(n, F{} + 2.12194440e-4f, r);
  F p = F{} + 1.9875691500e-4f;
  p = fmadd(p, r, F{} + 1.3981999507e-3f);
  p = fmadd(p, r, F{} + 8.3334519073e-3f);
  p = fmadd(p, r, F{} + 4.1665795894e-2f);
  p = fmadd(p, r, F{} + 1.6666665459e-1f);
  p = fmadd(p, r, F{} + 5.0000001201e-1f);
  p = fmadd(p, r * r, r + 1.0f);
  return p * pow2_of_magic(shifted);
}

// log(1 + t) for t in [0, 1] as 2 * atanh(t / (2 + t)), which keeps its relative precision near 0.
template <class F>
QMIR_FN F log1p_lanes(F t) {
  const F s = t / (t + 2.0f);
  const F q = s * s;
  F p = F{} + 1.0f / 15.0f;
  p = fmadd(p, q, F{} + 1.0f / 13.0f);
  p = fmadd(p, q, F{} + 1.0f / 11.0f);
  p = fmadd(p, q, F{} + 1.0f / 9.0f);
  p = fmadd(p, q, F{} + 1.0f / 7.0f);
  p = fmadd(p, q, F{} + 1.0f / 5.0f);
  p = fmadd(p, q, F{} + 1.0f / 3.0f);
  p = fmadd(p, q, F{} + 1.0f);
  return (s + s) * p;
}

template <class F>
QMIR_FN F softplus_lanes(F x) {
  return lane_max(x, F{}) + log1p_lanes(exp_lanes(F{} - lane_abs(x)));
}

// d softplus(x) / dx
template <class F>
QMIR_FN F sigmoid_lanes(F x) {
  return 1.0f / (exp_lanes(F{} - x) + 1.0f);
}

}  // namespace qmir
