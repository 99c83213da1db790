// What the convolution kernels share: sizes, and the float result of a sum of products.
#pragma once
#include "conv_taps.cuh"
#include "device.cuh"
#include "epilogue.cuh"
#include "qlinear.cuh"

namespace qmir {

#define QMIR_CONV_SIZES                                                                     \
  int batch, int channels, int height, int width, int features, int kernel_h, int kernel_w, \
      int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w,     \
      int groups, int out_h, int out_w

#define QMIR_CONV_SHAPE                                                                          \
  ConvShape {                                                                                    \
    batch, channels, features, groups, {height, out_h, kernel_h, stride_h, pad_h, dilation_h}, { \
      width, out_w, kernel_w, stride_w, pad_w, dilation_w                                        \
    }                                                                                            \
  }

struct ConvShape {
  int batch, channels, features, groups;
  ConvAxis rows, columns;

  QMIR_DEVICE int group_channels() const {
    return channels / groups;
  }
  QMIR_DEVICE int group_features() const {
    return features / groups;
  }
  QMIR_DEVICE int taps() const {
    return rows.kernel * columns.kernel;
  }
  QMIR_DEVICE int64_t pixels() const {
    return (int64_t)rows.out * columns.out;
  }
  QMIR_DEVICE int64_t image() const {
    return (int64_t)rows.size * columns.size;
  }
};

// Constants lie in a table (x groups, row classes, column classes, features). There are one step
// and shift for each sample or one, and for each feature or one.
struct ConvAffine {
  const float *x_step, *w_step, *w_shift, *constant;
  int x_groups, w_steps, w_shifts, row_classes, column_classes;

  QMIR_DEVICE int group(int sample) const {
    return x_groups > 1 ? sample : 0;
  }

  // Place in the table of the first feature.
  QMIR_DEVICE int64_t place(const ConvShape& s, int sample, int row_class, int column_class) const {
    const int64_t row = (int64_t)group(sample) * row_classes + row_class;
    return (row * column_classes + column_class) * s.features;
  }

  struct Feature {
    float acc_scale, sx_scale;
  };

  QMIR_DEVICE Feature feature(int sample, int o) const {
    const float step = x_step[group(sample)];
    return {step * w_step[w_steps > 1 ? o : 0], step * w_shift[w_shifts > 1 ? o : 0]};
  }
};

// Where results lie, and what completes them.
struct ConvEnd {
  Epilogue end;
  bool channels_last;

  // The first result of a feature, and the distance to the next one.
  struct Plane {
    int64_t first;
    int step;

    QMIR_DEVICE int64_t operator[](int64_t pixel) const {
      return first + pixel * step;
    }
  };

  QMIR_DEVICE Plane plane(const ConvShape& s, int sample, int o) const {
    if (channels_last) return {(int64_t)sample * s.pixels() * s.features + o, s.features};
    return {((int64_t)sample * s.features + o) * s.pixels(), 1};
  }
};

#define QMIR_CONV_AFFINE                                                                 \
  const float *x_step, const float *w_step, const float *w_shift, const float *constant, \
      int x_groups, int w_steps, int w_shifts, int row_classes, int column_classes

#define QMIR_CONV_AFFINE_OF                                                                     \
  ConvAffine {                                                                                  \
    x_step, w_step, w_shift, constant, x_groups, w_steps, w_shifts, row_classes, column_classes \
  }

// Residual and its factors may be null.
#define QMIR_CONV_END \
  const float *residual, const float *residual_scale, int activation, int channels_last

#define QMIR_CONV_END_OF                                                   \
  ConvEnd {                                                                \
    {residual, residual_scale, (Activation)activation}, channels_last != 0 \
  }

}  // namespace qmir
