// DLS on the CPU: statistics, codes, and the fused fake-quantizer with its backward. Groups (one
// per sample) follow each other in memory. Every sum runs over fixed chunks of a group, combined
// in index order, so that no result depends on the number of threads.
#include "statistics.h"

using namespace qmir;

namespace {

Prediction predict(const float* x, int64_t count, const Predictor& predictor, const Team& team,
                   int64_t group, std::vector<Moments>& scratch, std::vector<char>& finite) {
  Moments* parts = scratch.data() + group * chunks_of(count);
  team.share(count, [&](int64_t c, int64_t at, int64_t size) {
    parts[c] = moments_of(x + at, size, x[0]);
  });
  team.meet();
  const Found found = predict_group(parts, count, x[0], predictor);
  if (team.rank == 0) finite[group] = found.finite;
  return found.prediction;
}

GradientSums sums_of(const float* grad, const float* x, int64_t count, Grid grid,
                     const Statistics& s, bool clamp) {
  Sum8 kept, passed, error, sent_low, sent_high;
  i8x32 at_low{}, at_high{};
  const f8 low = f8{} + grid.low, high = f8{} + grid.high;
  for (int64_t i = 0; i < count; i += 8) {
    const bool whole = i + 8 <= count;
    // NaN equals no minimum and lies in no range: padding counts nowhere.
    const f8 v = whole ? load8(x + i) : load8(x + i, count - i, NAN);
    f8 g = whole ? load8(grad + i) : load8(grad + i, count - i, 0.0f);
    const f8 ratio = (v + grid.shift) / grid.step;
    const f8 above = ratio > low ? ratio : low;
    const f8 code = round8(above < high ? above : high);
    if (clamp) {
      const f8 y = grid.step * code - grid.shift;
      const i8x32 under = y < s.low, over = y > s.high;
      sent_low.add(select8(under, g, f8{}));
      sent_high.add(select8(over, g, f8{}));
      g = select8(under | over, f8{}, g);
    }
    const i8x32 inside = (ratio >= low) & (ratio <= high);
    kept.add(g);
    passed.add(select8(inside, g, f8{}));
    error.add(g * (code - select8(inside, ratio, f8{})));
    at_low -= v == s.low;
    at_high -= v == s.high;
  }
  return {kept.total(),     passed.total(),    error.total(),     sent_low.total(),
          sent_high.total(), total_of(at_low), total_of(at_high)};
}

GradientSums combine(const GradientSums* parts, int64_t chunks) {
  GradientSums all{};
  for (int64_t c = 0; c < chunks; ++c) {
    all.kept += parts[c].kept;
    all.passed += parts[c].passed;
    all.error += parts[c].error;
    all.sent_low += parts[c].sent_low;
    all.sent_high += parts[c].sent_high;
    all.count_low += parts[c].count_low;
    all.count_high += parts[c].count_high;
  }
  return all;
}

void fake_quant(const float* x, float* y, int64_t count, Grid grid) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    y[i] = grid_value(grid_code(grid_ratio(x[i], grid), grid), grid);
}

void fake_quant_clamped(const float* x, float* y, int64_t count, Grid grid,
                        const Statistics& s) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float value = grid_value(grid_code(grid_ratio(x[i], grid), grid), grid);
    y[i] = clamp_to(value, s.low, s.high);
  }
}

template <bool kClamp>
void input_gradient(const float* grad, const float* x, float* dx, int64_t count, Grid grid,
                    const Statistics& s, const InputGradient& g) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float ratio = grid_ratio(x[i], grid);
    float passed = grid_inside(ratio, grid) ? grad[i] : 0.0f;
    if (kClamp) {
      const float y = grid_value(grid_code(ratio, grid), grid);
      passed = (y < s.low) | (y > s.high) ? 0.0f : passed;
    }
    dx[i] = dls_input_gradient(x[i], passed, s, g);
  }
}

void pass_inside(const float* grad, const float* x, float* dx, int64_t count, Grid grid) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    dx[i] = grid_inside(grid_ratio(x[i], grid), grid) ? grad[i] : 0.0f;
}

// Zero times a finite number is zero, whatever the order of the sum.
bool all_finite(const float* x, int64_t count, Grid grid) {
  float poison = 0.0f * (grid.shift / grid.step);
#pragma omp simd reduction(+ : poison)
  for (int64_t i = 0; i < count; ++i) poison += 0.0f * x[i];
  return poison == 0.0f;
}

template <class Code>
void dequantize(const Code* q, float* y, int64_t count, Grid grid) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] = grid_value((float)q[i], grid);
}

// Elementwise work on groups with steps given: `body(group, offset, count)` for every chunk.
template <class Body>
void for_chunks(int64_t groups, int64_t count, const Body& body) {
  const int64_t chunks = chunks_of(count);
#pragma omp parallel for schedule(static) if (groups * count >= kParallelFrom)
  for (int64_t task = 0; task < groups * chunks; ++task) {
    const int64_t group = task / chunks, begin = task % chunks * kChunk;
    body(group, group * count + begin, min_of(kChunk, count - begin));
  }
}

}  // namespace

