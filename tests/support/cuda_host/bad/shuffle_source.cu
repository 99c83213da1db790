// A lane reads one that does not take part.
#include "device.cuh"

extern "C" __global__ void qmir_shuffle_source(const float* x, float* y, int64_t n) {
  const int t = threadIdx.x;
  float value = t < n ? x[t] : 0.0f;
  if (t % 32 < 16) {
#ifdef QMIR_FIXED
    value = __shfl_sync(0x0000ffffu, value, t % 16);
#else
    value = __shfl_sync(0x0000ffffu, value, t % 32 + 16);
#endif
  }
  if (t < n) y[t] = value;
}
