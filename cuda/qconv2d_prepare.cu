// What a convolution needs besides its accumulators, once per call: the weight in the order in
// which the lanes of a warp multiply it, and the constant term of each feature for every set of
// taps that may lie inside the image.
#include "conv_tile.cuh"
#include "mma_tile.cuh"
#include "pack.cuh"

using namespace qmir;

namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;

// A shift of each channel in fixed point.
struct Offsets {
  const float* values;
  int count;
  double unit;

  QMIR_DEVICE int64_t code(int channel) const {
    return values ? offset_code(values[count > 1 ? channel : 0], unit) : 0;
  }
};

// The unit of all offsets, NaN where one of them is not finite.
QMIR_DEVICE Offsets read_offsets(const float* values, int count, int (&scratch)[kWarps]) {
  if (!values) return {values, count, 0.0};
  int largest = 0;  // the bits of floats that are not negative sort as integers
  bool bad = false;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    bad = bad || !isfinite(values[i]);
    largest = max_of(largest, __float_as_int(fabsf(values[i])));
  }
  largest = warp_max(largest);
  if (lane_id() == 0) scratch[warp_id()] = largest;
  const bool any = __syncthreads_or(bad);
  for (int i = 0; i < kWarps; ++i) largest = max_of(largest, scratch[i]);
  return {values, count, offset_unit(any ? NAN : __int_as_float(largest))};
}

template <int kBits>
struct Feature {
  const uint8_t* weight;
  int64_t first;  // index of its first code
  int inputs, taps;
  bool real;

  QMIR_DEVICE int8_t code(int channel, int tap) const {
    if (!real || channel >= inputs) return 0;
    const int64_t at = first + (int64_t)channel * taps + tap;
    return unpack_code<kBits>(weight[at * kBits / 8], (int)(at % (8 / kBits)));
  }

  QMIR_DEVICE auto octet(int channel, int tap) const {
    uint32_t word[2] = {};
    constexpr int kPerWord = kBits == 8 ? 4 : 8, kWidth = 32 / kPerWord;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t field = (uint32_t)code(channel + i, tap) & (kBits == 8 ? 0xffu : 0xfu);
      word[i / kPerWord] |= field << i % kPerWord * kWidth;
    }
    if constexpr (kBits == 8)
      return octet_of(word[0], word[1]);
    else
      return Nibbles{word[0]};
  }
};

// Row `row` of the group's features as fragments: [tile of 16 rows][tap][step][lane][4 octets], the
// four in the order of multiply_s8.
template <int kBits, class Codes>
QMIR_DEVICE void arrange(const Feature<kBits>& feature, int row, int64_t first_tile,
                         Codes* fragments) {
  const int steps = (feature.inputs + kStepCodes - 1) / kStepCodes;
  const int64_t tile = first_tile + row / 16;
  for (int i = threadIdx.x; i < feature.taps * steps * kStepOctets; i += kThreads) {
    const int octet = i % kStepOctets, step = i / kStepOctets % steps;
    const int tap = i / kStepOctets / steps;
    const int lane = row % 8 * 4 + octet % 4, which = row % 16 / 8 + octet / 4 * 2;
    const int64_t at = ((tile * feature.taps + tap) * steps + step) * kWarp + lane;
    fragments[at * 4 + which] = feature.octet(step * kStepCodes + octet * 8, tap);
  }
}

struct Sums {
  int64_t *codes, *products;  // of each tap
  int64_t offsets;            // of the channels of a group
};

// Sums over the channels for each tap: of the codes, and of their products with the offsets.
template <int kBits>
QMIR_DEVICE void add_channels(const Feature<kBits>& feature, const Offsets& offsets,
                              int first_channel, Sums& sums, int64_t (&scratch)[kWarps]) {
  for (int tap = warp_id(); tap < feature.taps; tap += kWarps) {
    int64_t codes = 0, products = 0;
    for (int c = lane_id(); c < feature.inputs; c += kWarp) {
      const int64_t code = feature.code(c, tap);
      codes += code;
      products += code * offsets.code(first_channel + c);
    }
    codes = warp_sum(codes);
    products = warp_sum(products);
    if (lane_id() == 0) {
      sums.codes[tap] = codes;
      sums.products[tap] = products;
    }
  }
  int64_t mine = 0;
  for (int c = threadIdx.x; c < feature.inputs; c += kThreads)
    mine += offsets.code(first_channel + c);
  sums.offsets = block_sum<kThreads>(mine, scratch);
}

