// What the convolution kernels share: sizes, which taps lie inside the image, and the write-back.
// Zero padding pads x_hat = 0, not q = 0, so near a border the number of taps and the sum of weight
// codes depend on the position, and so does what a shift of the channels takes. Positions with the
// same valid taps form a class; the constant term is tabulated per class.
#pragma once
#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "conv_taps.cuh"
#include "dot_tile.h"
#include "epilogue.h"
#include "moments.h"
#include "qlinear.cuh"

namespace qmir {

constexpr int64_t kLongestRun = 64;  // results that are written at once
constexpr int64_t kSegment = 256;    // output columns of one task, and of a tile of moments
static_assert(kSegment % kLongestRun == 0 && kSegment <= MomentParts::kLongest);

// Mirrors the array that backend/cpu/conv2d.py passes.
struct ConvShape {
  int64_t batch, channels, height, width, features, kernel_h, kernel_w, stride_h, stride_w, pad_h,
      pad_w, dilation_h, dilation_w, groups, out_h, out_w, bits, x_groups, w_steps, w_shifts,
      x_offsets, channels_last, activation;

  int64_t group_channels() const {
    return channels / groups;
  }
  int64_t group_features() const {
    return features / groups;
  }
  int64_t taps() const {
    return kernel_h * kernel_w;
  }
};

struct ConvOperands {
  const int8_t* x;
  const float *x_step, *x_shift;
  const uint8_t* weight;
  const float *w_step, *w_shift, *bias, *x_offset, *residual_scale, *residual, *moments_offset;
  double* moments;
};

// Ranges of kernel positions that fall inside the image, along one axis.
struct Border {
  std::vector<int32_t> of;  // class of each output position
  std::vector<int64_t> first, last;

  Border(int64_t out, int64_t stride, int64_t pad, int64_t dilation, int64_t kernel, int64_t size)
      : of(out) {
    for (int64_t i = 0; i < out; ++i) {
      const auto [low, high] = taps_inside(i * stride - pad, dilation, kernel, size);
      if (first.empty() || first.back() != low || last.back() != high) {
        first.push_back(low);
        last.push_back(high);
      }
      of[i] = (int32_t)first.size() - 1;
    }
  }
  int64_t classes() const {
    return (int64_t)first.size();
  }
};

// Integer sums per feature: table[(i * (kw + 1) + j)] covers the taps above and left of it. `Sum`
// is unsigned: a result that fits the signed type is exact, whatever wraps on the way.
template <class Sum>
struct TapSums {
  int64_t taps_w, size;
  std::vector<Sum> table;

  // value(o, c, position of the code) is summed over the channels c of a group.
  template <class Value>
  TapSums(const ConvShape& s, const Value& value)
      : taps_w(s.kernel_w),
        size((s.kernel_h + 1) * (s.kernel_w + 1)),
        table(s.features * size) {
    const int64_t inputs = s.group_channels();
    for (int64_t o = 0; o < s.features; ++o) {
      Sum* at = table.data() + o * size;
      for (int64_t i = 0; i < s.kernel_h; ++i)
        for (int64_t j = 0; j < s.kernel_w; ++j) {
          Sum sum = 0;
          for (int64_t c = 0; c < inputs; ++c)
            sum += (Sum)value(o, c, ((o * inputs + c) * s.kernel_h + i) * s.kernel_w + j);
          const int64_t below = (i + 1) * (taps_w + 1) + j + 1;
          at[below] = sum + at[below - 1] + at[below - taps_w - 1] - at[below - taps_w - 2];
        }
    }
  }
  int64_t inside(int64_t o, int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    const int64_t w = taps_w + 1;
    const Sum* at = table.data() + o * size;
    return (std::make_signed_t<Sum>)(at[i1 * w + j1] - at[i0 * w + j1] - at[i1 * w + j0] +
                                     at[i0 * w + j0]);
  }
};

// The shift of each channel as a multiple of one unit, and what it takes from the outputs.
class ChannelOffsets {
 public:
  ChannelOffsets(const ConvShape& s, const ConvOperands& in, const int8_t* codes)
      : s_(s), unit_(offset_unit(largest(in.x_offset, s.x_offsets))), code_(s.channels) {
    for (int64_t c = 0; c < s.channels; ++c)
      code_[c] = offset_code(in.x_offset[s.x_offsets > 1 ? c : 0], unit_);
    group_.resize(s.groups);
    for (int64_t c = 0; c < s.channels; ++c) group_[c / s.group_channels()] += code_[c];
    products_.emplace(s, [&](int64_t o, int64_t c, int64_t at) {
      return codes[at] * code_[first_channel(o) + c];
    });
  }

