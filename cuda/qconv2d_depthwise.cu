// Depthwise convolution on int8 codes: each output feature reads one channel, so that there is no
// product of matrices. A block makes pixels of one plane, each thread four neighbours of a row.
#include "conv_tile.cuh"
#include "pack.cuh"
#include "part_sums.cuh"
#include "vectors.cuh"

using namespace qmir;

namespace {

constexpr int kPixels = 4;
constexpr int kThreads = 128;

struct Task {
  int sample, feature, row, column;  // the first of the thread's pixels
  bool some;

  // `blocks` of them share a plane.
  QMIR_DEVICE Task(const ConvShape& s, int blocks) {
    const int plane = blockIdx.x / blocks;
    const int item = blockIdx.x % blocks * (int)blockDim.x + threadIdx.x;
    const int across = (s.columns.out + kPixels - 1) / kPixels;
    sample = plane / s.features;
    feature = plane % s.features;
    row = item / across;
    column = item % across * kPixels;
    some = row < s.rows.out;
  }

  QMIR_DEVICE int64_t pixel(const ConvShape& s) const {
    return (int64_t)row * s.columns.out + column;
  }
};

// Codes of one feature into shared memory, each once.
template <int kBits>
QMIR_DEVICE void unpack(const uint8_t* weight, int feature, int taps, int8_t* codes) {
  for (int tap = threadIdx.x; tap < taps; tap += blockDim.x) {
    const int64_t at = (int64_t)feature * taps + tap;
    codes[tap] = unpack_code<kBits>(weight[at * kBits / 8], (int)(at % (8 / kBits)));
  }
  __syncthreads();
}

// Sums of products and of the codes of x over the taps inside the image.
QMIR_DEVICE void accumulate(const ConvShape& s, const Task& task, const int8_t* x,
                            const int8_t* codes, int32_t (&acc)[kPixels], int32_t (&sum)[kPixels]) {
  const int channel = task.feature / s.group_features();
  const int8_t* plane = x + ((int64_t)task.sample * s.channels + channel) * s.image();
  const int top = task.row * s.rows.stride - s.rows.pad;
  const int left = task.column * s.columns.stride - s.columns.pad;
  for (int i = 0; i < s.rows.kernel; ++i) {
    const int row = top + i * s.rows.dilation;
    if (row < 0 || row >= s.rows.size) continue;
    const int8_t* line = plane + (int64_t)row * s.columns.size;
    for (int j = 0; j < s.columns.kernel; ++j) {
      const int code = codes[i * s.columns.kernel + j];
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        const int column = left + j * s.columns.dilation + p * s.columns.stride;
        const int value = column >= 0 && column < s.columns.size ? __ldg(line + column) : 0;
        acc[p] += code * value;
        sum[p] += value;
      }
    }
  }
}

// What completes results: nothing, what takes few instructions, or every activation.
struct Nothing {
  QMIR_DEVICE int32_t operator()(int32_t acc, int64_t, int) const {
    return acc;
  }
};

struct Exact {
  const Epilogue& end;

  QMIR_DEVICE float operator()(float y, int64_t at, int feature) const {
    return end.exact(y, at, feature);
  }
};

// Completes the results of a thread and writes them, in one access where the row's length allows it.
template <class T, class Finish>
QMIR_DEVICE void write(const ConvShape& s, const Task& task, const ConvEnd& end,
                       const Finish& finish, T (&results)[kPixels], T* y) {
  const ConvEnd::Plane plane = end.plane(s, task.sample, task.feature);
  const int64_t at = plane[task.pixel(s)];
  if (s.columns.out % kPixels == 0 && plane.step == 1) {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) results[p] = finish(results[p], at + p, task.feature);
    store_values(y + at, results);
    return;
  }
#pragma unroll
  for (int p = 0; p < kPixels; ++p)
    if (task.column + p < s.columns.out) {
      const int64_t to = at + p * plane.step;
      y[to] = results[p] = finish(results[p], to, task.feature);
    }
}

template <int kBits>
QMIR_DEVICE void depthwise_acc(const int8_t* x, const uint8_t* weight, const ConvShape& s,
                               int blocks, int32_t* y) {
  QMIR_DYNAMIC_SHARED(int8_t, codes);
  const Task task(s, blocks);
  unpack<kBits>(weight, task.feature, s.taps(), codes);
  if (!task.some) return;
  int32_t acc[kPixels] = {}, sum[kPixels] = {};
  accumulate(s, task, x, codes, acc, sum);
  write(s, task, ConvEnd{}, Nothing{}, acc, y);
}

