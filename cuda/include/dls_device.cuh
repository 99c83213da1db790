// DLS on the device: sums over groups, in a fixed order, for the fake-quantizer's kernels.
#pragma once
#include "device.cuh"
#include "dls.cuh"

namespace qmir {

QMIR_DEVICE void add_moments(Moments& m, float x, float pivot) {
  const double deviation = (double)x - (double)pivot;
  m.sum += deviation;
  m.squares += deviation * deviation;
  m.low = min_of(x, m.low);
  m.high = max_of(x, m.high);
}

QMIR_DEVICE void add_moments(Moments& m, const Moments& other) {
  m.sum += other.sum;
  m.squares += other.squares;
  m.low = min_of(m.low, other.low);
  m.high = max_of(m.high, other.high);
}

QMIR_DEVICE Moments warp_total(const Moments& m) {
  return {warp_sum(m.sum), warp_sum(m.squares), warp_min(m.low), warp_max(m.high)};
}

// One element of a backward pass; `g` is its upstream gradient.
QMIR_DEVICE void add_gradient(GradientSums& sums, float x, float g, const Grid& grid,
                              const Statistics& s, bool clamp) {
  const float ratio = grid_ratio(x, grid);
  const float code = grid_code(ratio, grid);
  if (clamp) {
    const float y = grid_value(code, grid);
    const bool under = y<s.low, over = y> s.high;
    sums.sent_low += under ? g : 0.0f;
    sums.sent_high += over ? g : 0.0f;
    g = under || over ? 0.0f : g;
  }
  const bool inside = grid_inside(ratio, grid);
  sums.kept += g;
  sums.passed += inside ? g : 0.0f;
  sums.error += g * (code - (inside ? ratio : 0.0f));
  sums.count_low += x == s.low;
  sums.count_high += x == s.high;
}

QMIR_DEVICE void add_gradient(GradientSums& sums, const GradientSums& other) {
  sums.kept += other.kept;
  sums.passed += other.passed;
  sums.error += other.error;
  sums.sent_low += other.sent_low;
  sums.sent_high += other.sent_high;
  sums.count_low += other.count_low;
  sums.count_high += other.count_high;
}

QMIR_DEVICE GradientSums warp_total(const GradientSums& s) {
  return {warp_sum(s.kept),      warp_sum(s.passed),    warp_sum(s.error),     warp_sum(s.sent_low),
          warp_sum(s.sent_high), warp_sum(s.count_low), warp_sum(s.count_high)};
}

QMIR_DEVICE float fake_quantized(float x, const Grid& grid, const Statistics& s, bool clamp) {
  const float value = grid_value(grid_code(grid_ratio(x, grid), grid), grid);
  return clamp ? clamp_to(value, s.low, s.high) : value;
}

QMIR_DEVICE float input_gradient(float x, float g, const Grid& grid, const Statistics& s,
                                 const InputGradient& through, bool clamp) {
  const float ratio = grid_ratio(x, grid);
  float passed = grid_inside(ratio, grid) ? g : 0.0f;
  if (clamp) {
    const float y = grid_value(grid_code(ratio, grid), grid);
    passed = y < s.low || y > s.high ? 0.0f : passed;
  }
  return dls_input_gradient(x, passed, s, through);
}

// The prediction for a group, NaN where an element or a scalar is not finite: nothing can be thrown
// from a kernel, so that the group's results are NaN as well.
QMIR_DEVICE Prediction predict_group(const Moments& m, float pivot, int64_t count,
                                     const Predictor& predictor) {
  const Prediction found = dls_predict(dls_statistics(m, pivot, count), predictor);
  if (dls_finite(m, found)) return found;
  return {{NAN, NAN, NAN, NAN}, NAN, NAN, NAN, NAN};
}

}  // namespace qmir