  double lost(int64_t o, int64_t i0, int64_t i1, int64_t j0, int64_t j1, float step,
              float shift) const {
    const int64_t sum = (i1 - i0) * (j1 - j0) * group_[o / s_.group_features()];
    return offset_lost(products_->inside(o, i0, i1, j0, j1), sum, unit_, step, shift);
  }

 private:
  static float largest(const float* offset, int64_t count) {
    float found = 0.0f;
    for (int64_t c = 0; c < count; ++c) {
      if (!std::isfinite(offset[c])) return NAN;
      found = std::max(found, std::fabs(offset[c]));
    }
    return found;
  }
  int64_t first_channel(int64_t o) const {
    return o / s_.group_features() * s_.group_channels();
  }

  const ConvShape& s_;
  double unit_;
  std::vector<int64_t> code_, group_;
  std::optional<TapSums<uint64_t>> products_;
};

// Result of a convolution: float values, or the int32 accumulators where `acc` is given.
class ConvResult {
 public:
  ConvResult(const ConvShape& s, const ConvOperands& in, const int8_t* codes, float* y,
             int32_t* acc)
      : s_(s),
        rows_(s.out_h, s.stride_h, s.pad_h, s.dilation_h, s.kernel_h, s.height),
        cols_(s.out_w, s.stride_w, s.pad_w, s.dilation_w, s.kernel_w, s.width),
        end_{in.residual, in.residual_scale, (Activation)s.activation},
        y_(y),
        acc_(acc),
        segments_((s.out_w + kSegment - 1) / kSegment),
        parts_(s.batch, s.features, s.out_h * segments_, in.moments_offset, in.moments) {
    if (wants_float()) tabulate(in, codes);
  }

  void finish() const {
    parts_.finish();
  }

  bool wants_float() const {
    return acc_ == nullptr;
  }

  // Announces that n neighbouring outputs of one row will be written for features [first, last).
  void expect(int64_t b, int64_t first, int64_t last, int64_t oh, int64_t ow, int64_t n) const {
    if (!end_.residual) return;
    const int64_t pixel = oh * s_.out_w + ow, plane = s_.out_h * s_.out_w;
    if (s_.channels_last && last - first == s_.features)
      fetch_residuals(end_, (b * plane + pixel) * s_.features, n * s_.features);
    else if (!s_.channels_last)
      for (int64_t o = first; o < last; ++o)
        fetch_residuals(end_, (b * s_.features + o) * plane + pixel, n);
  }

  // n <= kLongestRun neighbouring outputs of one row: acc - bias are the sums of products, sx those
  // of codes.
  void write(int64_t b, int64_t o, int64_t oh, int64_t ow, int64_t n, const int32_t* acc,
             uint32_t bias, const float* sx) const {
    const int64_t at = ((b * s_.features + o) * s_.out_h + oh) * s_.out_w + ow;
    if (!wants_float()) {
      for (int64_t j = 0; j < n; ++j) acc_[at + j] = (int32_t)((uint32_t)acc[j] - bias);
      return;
    }
    const int64_t g = s_.x_groups > 1 ? b : 0, feature = g * s_.features + o;
    const float scale = acc_scale_[feature], sx_scale = sx_scale_[feature];
    const int64_t row_class = g * rows_.classes() + rows_.of[oh];
    const float* constant = &constant_[(row_class * s_.features + o) * cols_.classes()];
    const int32_t* column = &cols_.of[ow];
    const int32_t middle = column[n / 2];
    const float common = constant[middle];
    alignas(64) float row[kLongestRun];
    float* y = s_.channels_last ? row : y_ + at;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j)
      y[j] = affine_result((int32_t)((uint32_t)acc[j] - bias), sx[j], scale, sx_scale, common);
    // Classes only change towards the borders: whatever differs lies at the two ends.
    const auto redo = [&](int64_t j) {
      y[j] = affine_result((int32_t)((uint32_t)acc[j] - bias), sx[j], scale, sx_scale,
                           constant[column[j]]);
    };
    for (int64_t j = 0; column[j] != middle; ++j) redo(j);
    for (int64_t j = n - 1; column[j] != middle; --j) redo(j);
    if (s_.channels_last) {
      const int64_t last = ((b * s_.out_h + oh) * s_.out_w + ow) * s_.features + o;
      finish_positions(end_, y, last, s_.features, o, n);
      for (int64_t j = 0; j < n; ++j) y_[last + j * s_.features] = y[j];
    } else {
      finish_positions(end_, y, at, 1, o, n);
    }
    if (parts_.wanted()) add_moments(b, o, oh, ow, n, y);
  }

