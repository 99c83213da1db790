// DLS: step and shift of a group from its four statistics, and the gradient back through them.
#pragma once
#include "affine.cuh"

namespace qmir {

constexpr float kStepEps = 1e-6f;

struct Statistics {
  float mean, std, low, high;
};

// The eight learned scalars; levels is the divisor of the cap, or 0 without a cap.
struct Predictor {
  const float* scale;
  const float* shift;
  float levels;
};

struct Prediction {
  Statistics stats;
  float raw, limit, step, shift;
};

QMIR_FN Prediction dls_predict(const Statistics& s, const Predictor& p) {
  const float* w = p.scale;
  const float* v = p.shift;
  const float shift = v[0] * s.mean + v[1] * s.std + v[2] * s.low + v[3] * s.high;
  const float raw = w[0] * fabsf(s.mean + shift) + w[1] * s.std + w[2] * (s.low + shift) +
                    w[3] * (s.high + shift);
  const bool capped = p.levels > 0.0f;
  const float limit = capped ? (s.high - s.low) / p.levels : 0.0f;
  const float step = capped ? min_of(fabsf(raw), limit) : fabsf(raw);
  return {s, raw, limit, max_of(step, kStepEps), shift};
}

// Sums over one group of deviations from its first element, the pivot: a constant group has a
// spread of exactly zero, and nothing cancels. Infinity and NaN survive into the sums.
struct Moments {
  double sum, squares;
  float low, high;
};

QMIR_FN Statistics dls_statistics(const Moments& m, float pivot, int64_t count) {
  const double sum = m.sum;
  const double variance = (m.squares - sum * sum / count) / (count > 1 ? count - 1 : 1);
  return {(float)(pivot + sum / count), (float)sqrt(max_of(variance, 0.0)), m.low, m.high};
}

// A step exists for finite elements and scalars only.
QMIR_FN bool dls_finite(const Moments& m, const Prediction& found) {
  const double poison = 0.0 * m.squares + 0.0 * (double)found.raw + 0.0 * (double)found.shift;
  return poison == 0.0;
}

// Sums over one group of a backward pass; `kept` is the gradient that the output clamp lets pass.
struct GradientSums {
  double kept, passed, error;
  double sent_low, sent_high;
  int64_t count_low, count_high;
};

// dx = passed + (constant + per_deviation * (x - mean)) + per_low at minima + per_high at maxima.
struct InputGradient {
  float constant, per_deviation, per_low, per_high;
};

struct ScalarGradients {
  double scale[4], shift[4];
};

QMIR_FN double sign_of(double x) { return x > 0.0 ? 1.0 : (x < 0.0 ? -1.0 : 0.0); }

// Derivative of max or min by the branch that `excess` > 0 selects; 1/2 where the two tie.
QMIR_FN double branch_slope(double excess) {
  return excess > 0.0 ? 1.0 : (excess < 0.0 ? 0.0 : 0.5);
}

// Turns the sums of a group into the coefficients of dx, and into the scalars' gradients.
QMIR_FN InputGradient dls_gradient(const Prediction& at, const GradientSums& sums,
                                   const Predictor& p, bool capped, int64_t count,
                                   double gradient_scale, ScalarGradients& out) {
  const Statistics& s = at.stats;
  const float* w = p.scale;
  const float* v = p.shift;
  const double raw = fabs((double)at.raw);
  double slope = branch_slope(raw - 1e-6);
  if (capped) slope *= branch_slope((double)at.limit - raw);
  const double by_raw = slope * sign_of(at.raw) * (gradient_scale * sums.error);
  const double centre = sign_of(s.mean + at.shift);
  const double by_shift = (sums.passed - sums.kept) + by_raw * ((double)w[0] * centre + w[2] + w[3]);

  out.scale[0] = by_raw * fabsf(s.mean + at.shift);
  out.scale[1] = by_raw * s.std;
  out.scale[2] = by_raw * (s.low + at.shift);
  out.scale[3] = by_raw * (s.high + at.shift);
  out.shift[0] = by_shift * s.mean;
  out.shift[1] = by_shift * s.std;
  out.shift[2] = by_shift * s.low;
  out.shift[3] = by_shift * s.high;

  const double spread = (double)s.std * (double)(count - 1);
  InputGradient g;
  g.constant = (float)((by_raw * w[0] * centre + by_shift * v[0]) / (double)count);
  g.per_deviation = spread > 0.0 ? (float)((by_raw * w[1] + by_shift * v[1]) / spread) : 0.0f;
  g.per_low = (float)((by_raw * w[2] + by_shift * v[2] + sums.sent_low) / (double)sums.count_low);
  g.per_high =
      (float)((by_raw * w[3] + by_shift * v[3] + sums.sent_high) / (double)sums.count_high);
  return g;
}

QMIR_FN float dls_input_gradient(float x, float passed, const Statistics& s,
                                 const InputGradient& g) {
  const float through = passed + (g.constant + g.per_deviation * (x - s.mean));
  return through + (x == s.low ? g.per_low : 0.0f) + (x == s.high ? g.per_high : 0.0f);
}

}  // namespace qmir
