// Shared memory of a function template, read before all of it is there.
#include "device.cuh"

template <int kThreads>
__device__ float from_the_end(float value, int64_t n) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = value;
#ifdef QMIR_FIXED
  __syncthreads();
#endif
  return threadIdx.x < n ? tile[n - 1 - threadIdx.x] : 0.0f;
}

extern "C" __global__ void qmir_missing_template_barrier(const float* x, float* y, int64_t n) {
  const int t = threadIdx.x;
  const float value = from_the_end<64>(t < n ? x[t] : 0.0f, n);
  if (t < n) y[t] = value;
}
