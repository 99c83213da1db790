// RFA on the CPU: weight levels by thresholds, and the backward with its threshold gradients.
// A weight is G rows of N elements with one step each (or one row in all), and one shift for all
// rows or one each. Work is cut into units
// of at most kChunk elements, a whole row or a chunk of one, and tasks of several short rows.
#include "rfa.cuh"

#include <algorithm>

#include "reduce.h"

using namespace qmir;

namespace {

constexpr int64_t kBlock = 128;

struct Weight {
  const float *values, *step, *shift;
  int64_t rows, count, shifts;
  float low, high;

  Grid grid(int64_t row) const { return {step[row], shift[shifts > 1 ? row : 0], low, high}; }
};

struct Cut {
  int64_t chunks, units_per_task, tasks, units;
  explicit Cut(const Weight& w) {
    chunks = chunks_of(w.count);
    units = w.rows * chunks;
    units_per_task = chunks > 1 ? 1 : std::max<int64_t>(1, kChunk / w.count);
    tasks = (units + units_per_task - 1) / units_per_task;
  }
};

// `body(task, unit, row, offset, size)` for every unit of the weight.
template <class Body>
void for_units(const Weight& w, const Body& body) {
  const Cut cut(w);
#pragma omp parallel for schedule(static) if (w.rows * w.count >= kParallelFrom)
  for (int64_t task = 0; task < cut.tasks; ++task) {
    const int64_t end = std::min(cut.units, (task + 1) * cut.units_per_task);
    for (int64_t unit = task * cut.units_per_task; unit < end; ++unit) {
      const int64_t row = unit / cut.chunks, begin = unit % cut.chunks * kChunk;
      body(task, unit, row, row * w.count + begin, std::min(kChunk, w.count - begin));
    }
  }
}

// Suffix minima: the sorted table itself, or what makes "the last one exceeded" a count.
void make_ascending(float* table, int64_t size) {
  for (int64_t j = size - 1; j-- > 0;) table[j] = std::min(table[j], table[j + 1]);
}

template <int T>
struct Tables {
  float middles[T], points[T], ascending[T], slopes[T + 1];

  explicit Tables(const float* thresholds) {
    for (int j = 0; j < T; ++j) points[j] = ascending[j] = thresholds[j];
    for (int j = 0; j + 1 < T; ++j) middles[j] = (points[j] + points[j + 1]) * 0.5f;
    middles[T - 1] = INFINITY;
    make_ascending(middles, T);
    make_ascending(ascending, T);
    slopes[0] = slopes[T] = kOuterSlope;
    for (int j = 1; j < T; ++j) slopes[j] = 1.0f / (points[j] - points[j - 1]);
  }
};

// Writes values (Out = float) or codes (Out = int8_t); returns true if all ratios were finite.
template <int T, class Out>
bool round_unit(const float* w, Out* out, int64_t size, Grid grid, const Tables<T>& tables) {
  float poison = 0.0f;
#pragma omp simd reduction(+ : poison)
  for (int64_t i = 0; i < size; ++i) {
    const float ratio = grid_ratio(w[i], grid);
    poison += ratio * 0.0f;
    const float code = grid.low + (float)rfa_count<T>(rfa_clip(ratio, grid), tables.middles);
    if constexpr (sizeof(Out) == 1)
      out[i] = (Out)(int32_t)code;
    else
      out[i] = grid_value(code, grid);
  }
  return poison == 0.0f;
}

template <int T, class Out>
int64_t round_all(const Weight& w, const float* thresholds, Out* out) {
  const Tables<T> tables(thresholds);
  std::vector<char> finite(Cut(w).units);
  for_units(w, [&](int64_t, int64_t unit, int64_t row, int64_t at, int64_t size) {
    finite[unit] = round_unit<T>(w.values + at, out + at, size, w.grid(row), tables);
  });
  return std::all_of(finite.begin(), finite.end(), [](char ok) { return ok; }) ? 0 : 1;
}

struct RowSums {
  double kept, passed, error;
};

// Gradient mass and first moment of the elements in each segment between thresholds.
template <int T>
struct Histogram {
  double mass[T + 1] = {}, moment[T + 1] = {};

  void add(const float* weighted, const float* clipped, const int32_t* segment, int64_t size) {
    if constexpr (T > 16) {
      for (int64_t i = 0; i < size; ++i) {
        mass[segment[i]] += weighted[i];
        moment[segment[i]] += weighted[i] * clipped[i];
      }
    } else {
      for (int bin = 0; bin <= T; ++bin) {
        f8 total{}, turned{};
        for (int64_t i = 0; i < size; i += 8) {
          i8x32 at;
          std::memcpy(&at, segment + i, sizeof at);
          const f8 g = select8(at == bin, load8(weighted + i), f8{});
          total += g;
          turned += g * load8(clipped + i);
        }
        Sum8 sum, turned_sum;
        sum.add(total);
        turned_sum.add(turned);
        mass[bin] += sum.total();
        moment[bin] += turned_sum.total();
      }
    }
  }
};

template <int T>
struct Block {
  alignas(64) float weighted[kBlock], clipped[kBlock], error[kBlock];
  alignas(64) int32_t segment[kBlock];

