// exp and softplus from additions and multiplications only, so that they vectorize on the CPU and
// give the scan one definition on every device. Each is a template over the lane type: float here,
// and the vector of backend/cpu/csrc/simd.h on the host. Largest errors with fused
// multiply-adds, over a grid of float32 arguments: exp and the decay 1 ulp, log1p 1.1, softplus 1.8,
// sigmoid 2.5. The coefficients are minimax fits of the relative error, below 0.1 half ulp.
#pragma once
#include "common.cuh"

namespace qmir {

// Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low mantissa bits.
constexpr float kRoundMagic = 12582912.0f;
constexpr double kLog2E = 1.4426950408889634;
// 2^x is a normal number for |x| up to here, with one to spare for rounding.
constexpr float kExponentReach = 125.0f;

QMIR_FN float fmadd(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#elif defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// value * 2^n from the float whose low mantissa bits hold n after the magic addition; the result
// must be a normal number.
QMIR_FN float scale_by_magic(float value, float shifted) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(__float_as_int(value) + (__float_as_int(shifted) << 23));
#else
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, value) +
                                       (__builtin_bit_cast(uint32_t, shifted) << 23));
#endif
}

// The second argument wins where one is NaN, as in the instructions of every target.
QMIR_FN float lane_max(float a, float b) { return a > b ? a : b; }
QMIR_FN float lane_min(float a, float b) { return a < b ? a : b; }
QMIR_FN float lane_abs(float a) { return a < 0.0f ? -a : a; }

// exp(x); saturates outside [-87, 88], NaN stays NaN.
template <class F>
QMIR_FN F exp_lanes(F x) {
  x = lane_min(F{} + 88.0f, lane_max(F{} - 87.0f, x));
  const F shifted = fmadd(x, F{} + (float)kLog2E, F{} + kRoundMagic);
  const F minus_n = kRoundMagic - shifted;
  F r = fmadd(minus_n, F{} + 0.693359375f, x);
  r = fmadd(minus_n, F{} - 2.12194440e-4f, r);
  F p = F{} + 1.3818301959e-3f;
  p = fmadd(p, r, F{} + 8.3685321733e-3f);
  p = fmadd(p, r, F{} + 4.1668292135e-2f);
  p = fmadd(p, r, F{} + 1.6666522622e-1f);
  p = fmadd(p, r, F{} + 4.9999994040e-1f);
  p = fmadd(p, r, F{} + 1.0f);
  p = fmadd(p, r, F{} + 1.0f);
  // A multiplication, which unlike the addition of exponents keeps a NaN.
  return p * scale_by_magic(F{} + 1.0f, shifted);
}

// 2^(x * (high + low)). With high + low = a * log2(e) this is a decay exp(x * a) whose exponent is
// rounded nowhere, where a scan would compound its error (without fused multiply-adds it is rounded
// once). Clamped, it saturates where |x * high| exceeds kExponentReach and keeps NaN; otherwise the
// caller excludes both.
template <bool kClamped, class F>
QMIR_FN F exp2_product(F x, F high, F low) {
  F shifted = fmadd(x, high, F{} + kRoundMagic);
  if (kClamped) {
    shifted = lane_max(F{} + (kRoundMagic - kExponentReach), shifted);
    shifted = lane_min(F{} + (kRoundMagic + kExponentReach), shifted);
  }
  const F minus_n = kRoundMagic - shifted;
  F f = fmadd(x, low, fmadd(x, high, minus_n));
  if (kClamped) f = lane_min(F{} + 0.5f, lane_max(F{} - 0.5f, f));
  F p = F{} + 1.5326471475e-4f;
  p = fmadd(p, f, F{} + 1.3390806271e-3f);
  p = fmadd(p, f, F{} + 9.6185058355e-3f);
  p = fmadd(p, f, F{} + 5.5503599346e-2f);
  p = fmadd(p, f, F{} + 2.4022647738e-1f);
  p = fmadd(p, f, F{} + 6.9314718246e-1f);
  p = fmadd(p, f, F{} + 1.0f);
  return kClamped ? p * scale_by_magic(F{} + 1.0f, shifted) : scale_by_magic(p, shifted);
}

// log(1 + t) for t in [0, 1] as t + t^2 * q(t), which keeps its relative precision near 0.
template <class F>
QMIR_FN F log1p_lanes(F t) {
  F q = F{} - 3.2904685941e-3f;
  q = fmadd(q, t, F{} + 2.0086241886e-2f);
  q = fmadd(q, t, F{} - 5.7457230985e-2f);
  q = fmadd(q, t, F{} + 1.0661128163e-1f);
  q = fmadd(q, t, F{} - 1.5344880521e-1f);
  q = fmadd(q, t, F{} + 1.9692102075e-1f);
  q = fmadd(q, t, F{} - 2.4958018959e-1f);
  q = fmadd(q, t, F{} + 3.3330464363e-1f);
  q = fmadd(q, t, F{} - 4.9999931455e-1f);
  return fmadd(q, t * t, t);
}

template <class F>
QMIR_FN F softplus_lanes(F x) {
  return lane_max(F{}, x) + log1p_lanes(exp_lanes(F{} - lane_abs(x)));
}

// d softplus(x) / dx
template <class F>
QMIR_FN F sigmoid_lanes(F x) {
  return 1.0f / (exp_lanes(F{} - x) + 1.0f);
}

}  // namespace qmir