// The float results of a thread, not completed.
QMIR_DEVICE void compute(const ConvShape& s, const Task& task, const int8_t* x,
                         const int8_t* codes, const ConvAffine& affine,
                         float (&results)[kPixels]) {
  int32_t acc[kPixels] = {}, sum[kPixels] = {};
  accumulate(s, task, x, codes, acc, sum);
  const ConvAffine::Feature scales = affine.feature(task.sample, task.feature);
  const int row_class = s.rows.class_of(task.row);
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int column = min_of(task.column + p, s.columns.out - 1);
    const int64_t at =
        affine.place(s, task.sample, row_class, s.columns.class_of(column)) + task.feature;
    results[p] = affine_result(acc[p], (float)sum[p], scales.acc_scale, scales.sx_scale,
                               affine.constant[at]);
  }
}

template <int kBits>
QMIR_DEVICE void depthwise(const int8_t* x, const uint8_t* weight, const ConvAffine& affine,
                           const ConvEnd& end, const ConvShape& s, int blocks, float* y) {
  QMIR_DYNAMIC_SHARED(int8_t, codes);
  const Task task(s, blocks);
  unpack<kBits>(weight, task.feature, s.taps(), codes);
  if (!task.some) return;
  float results[kPixels];
  compute(s, task, x, codes, affine, results);
  write(s, task, end, Exact{end.end}, results, y);
}

template <int kBits>
QMIR_DEVICE void depthwise_kept(const int8_t* x, const uint8_t* weight, const ConvAffine& affine,
                                const ConvEnd& end, const ConvShape& s, int blocks,
                                const PartsRoom& room, float* y) {
  QMIR_DYNAMIC_SHARED(int8_t, codes);
  __shared__ TilePart scratch[kThreads / kWarp];
  __shared__ float pivot;
  const Task task(s, blocks);
  unpack<kBits>(weight, task.feature, s.taps(), codes);
  float results[kPixels] = {};
  if (task.some) {
    compute(s, task, x, codes, affine, results);
    write(s, task, end, end.end, results, y);
  }
  if (!room.wanted()) return;
#pragma unroll
  for (int p = 0; p < kPixels; ++p) results[p] = room.shifted(results[p], task.feature);
  if (threadIdx.x == 0) pivot = results[0];
  __syncthreads();
  const int count = task.some ? min_of(s.columns.out - task.column, kPixels) : 0;
  const auto value = [&](int p, float& y) {
    y = results[p];
    return p < count;
  };
  const TilePart part =
      block_part<kThreads / kWarp>(thread_part<kPixels>(value, pivot), scratch);
  if (threadIdx.x == 0) *room.at(task.sample, task.feature, blockIdx.x % blocks) = part;
}

}  // namespace

// `blocks` of them for each feature of each sample; one byte of dynamic shared memory for each tap.
// The first kernel knows no activation but relu; the second one keeps statistics of each block where
// `parts` is not null.
#define QMIR_DEPTHWISE(bits)                                                                      \
  extern "C" __global__ void __launch_bounds__(128)                                               \
      qmir_conv2d_depthwise_w##bits(const int8_t* x, const uint8_t* weight, QMIR_CONV_AFFINE,     \
                                    QMIR_CONV_END, QMIR_CONV_SIZES, int blocks, float* y) {       \
    depthwise<bits>(x, weight, QMIR_CONV_AFFINE_OF, QMIR_CONV_END_OF, QMIR_CONV_SHAPE, blocks,    \
                    y);                                                                           \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(128) qmir_conv2d_depthwise_kept_w##bits(           \
      const int8_t* x, const uint8_t* weight, QMIR_CONV_AFFINE, QMIR_CONV_END, QMIR_CONV_SIZES,   \
      int blocks, QMIR_PARTS_ROOM, float* y) {                                                    \
    depthwise_kept<bits>(x, weight, QMIR_CONV_AFFINE_OF, QMIR_CONV_END_OF, QMIR_CONV_SHAPE,       \
                         blocks, QMIR_PARTS_ROOM_OF, y);                                          \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(128) qmir_conv2d_depthwise_acc_w##bits(            \
      const int8_t* x, const uint8_t* weight, QMIR_CONV_SIZES, int blocks, int32_t* y) {          \
    depthwise_acc<bits>(x, weight, QMIR_CONV_SHAPE, blocks, y);                                   \
  }

QMIR_DEPTHWISE(2)
QMIR_DEPTHWISE(4)
QMIR_DEPTHWISE(8)