extern "C" {

// Step and shift of each group; with y not null, also the fake-quantized values. Returns the first
// group that holds NaN or infinity, or -1.
int64_t qmir_dls_forward(const float* x, const float* w, const float* v, float* step, float* shift,
                         float* y, int64_t groups, int64_t count, int64_t quant_min,
                         int64_t quant_max, int64_t cap, int64_t clamp) {
  const Predictor predictor{w, v, cap ? (float)(quant_max - quant_min + 1) : 0.0f};
  std::vector<Moments> parts(groups * chunks_of(count));
  std::vector<char> finite(groups);
  for_groups(groups, count, [&](int64_t group, const Team& team) {
    const float* from = x + group * count;
    const Prediction found = predict(from, count, predictor, team, group, parts, finite);
    step[group] = found.step;
    shift[group] = found.shift;
    if (y == nullptr) return;
    const Grid grid{found.step, found.shift, (float)quant_min, (float)quant_max};
    team.share(count, [&](int64_t, int64_t at, int64_t size) {
      if (clamp)
        fake_quant_clamped(from + at, y + group * count + at, size, grid, found.stats);
      else
        fake_quant(from + at, y + group * count + at, size, grid);
    });
  });
  return first_bad(finite);
}

int64_t qmir_dls_backward(const float* grad, const float* x, const float* w, const float* v,
                          float* dx, float* dw, float* dv, int64_t groups, int64_t count,
                          int64_t quant_min, int64_t quant_max, int64_t cap, int64_t clamp) {
  const int64_t chunks = chunks_of(count);
  const Predictor predictor{w, v, cap ? (float)(quant_max - quant_min + 1) : 0.0f};
  const double scale = 1.0 / std::sqrt((double)count * (double)max_of<int64_t>(quant_max, 1));
  std::vector<Moments> parts(groups * chunks);
  std::vector<GradientSums> sums(groups * chunks);
  std::vector<ScalarGradients> scalars(groups);
  std::vector<char> finite(groups);
  for_groups(groups, count, [&](int64_t group, const Team& team) {
    const float *from = x + group * count, *up = grad + group * count;
    const Prediction found = predict(from, count, predictor, team, group, parts, finite);
    const Grid grid{found.step, found.shift, (float)quant_min, (float)quant_max};
    GradientSums* mine = sums.data() + group * chunks;
    team.share(count, [&](int64_t c, int64_t at, int64_t size) {
      mine[c] = sums_of(up + at, from + at, size, grid, found.stats, clamp);
    });
    team.meet();
    ScalarGradients gradients{};
    const InputGradient through =
        dls_gradient(found, combine(mine, chunks), predictor, cap, count, scale, gradients);
    if (team.rank == 0) scalars[group] = gradients;
    const auto run = clamp ? input_gradient<true> : input_gradient<false>;
    team.share(count, [&](int64_t, int64_t at, int64_t size) {
      run(up + at, from + at, dx + group * count + at, size, grid, found.stats, through);
    });
  });
  for (int i = 0; i < 4; ++i) {
    double scale_total = 0.0, shift_total = 0.0;
    for (const ScalarGradients& g : scalars) {
      scale_total += g.scale[i];
      shift_total += g.shift[i];
    }
    dw[i] = (float)scale_total;
    dv[i] = (float)shift_total;
  }
  return first_bad(finite);
}

// Codes (int8, or uint8 where quant_max > 127) of groups whose steps are given.
void qmir_dls_quantize(const float* x, const float* step, const float* shift, void* q,
                       int64_t groups, int64_t count, int64_t quant_min, int64_t quant_max) {
  for_chunks(groups, count, [=](int64_t group, int64_t at, int64_t size) {
    const Grid grid{step[group], shift[group], (float)quant_min, (float)quant_max};
    if (quant_max > 127)
      quantize(x + at, (uint8_t*)q + at, size, grid);
    else
      quantize(x + at, (int8_t*)q + at, size, grid);
  });
}

void qmir_dls_dequantize(const void* q, const float* step, const float* shift, float* y,
                         int64_t groups, int64_t count, int64_t is_unsigned) {
  for_chunks(groups, count, [=](int64_t group, int64_t at, int64_t size) {
    const Grid grid{step[group], shift[group], 0.0f, 0.0f};
    if (is_unsigned)
      dequantize((const uint8_t*)q + at, y + at, size, grid);
    else
      dequantize((const int8_t*)q + at, y + at, size, grid);
  });
}

// Returns 1, or 0 where a value is NaN or infinite.
int64_t qmir_static_forward(const float* x, const float* step, const float* shift, float* y,
                            int64_t count, int64_t quant_min, int64_t quant_max) {
  std::vector<char> finite(chunks_of(count));
  const Grid grid{*step, *shift, (float)quant_min, (float)quant_max};
  for_chunks(1, count, [&](int64_t, int64_t at, int64_t size) {
    fake_quant(x + at, y + at, size, grid);
    finite[at / kChunk] = all_finite(x + at, size, grid);
  });
  return std::all_of(finite.begin(), finite.end(), [](char ok) { return ok; });
}

void qmir_static_backward(const float* grad, const float* x, const float* step, const float* shift,
                          float* dx, float* dstep, float* dshift, int64_t count, int64_t quant_min,
                          int64_t quant_max) {
  std::vector<GradientSums> sums(chunks_of(count));
  const Grid grid{*step, *shift, (float)quant_min, (float)quant_max};
  for_chunks(1, count, [&](int64_t, int64_t at, int64_t size) {
    sums[at / kChunk] = sums_of(grad + at, x + at, size, grid, {}, false);
    pass_inside(grad + at, x + at, dx + at, size, grid);
  });
  const GradientSums all = combine(sums.data(), chunks_of(count));
  const double scale = 1.0 / std::sqrt((double)count * (double)max_of<int64_t>(quant_max, 1));
  *dstep = (float)(scale * all.error);
  *dshift = (float)(all.passed - all.kept);
}

}  // extern "C"
