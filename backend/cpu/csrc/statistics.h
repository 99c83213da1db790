// Statistics of the groups that DLS quantizes, in one fixed order: chunks of a group, deviations from
// its first element in eight lanes, chunks combined in index order, kFold at a time. Whoever produces
// the values gives the same bytes, and so does any number of threads.
#pragma once
#include <omp.h>

#include <algorithm>

#include "dls.cuh"
#include "reduce.h"

namespace qmir {

struct MomentLanes {
  Sum8 sum, squares;
  f8 low, high;

  void add(f8 v, float pivot) {
    const d8 d = widen(v) - (double)pivot;
    sum.add(d);
    squares.add(d.square());
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
};

// Two sets of lanes take turns, because one would wait for its own additions.
inline Moments moments_of(const float* x, int64_t count, float pivot) {
  MomentLanes even{{}, {}, f8{} + pivot, f8{} + pivot}, odd = even;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    even.add(load8(x + i), pivot);
    odd.add(load8(x + i + 8), pivot);
  }
  if (i + 8 <= count) {
    even.add(load8(x + i), pivot);
    i += 8;
  }
  if (i < count) odd.add(load8(x + i, count - i, pivot), pivot);
  const f8 low = even.low < odd.low ? even.low : odd.low;
  const f8 high = even.high > odd.high ? even.high : odd.high;
  Moments m{even.sum.total() + odd.sum.total(), even.squares.total() + odd.squares.total(), low[0],
            high[0]};
  for (int lane = 1; lane < 8; ++lane) {
    m.low = min_of(m.low, low[lane]);
    m.high = max_of(m.high, high[lane]);
  }
  return m;
}

// Step and shift of one group, and whether its values and its grid are finite.
struct Found {
  Prediction prediction;
  bool finite;
};

inline Found predict_group(const Moments* parts, int64_t count, float pivot,
                           const Predictor& predictor) {
  const int64_t chunks = chunks_of(count);
  Moments all{0.0, 0.0, pivot, pivot};
  for (int64_t begin = 0; begin < chunks; begin += kFold) {
    double sum = 0.0, squares = 0.0;
    for (int64_t c = begin; c < min_of(begin + kFold, chunks); ++c) {
      sum += parts[c].sum;
      squares += parts[c].squares;
      all.low = min_of(all.low, parts[c].low);
      all.high = max_of(all.high, parts[c].high);
    }
    all.sum += sum;
    all.squares += squares;
  }
  const Prediction found = dls_predict(dls_statistics(all, pivot, count), predictor);
  return {found, dls_finite(all, found)};
}

inline int64_t first_bad(const std::vector<char>& finite) {
  const auto found = std::find(finite.begin(), finite.end(), 0);
  return found == finite.end() ? -1 : found - finite.begin();
}

// The threads that work on one group together; alone they never wait for each other.
struct Team {
  int64_t rank, size;

  template <class Body>
  void share(int64_t count, const Body& body) const {
    const int64_t chunks = chunks_of(count);
    for (int64_t c = chunks * rank / size; c < chunks * (rank + 1) / size; ++c)
      body(c, c * kChunk, min_of(kChunk, count - c * kChunk));
  }

  void meet() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};

// Threads take whole groups where these divide evenly, which needs no barrier and keeps a group in
// one cache; otherwise all of them go through the groups together. Every thread of a team combines
// the chunks itself, in index order, so that the results are the same either way.
template <class Body>
void for_groups(int64_t groups, int64_t count, const Body& body) {
#pragma omp parallel if (groups * count >= kParallelFrom)
  {
    const int64_t rank = omp_get_thread_num(), size = omp_get_num_threads();
    if (groups % size == 0) {
      for (int64_t group = rank; group < groups; group += size) body(group, Team{0, 1});
    } else {
      for (int64_t group = 0; group < groups; ++group) body(group, Team{rank, size});
    }
  }
}

template <class Code>
inline void quantize(const float* x, Code* q, int64_t count, Grid grid) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    q[i] = (Code)(int32_t)grid_code(grid_ratio(x[i], grid), grid);
}

}  // namespace qmir
