// Sums of deviations from a pivot, and of their squares.
//
// Where an architecture does 64 float operations in the time of a double one, they are pairs of
// floats. Such sums are off by 2^-43 of the largest partial sum, which statistics that are rounded
// to float show about once in 2^18 times, by one unit. Tests choose with QMIR_FLOAT_PAIRS.
#pragma once
#include "device.cuh"

#if !defined(QMIR_FLOAT_PAIRS)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
#define QMIR_FLOAT_PAIRS 0
#else
#define QMIR_FLOAT_PAIRS 1
#endif
#endif

namespace qmir {

// A running sum of x - first, or of its square.
struct DoubleSum {
  double total = 0.0;

  QMIR_DEVICE void add(float x, float first, bool squared) {
    const double d = (double)x - (double)first;
    total = total + (squared ? d * d : d);
  }
  QMIR_DEVICE double value() const {
    return total;
  }
};

struct PairSum {
  float high = 0.0f, low = 0.0f;

  QMIR_DEVICE void add(float x, float first, bool squared) {
    float d = x - first;
    const float back = d - x;
    float rest = (x - (d - back)) - (first + back);
    if (squared) {
      const float square = d * d;
      rest = fmaf(d, d, -square) + 2.0f * d * rest;
      d = square;
    }
    const float sum = high + d;
    const float added = sum - high;
    low += ((high - (sum - added)) + (d - added)) + rest;
    high = sum + low;
    low -= high - sum;
  }
  QMIR_DEVICE double value() const {
    return (double)high + (double)low;
  }
};

// Whether a sum of squares, and the sum beside it, may be those of pairs: beyond these a float
// overflows, or the rest of a product underflows.
QMIR_DEVICE bool pairs_hold(double squares) {
  return squares > 1e-25 && squares < 1e37;
}

}  // namespace qmir
