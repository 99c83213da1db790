// Convolution on int8 codes with packed weights. Output pixels are the lanes: a window of the image
// is stored as unsigned bytes [C/4][rows][columns][4] with 128 (a code of 0) outside the image, and
// every tap reads a shifted run of it, so no patch matrix is ever built.
#include <omp.h>

#include "conv_geometry.h"

using namespace qmir;

namespace qmir {
void depthwise_conv2d(const ConvShape& s, const int8_t* x, const int8_t* codes,
                      const ConvResult& result);
}

namespace {

static_assert(kDotWidth <= kLongestRun);
constexpr int64_t kWindowBytes = 192 * 1024;  // window of one task, to stay in the L2 cache

// Weight codes as [O][tap][C/4][4], zeros for missing channels, and their sums.
struct Kernel {
  int64_t quads, steps;
  Scratch<int8_t> codes;
  Scratch<uint32_t> bias;

  Kernel(const ConvShape& s, const int8_t* flat)
      : quads((s.group_channels() + 3) / 4),
        steps(s.taps() * quads),
        codes(s.features * steps * 4),
        bias(s.features) {
    std::memset(codes.get(), 0, s.features * steps * 4);
    const int64_t inputs = s.group_channels();
#pragma omp parallel for if (s.features * steps > 16384)
    for (int64_t o = 0; o < s.features; ++o) {
      int32_t sum = 0;
      for (int64_t c = 0; c < inputs; ++c)
        for (int64_t t = 0; t < s.taps(); ++t) {
          const int8_t code = flat[(o * inputs + c) * s.taps() + t];
          codes[(o * steps + t * quads) * 4 + c] = code;
          sum += code;
        }
      bias[o] = (uint32_t)kCodeBias * (uint32_t)sum;
    }
  }
};

uint32_t quad(uint8_t a, uint8_t b, uint8_t c, uint8_t d) {
  return (a | (uint32_t)b << 8 | (uint32_t)c << 16 | (uint32_t)d << 24) ^ kFourBiases;
}

// Four neighbouring channels of the image into one plane of the window.
void pack_quad(const ConvShape& s, const Window& window, const int8_t* image, int64_t present,
               uint32_t* plane) {
  const int64_t size = s.height * s.width, stride = s.stride_w;
  const auto* channel = reinterpret_cast<const uint8_t*>(image);
  const uint8_t* in[4];
  uint8_t mask[4];
  for (int c = 0; c < 4; ++c) {
    in[c] = channel + (c < present ? c : 0) * size;
    mask[c] = c < present ? 255 : 0;
  }
  const uint32_t keep = (quad(mask[0], mask[1], mask[2], mask[3]) ^ kFourBiases);
  const uint32_t fill = kFourBiases & ~keep;
  window.for_runs(s, [&](int64_t to, int64_t from, int64_t count) {
    const uint8_t *a = in[0] + from, *b = in[1] + from, *c = in[2] + from, *d = in[3] + from;
    uint32_t* out = plane + to;
    if (stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = (quad(a[i], b[i], c[i], d[i]) & keep) | fill;
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t j = i * stride;
        out[i] = (quad(a[j], b[j], c[j], d[j]) & keep) | fill;
      }
    }
  });
}

struct Task {
  int64_t b, g, oh0, oh1, ow0, ow1;
};

class DirectConv {
 public:
  DirectConv(const ConvShape& s, const int8_t* x, const int8_t* flat, const ConvResult& result)
      : s_(s), x_(x), kernel_(s, flat), result_(result) {}

  int64_t band_rows(int64_t segments) const {
    const Window one(s_, 0, 1, 0, std::min(kSegment, s_.out_w), kDotWidth);
    const int64_t fitting = kWindowBytes / (one.row_size * kernel_.quads * 4);
    const int64_t rows = (fitting - one.rows) / s_.stride_h + 1;
    const int64_t others = s_.batch * s_.groups * segments;
    const int64_t wanted = (4 * omp_get_max_threads() + others - 1) / others;
    return std::clamp<int64_t>(rows, 1, std::max<int64_t>(1, s_.out_h / wanted));
  }

  void run() const {
    const int64_t segments = (s_.out_w + kSegment - 1) / kSegment, rows = band_rows(segments);
    const int64_t bands = (s_.out_h + rows - 1) / rows;
    const int64_t work = s_.batch * s_.out_h * s_.out_w * s_.features * kernel_.steps * 4;
#pragma omp parallel for collapse(4) schedule(dynamic) if (work > kParallelWork)
    for (int64_t b = 0; b < s_.batch; ++b)
      for (int64_t g = 0; g < s_.groups; ++g)
        for (int64_t band = 0; band < bands; ++band)
          for (int64_t segment = 0; segment < segments; ++segment)
            run_task({b, g, band * rows, std::min(s_.out_h, (band + 1) * rows), segment * kSegment,
                      std::min(s_.out_w, (segment + 1) * kSegment)});
  }

