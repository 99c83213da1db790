// A block reads what another one wrote in the same launch.
#include "device.cuh"

extern "C" __global__ void qmir_block_order(const float* x, float* y, int64_t n) {
  const int64_t at = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
#ifdef QMIR_FIXED
  if (at < n) y[at] = x[at];
#else
  const int64_t before = at - blockDim.x;
  if (at < n) y[at] = before < 0 ? x[at] : x[at] + 0.0f * y[before];
#endif
}
