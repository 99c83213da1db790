// Every thread reads its right neighbour, the last one as well.
#include "device.cuh"

extern "C" __global__ void qmir_read_behind_the_end(const float* x, float* y, int64_t n) {
  const int t = threadIdx.x;
#ifdef QMIR_FIXED
  if (t < n) y[t] = t + 1 < n && x[t + 1] == 0.0f ? 0.0f : x[t];
#else
  if (t < n) y[t] = x[t + 1] == 0.0f ? 0.0f : x[t];
#endif
}
