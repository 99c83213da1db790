// Float results of integer sums of products. Both operands lie on uniform grids,
//   x_hat = alpha * q_x - beta,  w_hat = step * q_w - shift,
// so their dot product needs the sums of q_x * q_w (acc), of q_x (sx) and of q_w (sw) only. A shift
// of each channel, x_hat - offset[c], is rounded to a multiple of a power of two: integers as well.
#pragma once
#include "common.cuh"

namespace qmir {

// 2^(e - 38) for 2^(e - 1) <= largest < 2^e: the largest |offset| has at most 2^38 such units, and
// 2^17 products with 8-bit codes stay below 2^62. NaN where an offset is not finite.
QMIR_FN double offset_unit(float largest) {
  if (!(largest <= 3.402823466e38f)) return (double)largest * 0.0;
  int exponent;
  frexp((double)largest, &exponent);
  return ldexp(1.0, exponent - 38);
}

// Nearest multiple of the unit, halves to even; 0 where there is no unit.
QMIR_FN int64_t offset_code(float offset, double unit) {
  return unit > 0.0 ? (int64_t)llrint((double)offset / unit) : 0;
}

// What offsets take from an output: qo = sum of q_w * code, so = sum of code over the taps inside.
QMIR_FN double offset_lost(int64_t qo, int64_t so, double unit, float step, float shift) {
  return ((double)step * unit) * (double)qo - ((double)shift * unit) * (double)so;
}

// taps * beta * shift - beta * step * sw + bias - lost, rounded to float once.
QMIR_FN float affine_constant(int64_t taps, int64_t sw, float beta, float step, float shift,
                              float bias, double lost = 0.0) {
  const double offset = beta;
  const double constant =
      (offset * (double)taps) * (double)shift - (offset * (double)step) * (double)sw;
  return (float)((constant + (double)bias) - lost);
}

// acc_scale = alpha * step, sx_scale = alpha * shift. Each operation rounds on its own: compile
// without contraction, so that every target gives the same bytes.
QMIR_FN float affine_result(int32_t acc, float sx, float acc_scale, float sx_scale,
                            float constant) {
  return (acc_scale * (float)acc - sx_scale * sx) + constant;
}

}  // namespace qmir
