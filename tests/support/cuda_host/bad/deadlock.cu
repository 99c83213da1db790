// One lane waits for the block while its warp waits for it.
#include "device.cuh"

extern "C" __global__ void qmir_deadlock(const float* x, float* y, int64_t n) {
  const int t = threadIdx.x;
#ifndef QMIR_FIXED
  if (t == 5) __syncthreads();
#endif
  __syncwarp();
  if (t < n) y[t] = x[t];
}
