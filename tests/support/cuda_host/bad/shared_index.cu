// The halo of a tile has no room.
#include "device.cuh"

extern "C" __global__ void qmir_shared_index(const float* x, float* y, int64_t n) {
#ifdef QMIR_FIXED
  __shared__ float tile[65];
#else
  __shared__ float tile[64];
#endif
  const int t = threadIdx.x;
  tile[t + 1] = t < n ? x[t] : 0.0f;
  __syncthreads();
  if (t < n) y[t] = tile[t + 1];
}
