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

// Segment 0 lies at or below the first threshold, segment kThresholds above the last one. The two
// outer tests matter where thresholds are out of order: there `ascending` differs from them.
template <int kThresholds>
QMIR_FN int rfa_segment(float c, const float* ascending, float first, float last) {
  int segment = rfa_count<kThresholds>(c, ascending);
  segment = c <= first ? 0 : segment;
  return c > last ? kThresholds : segment;
}

}  // namespace qmir
