// Half of the warp is missing from the mask that all of it passes.
#include "device.cuh"

extern "C" __global__ void qmir_shuffle_mask(const float* x, float* y, int64_t n) {
#ifdef QMIR_FIXED
  constexpr unsigned kMask = 0xffffffffu;
#else
  constexpr unsigned kMask = 0x0000ffffu;
#endif
  const int t = threadIdx.x;
  const float value = __shfl_sync(kMask, t < n ? x[t] : 0.0f, t);
  if (t < n) y[t] = value;
}
