// Vectors from an address that is not a multiple of their size.
#include "device.cuh"

extern "C" __global__ void qmir_misaligned_vector(const float* x, float* y, int64_t n) {
  const int t = threadIdx.x;
#ifdef QMIR_FIXED
  if (t < n) y[t] = x[t];
#else
  if (2 * t + 2 < n) {
    const float2 v = *reinterpret_cast<const float2*>(x + 2 * t + 1);
    y[2 * t + 1] = v.x;
    y[2 * t + 2] = v.y;
  }
  if (t == 0) y[0] = x[0];
  if (t == 1) y[n - 1] = x[n - 1];
#endif
}