struct Grids {
  const float *x_shift, *w_step, *w_shift, *bias;
  int x_groups, w_steps, w_shifts, row_classes, column_classes;
};

// One thread for each constant of feature o.
QMIR_DEVICE void tabulate(const ConvShape& s, const Grids& in, const Offsets& offsets,
                          const Sums& sums, int o, float* constant) {
  const float step = in.w_step[in.w_steps > 1 ? o : 0];
  const float shift = in.w_shift[in.w_shifts > 1 ? o : 0];
  const float bias = in.bias ? in.bias[o] : 0.0f;
  const int classes = in.row_classes * in.column_classes;
  for (int at = threadIdx.x; at < classes; at += kThreads) {
    const int row_class = at / in.column_classes, column_class = at % in.column_classes;
    const TapRange<int> rows = s.rows.inside(s.rows.first_of(row_class));
    const TapRange<int> columns = s.columns.inside(s.columns.first_of(column_class));
    int64_t codes = 0, products = 0;
    for (int i = rows.first; i < rows.last; ++i)
      for (int j = columns.first; j < columns.last; ++j) {
        codes += sums.codes[i * s.columns.kernel + j];
        products += sums.products[i * s.columns.kernel + j];
      }
    const int64_t taps = (int64_t)(rows.last - rows.first) * (columns.last - columns.first);
    const double lost = offsets.values
                            ? offset_lost(products, taps * sums.offsets, offsets.unit, step, shift)
                            : 0.0;
    for (int group = 0; group < in.x_groups; ++group)
      constant[((int64_t)group * classes + at) * s.features + o] = affine_constant(
          taps * s.group_channels(), codes, in.x_shift[group], step, shift, bias, lost);
  }
}

template <int kBits>
QMIR_DEVICE void prepare(const uint8_t* weight, const Grids& grids, const float* x_offset,
                         int x_offsets, const ConvShape& s, void* fragments, int64_t* sums,
                         float* constant) {
  __shared__ int largest[kWarps];
  __shared__ int64_t scratch[kWarps];
  const int features = s.group_features(), padded = (features + 15) / 16 * 16;
  const int group = blockIdx.x / padded, row = blockIdx.x % padded;
  const int o = group * features + row;
  const int64_t codes = (int64_t)s.group_channels() * s.taps();
  const Feature<kBits> feature{weight, o * codes, s.group_channels(), s.taps(), row < features};
  if (fragments)
    arrange(feature, row, (int64_t)group * (padded / 16),
            static_cast<decltype(feature.octet(0, 0))*>(fragments));
  if (!constant || row >= features) return;
  const Offsets offsets = read_offsets(x_offset, x_offsets, largest);
  Sums of{sums + 2 * (int64_t)o * s.taps(), sums + (2 * (int64_t)o + 1) * s.taps(), 0};
  add_channels(feature, offsets, group * s.group_channels(), of, scratch);
  tabulate(s, grids, offsets, of, o, constant);
}

}  // namespace

// One block for each feature, of every group rounded up to 16 of them. `fragments` is null where
// the weight stays as it is, `constant` where only accumulators are wanted; bias and x_offset may
// be.
#define QMIR_PREPARE(bits)                                                                    \
  extern "C" __global__ void __launch_bounds__(128) qmir_conv2d_prepare_w##bits(              \
      const uint8_t* weight, const float* x_shift, const float* w_step, const float* w_shift, \
      const float* bias, const float* x_offset, int x_groups, int w_steps, int w_shifts,      \
      int x_offsets, int row_classes, int column_classes, QMIR_CONV_SIZES, void* fragments,   \
      int64_t* sums, float* constant) {                                                       \
    prepare<bits>(weight,                                                                     \
                  {x_shift, w_step, w_shift, bias, x_groups, w_steps, w_shifts, row_classes,  \
                   column_classes},                                                           \
                  x_offset, x_offsets, QMIR_CONV_SHAPE, fragments, sums, constant);           \
  }

QMIR_PREPARE(2)
QMIR_PREPARE(4)
QMIR_PREPARE(8)
