// Elements of float32 and bf16 tensors, the latter as their bits.
#pragma once
#include "device.cuh"

namespace qmir {

QMIR_DEVICE float real_value(float x) {
  return x;
}
QMIR_DEVICE float real_value(uint16_t bits) {
  return bf16_to_float(bits);
}
QMIR_DEVICE void set_real(float* to, float x) {
  *to = x;
}
QMIR_DEVICE void set_real(uint16_t* to, float x) {
  *to = float_to_bf16(x);
}

}  // namespace qmir
