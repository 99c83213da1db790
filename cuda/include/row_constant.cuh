// The constant term of the affine arithmetic where every row has a beta of its own. It is defined
// in double, of which some architectures do 1 operation for 64 of float; two floats decide nearly
// always what the double result rounds to, and say where they do not.
#pragma once
#include "qlinear.cuh"

namespace qmir {

// constant(beta) = beta * (high + low) + bias, where high + low = taps * shift - step * sum but for
// 2^-48 of size = taps * |shift| + |step * sum|.
struct RowConstant {
  float step, shift, bias, high, low, size;
  int32_t taps, sum;

  QMIR_FN float exact(float beta) const {
    return affine_constant(taps, sum, beta, step, shift, bias);
  }

  // Equal to `exact`, byte for byte, where `sure` becomes true. The double arithmetic is off the
  // true value by at most 2^-51 of |beta| * size + |bias|, the one below by 2^-45: where both ends
  // of an interval of 2^-43 round to the same float, everything between does. Never so near
  // underflow, at infinities and at 0.
  QMIR_FN float quick(float beta, bool& sure) const {
    const float product = beta * high;
    const float product_rest = fmaf(beta, high, -product) + beta * low;
    const float total = product + bias;
    const float added = total - product;
    const float total_rest = (product - (total - added)) + (bias - added);
    const float rest = product_rest + total_rest;
    const float result = total + rest;
    const float left = rest - (result - total);
    const float most = fabsf(beta) * size + fabsf(bias);
    const float error = most * 1.13686838e-13f;
    sure = result + (left + error) == result && result + (left - error) == result && most > 1e-20f;
    return result;
  }
};

QMIR_FN RowConstant row_constant(int32_t taps, int32_t sum, float step, float shift, float bias) {
  const double by_shift = (double)taps * (double)shift, by_step = (double)step * (double)sum;
  const double both = by_shift - by_step;
  const float high = (float)both;
  const float low = (float)(both - (double)high);
  return {step, shift, bias, high, low, (float)(fabs(by_shift) + fabs(by_step)), taps, sum};
}

}  // namespace qmir
