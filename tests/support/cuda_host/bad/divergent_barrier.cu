// The two halves of a block wait at different barriers.
#include "device.cuh"

extern "C" __global__ void qmir_divergent_barrier(const float* x, float* y, int64_t n) {
  const int t = threadIdx.x;
#ifdef QMIR_FIXED
  __syncthreads();
#else
  if (t < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
#endif
  if (t < n) y[t] = x[t];
}
