// Sum of the four directions' images, in the order of qmir_ao/ops/_directions.py.
#pragma once
#include "real.cuh"

namespace qmir {

// (rows + rows back) + (columns + columns back) of one pixel; directions are `plane` apart.
QMIR_DEVICE float directions_sum(const float* p, int64_t plane) {
  return (p[0] + p[2 * plane]) + (p[plane] + p[3 * plane]);
}

// The sums of parts (batch, 4, plane), as (batch, plane).
template <class To>
QMIR_DEVICE void merge_directions(const float* parts, To* y, int64_t batch, int64_t plane) {
  const int64_t stride = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < batch * plane; i += stride) {
    const float* p = parts + i / plane * 4 * plane + i % plane;
    set_real(y + i, directions_sum(p, plane));
  }
}

}  // namespace qmir