 private:
  // Of a whole segment at once where its values lie in a row, when its last run is there.
  void add_moments(int64_t b, int64_t o, int64_t oh, int64_t ow, int64_t n, const float* y) const {
    const int64_t tile = oh * segments_ + ow / kSegment, first = ow / kSegment * kSegment;
    const int64_t end = std::min(first + kSegment, s_.out_w);
    if (s_.channels_last)
      parts_.add(b, o, tile, y, n);
    else if (ow + n == end)
      parts_.add(b, o, tile, y - (ow - first), end - first);
  }

  void tabulate(const ConvOperands& in, const int8_t* codes) {
    const int64_t inputs = s_.group_channels();
    const TapSums<uint32_t> sums(s_, [&](int64_t, int64_t, int64_t at) { return codes[at]; });
    std::optional<ChannelOffsets> offsets;
    if (in.x_offset) offsets.emplace(s_, in, codes);
    acc_scale_.resize(s_.x_groups * s_.features);
    sx_scale_.resize(s_.x_groups * s_.features);
    constant_.reserve(s_.x_groups * rows_.classes() * s_.features * cols_.classes());
    for (int64_t g = 0; g < s_.x_groups; ++g) {
      for (int64_t o = 0; o < s_.features; ++o) {
        acc_scale_[g * s_.features + o] = in.x_step[g] * in.w_step[s_.w_steps > 1 ? o : 0];
        sx_scale_[g * s_.features + o] = in.x_step[g] * in.w_shift[s_.w_shifts > 1 ? o : 0];
      }
      for (int64_t r = 0; r < rows_.classes(); ++r)
        for (int64_t o = 0; o < s_.features; ++o)
          for (int64_t c = 0; c < cols_.classes(); ++c) {
            const int64_t i0 = rows_.first[r], i1 = rows_.last[r];
            const int64_t j0 = cols_.first[c], j1 = cols_.last[c];
            const float step = in.w_step[s_.w_steps > 1 ? o : 0];
            const float shift = in.w_shift[s_.w_shifts > 1 ? o : 0];
            const double lost = offsets ? offsets->lost(o, i0, i1, j0, j1, step, shift) : 0.0;
            constant_.push_back(affine_constant(
                (i1 - i0) * (j1 - j0) * inputs, sums.inside(o, i0, i1, j0, j1), in.x_shift[g],
                step, shift, in.bias ? in.bias[o] : 0.0f, lost));
          }
    }
  }

  const ConvShape& s_;
  Border rows_, cols_;
  Epilogue end_;
  float* y_;
  int32_t* acc_;
  int64_t segments_;
  MomentParts parts_;
  std::vector<float> acc_scale_, sx_scale_, constant_;
};

// The part of one input plane that a band of output rows and a segment of output columns read.
// Columns are stored by their phase modulo the stride, so that neighbouring outputs read
// neighbouring values for every tap: column j lies at (j % stride) * pitch + j / stride.
struct Window {
  int64_t top, left, rows, cols, pitch, row_size;

  Window(const ConvShape& s, int64_t oh0, int64_t oh1, int64_t ow0, int64_t ow1, int64_t multiple)
      : top(oh0 * s.stride_h - s.pad_h),
        left(ow0 * s.stride_w - s.pad_w),
        rows((oh1 - oh0 - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1),
        cols((ow1 - ow0 - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1),
        pitch(round_up(ow1 - ow0, multiple) + (s.kernel_w - 1) * s.dilation_w / s.stride_w),
        row_size(s.stride_w * pitch) {}

  int64_t size() const {
    return rows * row_size;
  }
  int64_t tap(const ConvShape& s, int64_t i, int64_t j) const {
    const int64_t column = j * s.dilation_w;
    return i * s.dilation_h * row_size + column % s.stride_w * pitch + column / s.stride_w;
  }

  // Calls copy(position in the window, position in the image, count) for each run of values that
  // lie inside the image; neighbours of a run are stride_w apart in the image.
  template <class Copy>
  void for_runs(const ConvShape& s, const Copy& copy) const {
    const int64_t stride = s.stride_w, right = std::min(cols, s.width - left);
    for (int64_t r = std::max<int64_t>(0, -top); r < std::min(rows, s.height - top); ++r)
      for (int64_t phase = 0; phase < stride; ++phase) {
        const int64_t low = std::max<int64_t>(0, (-left - phase + stride - 1) / stride);
        const int64_t high = right > phase ? (right - phase + stride - 1) / stride : 0;
        if (high > low)
          copy(r * row_size + phase * pitch + low,
               (top + r) * s.width + left + phase + low * stride, high - low);
      }
  }
};

}  // namespace qmir