  void fill(const float* grad, const float* w, float* dw, int64_t size, Grid grid,
            const Tables<T>& tables) {
    const float first = tables.points[0], last = tables.points[T - 1];
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float ratio = grid_ratio(w[i], grid);
      const float c = rfa_clip(ratio, grid);
      const float code = grid.low + (float)rfa_count<T>(c, tables.middles);
      const int at = rfa_segment<T>(c, tables.ascending, first, last);
      const float inner = tables.slopes[at];
      const float slope = c == ratio ? inner : 0.0f;
      dw[i] = grad[i] * slope;
      error[i] = grad[i] * (code - slope * ratio);
      weighted[i] = grid.step * grad[i];
      clipped[i] = c;
      segment[i] = at;
    }
    for (int64_t i = size; i % 8 != 0; ++i) {
      error[i] = weighted[i] = clipped[i] = 0.0f;
      segment[i] = 0;
    }
  }
};

template <int T>
RowSums backward_unit(const float* grad, const float* w, float* dw, int64_t size, Grid grid,
                      const Tables<T>& tables, Histogram<T>& histogram) {
  Block<T> block;
  Sum8 kept, passed, error;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t n = std::min(kBlock, size - begin);
    block.fill(grad + begin, w + begin, dw + begin, n, grid, tables);
    histogram.add(block.weighted, block.clipped, block.segment, n);
    for (int64_t i = 0; i < n; i += 8) {
      const bool whole = i + 8 <= n;
      const float *g = grad + begin + i, *d = dw + begin + i;
      kept.add(whole ? load8(g) : load8(g, n - i, 0.0f));
      passed.add(whole ? load8(d) : load8(d, n - i, 0.0f));
      error.add(load8(block.error + i));
    }
  }
  return {kept.total(), passed.total(), error.total()};
}

template <int T>
void backward(const Weight& w, const float* thresholds, const float* grad, float* dw, float* dstep,
              float* dshift, float* dthresholds) {
  const Tables<T> tables(thresholds);
  const Cut cut(w);
  std::vector<RowSums> sums(cut.units);
  std::vector<Histogram<T>> histograms(cut.tasks);
  for_units(w, [&](int64_t task, int64_t unit, int64_t row, int64_t at, int64_t size) {
    sums[unit] = backward_unit<T>(grad + at, w.values + at, dw + at, size, w.grid(row), tables,
                                  histograms[task]);
  });
  const double scale = 1.0 / std::sqrt((double)w.count * (double)std::max(w.high, 1.0f));
  double shared = 0.0;
  for (int64_t row = 0; row < w.rows; ++row) {
    RowSums all{};
    for (int64_t c = 0; c < cut.chunks; ++c) {
      const RowSums& part = sums[row * cut.chunks + c];
      all.kept += part.kept;
      all.passed += part.passed;
      all.error += part.error;
    }
    dstep[row] = (float)(scale * all.error);
    shared += all.passed - all.kept;
    if (w.shifts > 1) dshift[row] = (float)(all.passed - all.kept);
  }
  if (w.shifts == 1) dshift[0] = (float)shared;
  Histogram<T> all;
  for (const Histogram<T>& part : histograms)
    for (int j = 0; j <= T; ++j) {
      all.mass[j] += part.mass[j];
      all.moment[j] += part.moment[j];
    }
  for (int j = 0; j < T; ++j)
    dthresholds[j] = (float)rfa_threshold_gradient(all.mass, all.moment, tables.points, T, j);
}

// Calls `body.template operator()<T>()` for the compile-time T that equals `thresholds`.
template <class Body>
int64_t with_thresholds(int64_t thresholds, const Body& body) {
  switch (thresholds) {
    case 4: return body.template operator()<4>();
    case 8: return body.template operator()<8>();
    case 16: return body.template operator()<16>();
    case 32: return body.template operator()<32>();
    case 64: return body.template operator()<64>();
    case 128: return body.template operator()<128>();
    default: return body.template operator()<256>();
  }
}

}  // namespace

extern "C" {

// Fake-quantized values, or int8 codes where `codes` is set; returns 1 where a ratio is not finite.
int64_t qmir_rfa_forward(const float* w, const float* step, const float* shift,
                         const float* thresholds, void* out, int64_t rows, int64_t count,
                         int64_t shifts, int64_t size, int64_t quant_min, int64_t codes) {
  const Weight weight{w,      step,             shift, rows, count,
                      shifts, (float)quant_min, (float)(quant_min + size - 1)};
  return with_thresholds(size, [&]<int T>() -> int64_t {
    return codes ? round_all<T>(weight, thresholds, (int8_t*)out)
                 : round_all<T>(weight, thresholds, (float*)out);
  });
}

void qmir_rfa_backward(const float* grad, const float* w, const float* step, const float* shift,
                       const float* thresholds, float* dw, float* dstep, float* dshift,
                       float* dthresholds, int64_t rows, int64_t count, int64_t shifts,
                       int64_t size, int64_t quant_min) {
  const Weight weight{w,      step,             shift, rows, count,
                      shifts, (float)quant_min, (float)(quant_min + size - 1)};
  with_thresholds(size, [&]<int T>() -> int64_t {
    backward<T>(weight, thresholds, grad, dw, dstep, dshift, dthresholds);
    return 0;
  });
}

}  // extern "C"
