// One step of the selective scan on quantized operands. V is a float, or a vector of floats whose
// lanes are channels. Each operation rounds on its own (no contraction), as in the reference.
#pragma once
#include "common.cuh"

namespace qmir {

QMIR_FN float code_value(int32_t code, float step, float shift) {
  return step * (float)code - shift;
}

// State n of all lanes: h <- decay * h + x * b, and its share c * h of the output.
template <class V>
QMIR_FN void scan_state(V& h, V& y, const V& decay, const V& x, float b, float c) {
  h = decay * h + x * b;
  y = y + h * c;
}

// Floats of one table row: delta, a decay per state, padding to a multiple of 4.
QMIR_FN int64_t scan_row_width(int64_t states) {
  return (states + 4) / 4 * 4;
}

}  // namespace qmir
