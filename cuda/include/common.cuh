// Shared by the CPU kernels (host C++) and the CUDA kernels (NVRTC): the macros, and the scalar
// functions whose rounding both sides must share.
#pragma once

#if defined(__CUDACC_RTC__)
// NVRTC has no standard headers.
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#define QMIR_FN __device__ __forceinline__
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
