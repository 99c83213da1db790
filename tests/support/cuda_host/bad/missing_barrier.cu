// y is x backwards through shared memory, read before all of it is there.
#include "device.cuh"

extern "C" __global__ void qmir_missing_barrier(const float* x, float* y, int64_t n) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  if (t < n) tile[t] = x[t];
#ifdef QMIR_FIXED
  __syncthreads();
#endif
  if (t < n) y[t] = tile[n - 1 - t];
}
