// Shared by the CPU kernels (host C++) and the CUDA kernels (NVRTC): the macros, and the scalar
// functions whose rounding both sides must share.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define QMIR_FN __host__ __device__ __forceinline__
#else
#include <cmath>
#include <cstdint>
#define QMIR_FN inline __attribute__((always_inline))
#endif

namespace qmir {

template <class T>
QMIR_FN T min_of(T a, T b) {
  return a < b ? a : b;
}

template <class T>
QMIR_FN T max_of(T a, T b) {
  return a > b ? a : b;
}

template <class T>
QMIR_FN T clamp_to(T x, T low, T high) {
  return min_of(max_of(x, low), high);
}

}  // namespace qmir
