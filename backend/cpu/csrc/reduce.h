// Sums whose order does not depend on threads or instruction set: fixed chunks, eight lanes of
// double each, chunks combined in index order.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "common.cuh"
#if defined(__AVX__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"

namespace qmir {

constexpr int64_t kChunk = 4096;
// Below this many elements waking the threads costs more than the work.
constexpr int64_t kParallelFrom = 32768;

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8x32 __attribute__((vector_size(32)));
typedef float f4 __attribute__((vector_size(16)));
typedef double d4 __attribute__((vector_size(32)));

inline int64_t chunks_of(int64_t count) { return (count + kChunk - 1) / kChunk; }

QMIR_FN f8 load8(const float* p) {
  f8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The last, partial block: lanes beyond the data hold `fill`.
QMIR_FN f8 load8(const float* p, int64_t count, float fill) {
  f8 v = f8{} + fill;
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

QMIR_FN f8 select8(i8x32 mask, f8 yes, f8 no) { return mask ? yes : no; }

// Round half to even of |x| < 2^22 by pushing the fraction out of the mantissa.
QMIR_FN f8 round8(f8 x) { return (x + 12582912.0f) - 12582912.0f; }

// Eight doubles as two halves: a 64-byte vector falls apart into scalars where AVX-512 is missing.
struct d8 {
  d4 low, high;

  QMIR_FN d8 operator+(d8 other) const { return {low + other.low, high + other.high}; }
  QMIR_FN d8 operator-(double x) const { return {low - x, high - x}; }
  QMIR_FN d8 operator-(d8 other) const { return {low - other.low, high - other.high}; }
  QMIR_FN d8 square() const { return {low * low, high * high}; }
};

// GCC 12 converts vectors two by two; the intrinsic is the one instruction meant here.
QMIR_FN d4 widen(f4 v) {
#if defined(__AVX__)
  return (d4)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, d4);
#endif
}

QMIR_FN d8 widen(f8 v) {
  f4 half[2];
  std::memcpy(half, &v, sizeof v);
  return {widen(half[0]), widen(half[1])};
}

struct Sum8 {
  d8 lanes{};
  QMIR_FN void add(f8 v) { lanes = lanes + widen(v); }
  QMIR_FN void add(d8 v) { lanes = lanes + v; }
  QMIR_FN double total() const {
    const d4 x = lanes.low + lanes.high;
    return (x[0] + x[2]) + (x[1] + x[3]);
  }
};

QMIR_FN int64_t total_of(i8x32 counts) {
  int64_t total = 0;
  for (int lane = 0; lane < 8; ++lane) total += counts[lane];
  return total;
}

}  // namespace qmir
