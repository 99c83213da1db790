// The last vector reaches over the end, into the gap before the next 16 bytes.
#include "device.cuh"

extern "C" __global__ void qmir_last_vector(const float* x, float* y, int64_t n) {
  const int at = 4 * threadIdx.x;
#ifdef QMIR_FIXED
  for (int i = at; i < at + 4 && i < n; ++i) y[i] = x[i];
#else
  if (at >= n) return;
  const float4 v = *reinterpret_cast<const float4*>(x + at);
  const float sum = (v.x + v.y) + (v.z + v.w);
  for (int i = at; i < at + 4 && i < n; ++i) y[i] = x[i] + 0.0f * sum;
#endif
}
