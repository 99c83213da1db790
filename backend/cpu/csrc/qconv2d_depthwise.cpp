// Depthwise convolution on int8 codes: one input channel per group, output columns are the lanes.
#include <omp.h>

#include "conv_geometry.h"

namespace qmir {

namespace {

constexpr int kWidth = 32;                    // columns of one vector
constexpr int64_t kWindowBytes = 128 * 1024;  // window of one task
static_assert(kWidth <= kLongestRun);

// out[column] = sum over taps of window[tap + column] * weight[tap], in int16.
void dot_narrow(const int16_t* window, const int64_t* tap, const int8_t* weight, int64_t taps,
                int32_t* out) {
  typedef int16_t columns __attribute__((vector_size(kWidth * sizeof(int16_t))));
  columns acc = {};
  for (int64_t t = 0; t < taps; ++t) {
    columns x;
    std::memcpy(&x, window + tap[t], sizeof x);
    acc += x * (int16_t)weight[t];
  }
  // Through memory: compilers take vector conversions between widths apart, lane by lane.
  int16_t sums[kWidth];
  std::memcpy(sums, &acc, sizeof sums);
  for (int l = 0; l < kWidth; ++l) out[l] = sums[l];
}

// The same in int32.
void dot_wide(const int16_t* window, const int64_t* tap, const int8_t* weight, int64_t taps,
              int32_t* out) {
  std::memset(out, 0, kWidth * sizeof(int32_t));
  for (int64_t t = 0; t < taps; ++t) {
    const int16_t* x = window + tap[t];
    const int32_t w = weight[t];
#pragma omp simd
    for (int l = 0; l < kWidth; ++l) out[l] += x[l] * w;
  }
}

typedef void (*DotColumns)(const int16_t*, const int64_t*, const int8_t*, int64_t, int32_t*);

// No partial sum of products with 8-bit codes leaves int16.
bool fits_int16(const int8_t* weight, int64_t taps) {
  int64_t sum = 0;
  for (int64_t t = 0; t < taps; ++t) sum += weight[t] < 0 ? -weight[t] : weight[t];
  return sum * 128 <= INT16_MAX;
}

void run_band(const ConvShape& s, const int8_t* x, const int8_t* codes, const ConvResult& result,
              int64_t b, int64_t channel, int64_t oh0, int64_t oh1) {
  const Window window(s, oh0, oh1, 0, s.out_w, kWidth);
  Scratch<int16_t> values(window.size() + kWidth);
  std::memset(values.get(), 0, (window.size() + kWidth) * sizeof(int16_t));
  const int8_t* image = x + (b * s.channels + channel) * s.height * s.width;
  window.for_runs(s, [&](int64_t to, int64_t from, int64_t count) {
    if (s.stride_w == 1)
      for (int64_t i = 0; i < count; ++i) values[to + i] = image[from + i];
    else
      for (int64_t i = 0; i < count; ++i) values[to + i] = image[from + i * s.stride_w];
  });
  const int64_t taps = s.taps(), multiplier = s.group_features();
  Scratch<int64_t> tap(taps);
  Scratch<int8_t> ones(taps);
  for (int64_t t = 0; t < taps; ++t) tap[t] = window.tap(s, t / s.kernel_w, t % s.kernel_w);
  std::memset(ones.get(), 1, taps);
  alignas(64) int32_t acc[kWidth], sx[kWidth];
  alignas(64) float sx_float[kWidth];
  const DotColumns sum = taps * 128 <= INT16_MAX ? dot_narrow : dot_wide;
  for (int64_t o = channel * multiplier; o < (channel + 1) * multiplier; ++o) {
    const int8_t* weight = codes + o * taps;
    const DotColumns dot = fits_int16(weight, taps) ? dot_narrow : dot_wide;
    for (int64_t oh = oh0; oh < oh1; ++oh)
      for (int64_t ow = 0; ow < s.out_w; ow += kWidth) {
        const int16_t* at = values.get() + (oh - oh0) * s.stride_h * window.row_size + ow;
        if (result.wants_float()) {
          sum(at, tap.get(), ones.get(), taps, sx);
          for (int l = 0; l < kWidth; ++l) sx_float[l] = (float)sx[l];
        }
        dot(at, tap.get(), weight, taps, acc);
        result.write(b, o, oh, ow, std::min<int64_t>(kWidth, s.out_w - ow), acc, 0, sx_float);
      }
  }
}

}  // namespace

void depthwise_conv2d(const ConvShape& s, const int8_t* x, const int8_t* codes,
                      const ConvResult& result) {
  const Window one(s, 0, 1, 0, s.out_w, kWidth);
  const int64_t fitting = kWindowBytes / (one.row_size * (int64_t)sizeof(int16_t));
  const int64_t rows = std::clamp<int64_t>((fitting - one.rows) / s.stride_h + 1, 1, s.out_h);
  const int64_t bands = (s.out_h + rows - 1) / rows;
  const int64_t work = s.batch * s.out_h * s.out_w * s.features * s.taps();
#pragma omp parallel for collapse(3) schedule(static) if (work > kParallelWork)
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t channel = 0; channel < s.channels; ++channel)
      for (int64_t band = 0; band < bands; ++band)
        run_band(s, x, codes, result, b, channel, band * rows,
                 std::min(s.out_h, (band + 1) * rows));
}

}  // namespace qmir
