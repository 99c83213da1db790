// RFA: levels and surrogate slopes of a weight from its learned thresholds. kThresholds is a
// compile-time power of two; every table has kThresholds entries, so that a search takes
// log2(kThresholds) steps without a bound check.
#pragma once
#include "affine.cuh"

namespace qmir {

// Recursion unrolls these before the vectorizer looks: it refuses loops inside its loop.
template <int kEntries>
QMIR_FN int rfa_count_each(float c, const float* table) {
  if constexpr (kEntries == 0)
    return 0;
  else
    return rfa_count_each<kEntries - 1>(c, table) + (c > table[kEntries - 1] ? 1 : 0);
}

template <int kHalf>
QMIR_FN int rfa_search(float c, const float* table, int at) {
  if constexpr (kHalf == 0)
    return at;
  else
    return rfa_search<kHalf / 2>(c, table, at + (c > table[at + kHalf - 1] ? kHalf : 0));
}

// Number of entries of an ascending table that c exceeds strictly.
template <int kEntries>
QMIR_FN int rfa_count(float c, const float* table) {
  if constexpr (kEntries <= 16)
    return rfa_count_each<kEntries>(c, table);
  else
    return rfa_search<kEntries / 2>(c, table, 0) + (c > table[kEntries - 1] ? 1 : 0);
}

QMIR_FN float rfa_clip(float ratio, const Grid& grid) {
  return clamp_to(ratio, grid.low, grid.high);
}

constexpr float kOuterSlope = 0.1f;

// Gradient of threshold j of `size` from the gradient mass and first moment of the elements in each
// segment between thresholds.
QMIR_FN double rfa_threshold_gradient(const double* mass, const double* moment,
                                      const float* points, int size, int j) {
  double sum = 0.0;
  if (j > 0) {
    const double left = points[j - 1], gap = (double)points[j] - left;
    sum -= (moment[j] - left * mass[j]) / (gap * gap);
  }
  if (j + 1 < size) {
    const double right = points[j + 1], gap = right - (double)points[j];
    sum -= (right * mass[j + 1] - moment[j + 1]) / (gap * gap);
  }
  if (j == 0) sum -= 0.1 * mass[0];
  if (j == size - 1) sum -= 0.1 * mass[size];
  return sum;
}

// Segment 0 lies at or below the first threshold, segment kThresholds above the last one. The two
// outer tests matter where thresholds are out of order: there `ascending` differs from them.
template <int kThresholds>
QMIR_FN int rfa_segment(float c, const float* ascending, float first, float last) {
  int segment = rfa_count<kThresholds>(c, ascending);
  segment = c <= first ? 0 : segment;
  return c > last ? kThresholds : segment;
}

}  // namespace qmir
