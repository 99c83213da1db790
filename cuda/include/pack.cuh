// Packed integer codes: kBits-wide two's complement fields, little end first.
#pragma once
#include "common.cuh"

namespace qmir {

template <int kBits>
QMIR_FN uint8_t pack_byte(const int8_t* codes) {
  uint8_t byte = 0;
  for (int i = 0; i < 8 / kBits; ++i)
    byte |= (uint8_t)((codes[i] & ((1 << kBits) - 1)) << (i * kBits));
  return byte;
}

// Field i of a byte, sign-extended by shifting it to the top and back.
template <int kBits>
QMIR_FN int8_t unpack_code(uint8_t byte, int i) {
  const int8_t top = (int8_t)(uint8_t)(byte << (8 - kBits * (i + 1)));
  return (int8_t)(top >> (8 - kBits));
}

}  // namespace qmir
