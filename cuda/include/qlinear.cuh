// Float results of integer sums of products. Both operands lie on uniform grids,
//   x_hat = alpha * q_x - beta,  w_hat = step * q_w - shift,
// so their dot product needs the sums of q_x * q_w (acc), of q_x (sx) and of q_w (sw) only.
#pragma once
#include "common.cuh"

namespace qmir {

// taps * beta * shift - beta * step * sw + bias, rounded to float once.
QMIR_FN float affine_constant(int64_t taps, int64_t sw, float beta, float step, float shift,
                              float bias) {
  const double offset = beta;
  const double constant =
      (offset * (double)taps) * (double)shift - (offset * (double)step) * (double)sw;
  return (float)(constant + (double)bias);
}

// acc_scale = alpha * step, sx_scale = alpha * shift. Each operation rounds on its own: compile
// without contraction, so that every target gives the same bytes.
QMIR_FN float affine_result(int32_t acc, float sx, float acc_scale, float sx_scale,
                            float constant) {
  return (acc_scale * (float)acc - sx_scale * sx) + constant;
}

}  // namespace qmir