 private:
  void run_task(const Task& task) const {
    const Window window(s_, task.oh0, task.oh1, task.ow0, task.ow1, kDotWidth);
    const int64_t inputs = s_.group_channels(), plane = window.size();
    // A vector may read past the last plane, into lanes that are never stored.
    Scratch<uint32_t> panel(plane * kernel_.quads + kDotWidth);
    std::memset(panel.get(), kCodeBias, (plane * kernel_.quads + kDotWidth) * 4);
    const int8_t* image = x_ + (task.b * s_.channels + task.g * inputs) * s_.height * s_.width;
    for (int64_t q = 0; q < kernel_.quads; ++q)
      pack_quad(s_, window, image + q * 4 * s_.height * s_.width,
                std::min<int64_t>(4, inputs - 4 * q), panel.get() + q * plane);
    Scratch<int32_t> sums(plane + kDotLanes);
    if (result_.wants_float()) channel_sums(panel.get(), plane, sums.get());
    Scratch<int64_t> offset(kernel_.steps);
    for (int64_t t = 0; t < s_.taps(); ++t)
      for (int64_t q = 0; q < kernel_.quads; ++q)
        offset[t * kernel_.quads + q] =
            4 * (q * plane + window.tap(s_, t / s_.kernel_w, t % s_.kernel_w));
    for (int64_t oh = task.oh0; oh < task.oh1; ++oh)
      for (int64_t ow = task.ow0; ow < task.ow1; ow += kDotWidth)
        run_tile(task, window, panel.get(), sums.get(), offset.get(), oh, ow);
  }

  // Sum over channels of each pixel of the window.
  void channel_sums(const uint32_t* panel, int64_t plane, int32_t* sums) const {
    const dot_vec ones = dot_splat(0x01010101);
    const int32_t bias = (int32_t)(kernel_.quads * 4 * kCodeBias);
    for (int64_t i = 0; i < plane; i += kDotLanes) {
      dot_vec acc = dot_splat(-bias);
      for (int64_t q = 0; q < kernel_.quads; ++q)
        acc = dot4<true>(acc, dot_load(reinterpret_cast<const uint8_t*>(panel + q * plane + i)), ones);
      std::memcpy(sums + i, &acc, sizeof acc);
    }
  }

  void run_tile(const Task& task, const Window& window, const uint32_t* panel, const int32_t* sums,
                const int64_t* offset, int64_t oh, int64_t ow) const {
    alignas(64) int32_t tile[kDotRows * kDotWidth];
    alignas(64) int32_t sx[kDotWidth] = {};
    alignas(64) float sx_float[kDotWidth];
    const int64_t n = std::min<int64_t>(kDotWidth, task.ow1 - ow);
    const int64_t vecs = (n + kDotLanes - 1) / kDotLanes, width = vecs * kDotLanes;
    const int64_t origin = (oh - task.oh0) * s_.stride_h * window.row_size + ow - task.ow0;
    if (result_.wants_float()) {
      for (int64_t i = 0; i < s_.kernel_h; ++i)
        for (int64_t j = 0; j < s_.kernel_w; ++j) {
          const int32_t* at = sums + origin + window.tap(s_, i, j);
          for (int64_t l = 0; l < width; ++l) sx[l] += at[l];
        }
      for (int64_t l = 0; l < width; ++l) sx_float[l] = (float)sx[l];
    }
    const auto* lanes = reinterpret_cast<const uint8_t*>(panel + origin);
    const int64_t first = task.g * s_.group_features(), last = first + s_.group_features();
    const DotTiles& tiles = dot_tiles(s_.bits <= kNarrowBits);
    result_.expect(task.b, first, last, oh, ow, n);
    for (int64_t o = first; o < last; o += kDotRows) {
      const int64_t rows = std::min<int64_t>(kDotRows, last - o), pitch = kernel_.steps * 4;
      tiles.at[rows - 1][vecs - 1](kernel_.codes.get() + o * pitch, pitch, lanes, offset,
                                   kernel_.steps, tile);
      for (int64_t r = 0; r < rows; ++r)
        result_.write(task.b, o + r, oh, ow, n, tile + r * width, kernel_.bias[o + r], sx_float);
    }
  }

  const ConvShape& s_;
  const int8_t* x_;
  Kernel kernel_;
  const ConvResult& result_;
};

void convolve(ConvShape s, const ConvOperands& in, float* y, int32_t* acc) {
  const bool unit = s.stride_h == 1 && s.stride_w == 1;
  const bool pointwise = s.taps() == 1 && unit && !s.pad_h && !s.pad_w;
  if (pointwise) {  // a matrix product: one long row wastes no lanes
    s.width *= s.height;
    s.out_w = s.width;
    s.height = s.out_h = 1;
  }
  const int64_t count = s.features * s.group_channels() * s.taps();
  Scratch<int8_t> codes(count);
  qmir_unpack(in.weight, codes.get(), count, s.bits);
  const ConvResult result(s, in, codes.get(), y, acc);
  if (s.group_channels() == 1)
    depthwise_conv2d(s, in.x, codes.get(), result);
  else
    DirectConv(s, in.x, codes.get(), result).run();
  result.finish();
}

}  // namespace

extern "C" {

void qmir_conv2d_acc(const int8_t* x, const uint8_t* weight, const ConvShape* shape, int32_t* y) {
  convolve(*shape, {.x = x, .weight = weight}, nullptr, y);
}

void qmir_conv2d(const int8_t* x, const float* x_step, const float* x_shift, const uint8_t* weight,
                 const float* w_step, const float* w_shift, const float* bias,
                 const float* x_offset, const float* residual_scale, const float* residual,
                 const float* moments_offset, double* moments, const ConvShape* shape, float* y) {
  convolve(*shape,
           {x, x_step, x_shift, weight, w_step, w_shift, bias, x_offset, residual_scale, residual,
            moments_offset, moments},
           y, nullptr);
}

}  // extern "C"
