// The uniform grid of the activation quantizers: codes of x are round((x + shift) / step).
#pragma once
#include "common.cuh"

namespace qmir {

struct Grid {
  float step, shift, low, high;
};

QMIR_FN float grid_ratio(float x, const Grid& grid) { return (x + grid.shift) / grid.step; }

// Half to even; the clip comes first, so that codes never leave the range.
QMIR_FN float grid_code(float ratio, const Grid& grid) {
  return rintf(clamp_to(ratio, grid.low, grid.high));
}

QMIR_FN float grid_value(float code, const Grid& grid) { return grid.step * code - grid.shift; }

// The clip leaves exactly these alone; one comparison vectorizes where two joined ones do not.
QMIR_FN bool grid_inside(float ratio, const Grid& grid) {
  return clamp_to(ratio, grid.low, grid.high) == ratio;
}

}  // namespace qmir
