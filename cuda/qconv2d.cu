// Convolution on int8 codes as an implicit matrix product on the tensor cores: features times
// pixels, in steps of 64 channels for each tap. A block makes 64 features of a tile of 64 pixels;
// each of its four warps 32 by 32 of it. The part of the image that the tile reads lies in shared
// memory, zeros outside the image, and every tap reads it from its own place; where it is too large
// for that, each tap has its own. The weight comes in fragments from qconv2d_prepare.cu.
#include "conv_tile.cuh"
#include "mma_tile.cuh"
#include "result_tile.cuh"

using namespace qmir;

namespace {

constexpr int kTile = 64;
constexpr int kThreads = 128;
constexpr int kRowTiles = 2, kColumnTiles = 4;  // 16 features and 8 pixels each, of a warp

using Accumulator = int32_t[kRowTiles * kColumnTiles][4];

// Sizes of the tile in pixels, and whether all taps share one window of the image.
struct Plan {
  int tile_h, tile_w;
  bool shared;

  QMIR_DEVICE int stride(const ConvAxis& axis) const {
    return shared ? 1 : axis.stride;
  }
  QMIR_DEVICE int span(const ConvAxis& axis, int tile) const {
    return shared ? (tile - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1 : tile;
  }
};

// Where a block works.
struct Block {
  int sample, group, first_feature, top, left;  // features within the group, output pixels

  QMIR_DEVICE Block(const ConvShape& s, const Plan& plan) {
    const int feature_tiles = (s.group_features() + kTile - 1) / kTile;
    const int across = (s.columns.out + plan.tile_w - 1) / plan.tile_w;
    const int down = (s.rows.out + plan.tile_h - 1) / plan.tile_h;
    int at = blockIdx.x;
    first_feature = at % feature_tiles * kTile;
    at /= feature_tiles;
    left = at % across * plan.tile_w;
    at /= across;
    top = at % down * plan.tile_h;
    at /= down;
    group = at % s.groups;
    sample = at / s.groups;
  }
};

// 64 channels of a window, an octet after the other for each position, and the sums of each
// position's codes over all channels so far.
struct Window {
  Octet* octets;
  int32_t* sums;
  int rows, columns;

  QMIR_DEVICE Window(const ConvShape& s, const Plan& plan, Octet* memory)
      : octets(memory),
        rows(plan.span(s.rows, plan.tile_h)),
        columns(plan.span(s.columns, plan.tile_w)) {
    sums = reinterpret_cast<int32_t*>(octets + rows * columns * kStepOctets);
  }

  QMIR_DEVICE int positions() const {
    return rows * columns;
  }

  // Reads channels from `image` on, of which `count` exist; position (0, 0) is at (top, left).
  QMIR_DEVICE uint32_t fill(const ConvShape& s, const Plan& plan, const int8_t* image, int count,
                            int top, int left) const {
    uint32_t beyond = 0;
    for (int i = threadIdx.x; i < positions() * kStepOctets; i += kThreads) {
      const int octet = i / positions(), position = i % positions();
      const int row = top + position / columns * plan.stride(s.rows);
      const int column = left + position % columns * plan.stride(s.columns);
      Octet codes{};
      if (row >= 0 && row < s.rows.size && column >= 0 && column < s.columns.size) {
        const int8_t* from = image + (int64_t)row * s.columns.size + column;
        codes = read(from + octet * 8 * s.image(), s.image(), count - octet * 8);
      }
      octets[tile_place(position, octet, octets)] = codes;
      beyond |= beyond_nibbles(codes.even) | beyond_nibbles(codes.odd);
    }
    return beyond;
  }

  QMIR_DEVICE void add_up(bool first) const {
    for (int position = threadIdx.x; position < positions(); position += kThreads) {
      int32_t sum = first ? 0 : sums[position];
#pragma unroll
      for (int i = 0; i < kStepOctets; ++i)
        sum = add_codes(octets[position * kStepOctets + i], sum);
      sums[position] = sum;
    }
  }

  // What a tap adds to the position of a pixel.
  QMIR_DEVICE int offset(const ConvShape& s, const Plan& plan, int tap) const {
    if (!plan.shared) return 0;
    return tap / s.columns.kernel * s.rows.dilation * columns +
           tap % s.columns.kernel * s.columns.dilation;
  }

  QMIR_DEVICE int position(const ConvShape& s, const Plan& plan, int pixel) const {
    const int row = pixel / plan.tile_w, column = pixel % plan.tile_w;
    return plan.shared ? row * s.rows.stride * columns + column * s.columns.stride
                       : row * columns + column;
  }

 private:
  QMIR_DEVICE static Octet read(const int8_t* from, int64_t channel, int count) {
    uint32_t word[2] = {};
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (c < count) word[c / 4] |= (uint32_t)(uint8_t)from[c * channel] << c % 4 * 8;
    return octet_of(word[0], word[1]);
  }
};

QMIR_DEVICE void load_fragment(Nibbles (&a)[4], const Nibbles* from) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  a[0] = {words.x};
  a[1] = {words.y};
  a[2] = {words.z};
  a[3] = {words.w};
}

QMIR_DEVICE void load_fragment(Octet (&a)[4], const Octet* from) {
  const uint4 first = reinterpret_cast<const uint4*>(from)[0];
  const uint4 second = reinterpret_cast<const uint4*>(from)[1];
  a[0] = {first.x, first.y};
  a[1] = {first.z, first.w};
  a[2] = {second.x, second.y};
  a[3] = {second.z, second.w};
}

// The fragments of a group's weight: [tile of 16 features][tap][step][lane][4].
template <class Codes>
struct Weight {
  const Codes* fragments;
  int64_t first_tile;
  int tiles, taps, steps;

  // Of the tile of 16 features that begins at `feature`; zeros beyond the last one.
  QMIR_DEVICE void load(Codes (&a)[4], int feature, int tap, int step) const {
    const int tile = feature / 16;
    if (tile < tiles) {
      const int64_t at = ((first_tile + tile) * taps + tap) * steps + step;
      load_fragment(a, fragments + (at * kWarp + lane_id()) * 4);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = {};
    }
  }
};

// Where the lanes of a warp stand in the tile: d[0], d[1] of product (i, j) belong to feature
// feature + 16 * i and pixel pixel + 8 * j and the next one; d[2], d[3] to feature + 8.
struct Lane {
  int group = lane_id() / 4, rank = lane_id() % 4;
  int feature = warp_id() / 2 * 32, pixel = warp_id() % 2 * 32;
};

template <class Codes>
QMIR_DEVICE void multiply_tap(Accumulator& acc, const Codes (&rows)[kRowTiles][4],
                              const Octet* octets, const int (&position)[kColumnTiles], int offset,
                              int rank, bool narrow, int halves) {
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    Octet columns[2];
    load_column(columns, octets, position[j] + offset, rank);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      if (kNativeS4 && narrow)
        multiply_s4(acc[i * kColumnTiles + j], rows[i], columns);
      else
        multiply_s8(acc[i * kColumnTiles + j], rows[i], columns, halves);
    }
  }
}

// The sums of products of the block's tile; with kSums, those of the pixels' codes in the window.
template <class Codes, bool kSums>
QMIR_DEVICE void multiply(Accumulator& acc, const ConvShape& s, const Plan& plan,
                          const Block& block, const Window& window, const int8_t* x,
                          const Codes* fragments) {
  const int channels = s.group_channels(), taps = s.taps();
  const int tiles = (s.group_features() + 15) / 16;
  const Weight<Codes> weight{fragments, (int64_t)block.group * tiles, tiles, taps,
                             (channels + kStepCodes - 1) / kStepCodes};
  const int8_t* image =
      x + ((int64_t)block.sample * s.channels + block.group * channels) * s.image();
  const int top = block.top * s.rows.stride - s.rows.pad;
  const int left = block.left * s.columns.stride - s.columns.pad;
  const Lane lane;
  int position[kColumnTiles];
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j)
    position[j] = window.position(s, plan, lane.pixel + 8 * j + lane.group);
  Precision<Codes> precision;
  const int together = plan.shared ? taps : 1;
  bool first = true;
  for (int step = 0; step < weight.steps; ++step)
    for (int begin = 0; begin < taps; begin += together) {
      const int from = step * kStepCodes;
      const int row = plan.shared ? 0 : begin / s.columns.kernel * s.rows.dilation;
      const int column = plan.shared ? 0 : begin % s.columns.kernel * s.columns.dilation;
      __syncthreads();
      const uint32_t beyond =
          window.fill(s, plan, image + from * s.image(), channels - from, top + row, left + column);
      precision.meet(beyond, acc);
      if (kSums) window.add_up(first);
      first = false;
#pragma unroll 1
      for (int tap = begin; tap < begin + together; ++tap) {
        Codes rows[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
          weight.load(rows[i], block.first_feature + lane.feature + 16 * i, tap, step);
        multiply_tap(acc, rows, window.octets, position, window.offset(s, plan, tap), lane.rank,
                     precision.narrow, channels - from > kStepCodes / 2 ? 2 : 1);
      }
    }
#pragma unroll
  for (int i = 0; i < kRowTiles * kColumnTiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] = precision.sum(acc[i][j]);
}

// What the epilogue needs of the tile's pixels: their place in an output plane (-1 outside), that
// of their constants, and the sum of the codes that they meet.
struct Pixels {
  int place[kTile];
  int64_t constant[kTile];
  float sum[kTile];

  QMIR_DEVICE int locate(const ConvShape& s, const Plan& plan, const Block& block, int pixel,
                         int& row, int& column) {
    row = block.top + pixel / plan.tile_w;
    column = block.left + pixel % plan.tile_w;
    const bool inside = row < s.rows.out && column < s.columns.out;
    return place[pixel] = inside ? row * s.columns.out + column : -1;
  }
};

// Writes the tile: value.feature(o)(pixel in the tile, sum of products) is a result, which
// value.finish(result, place in y, o) completes.
template <class T, class Value>
QMIR_DEVICE void write(const Accumulator& acc, const ConvShape& s, const Block& block,
                       const Pixels& pixels, T* y, const Value& value) {
  using Pair = decltype(pair_of(T{}, T{}));
  const Lane lane;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int feature = block.first_feature + lane.feature + 8 * i + lane.group;
    if (feature >= s.group_features()) continue;
    const int o = block.group * s.group_features() + feature;
    const auto of_feature = value.feature(o);
    const ConvEnd::Plane plane = value.plane(s, block.sample, o);
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      const int pixel = lane.pixel + 8 * j + 2 * lane.rank;
      const int32_t* sums = &acc[i / 2 * kColumnTiles + j][i % 2 * 2];
      const int first = pixels.place[pixel], second = pixels.place[pixel + 1];
      if (first < 0) continue;
      const int64_t at = plane[first];
      const T left = value.finish(of_feature(pixel, sums[0]), at, o);
      if (second < 0) {
        y[at] = left;
      } else {
        const int64_t next = plane[second];
        const T right = value.finish(of_feature(pixel + 1, sums[1]), next, o);
        if (next == at + 1 && at % 2 == 0) {
          *reinterpret_cast<Pair*>(y + at) = pair_of(left, right);
        } else {
          y[at] = left;
          y[next] = right;
        }
      }
    }
  }
}

// The same into shared memory, and not completed.
template <class Value>
QMIR_DEVICE void keep(const Accumulator& acc, const ConvShape& s, const Block& block,
                      const Pixels& pixels, const ResultTile& tile, const Value& value) {
  const Lane lane;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int feature = lane.feature + 8 * i + lane.group;
    if (block.first_feature + feature >= s.group_features()) continue;
    const auto of_feature =
        value.feature(block.group * s.group_features() + block.first_feature + feature);
#pragma unroll
    for (int j = 0; j < 2 * kColumnTiles; ++j) {
      const int pixel = lane.pixel + j / 2 * 8 + 2 * lane.rank + j % 2;
      if (pixels.place[pixel] < 0) continue;
      tile.at(pixel, feature) =
          of_feature(pixel, acc[i / 2 * kColumnTiles + j / 2][i % 2 * 2 + j % 2]);
    }
  }
}

struct Accumulators {
  struct Feature {
    QMIR_DEVICE int32_t operator()(int, int32_t acc) const {
      return acc;
    }
  };
  QMIR_DEVICE Feature feature(int) const {
    return {};
  }
  QMIR_DEVICE ConvEnd::Plane plane(const ConvShape& s, int sample, int o) const {
    return ConvEnd{}.plane(s, sample, o);
  }
  QMIR_DEVICE int32_t finish(int32_t acc, int64_t, int) const {
    return acc;
  }
};

struct Affine {
  const ConvAffine& in;
  const ConvEnd& end;
  const Pixels& pixels;
  int sample;

  struct Feature {
    ConvAffine::Feature scales;
    const float* constant;
    const Pixels& pixels;

    QMIR_DEVICE float operator()(int pixel, int32_t acc) const {
      return affine_result(acc, pixels.sum[pixel], scales.acc_scale, scales.sx_scale,
                           constant[pixels.constant[pixel]]);
    }
  };
  QMIR_DEVICE Feature feature(int o) const {
    return {in.feature(sample, o), in.constant + o, pixels};
  }
  QMIR_DEVICE ConvEnd::Plane plane(const ConvShape& s, int sample, int o) const {
    return end.plane(s, sample, o);
  }
  QMIR_DEVICE float finish(float y, int64_t at, int o) const {
    return end.end.exact(y, at, o);
  }
};

template <class Codes>
QMIR_DEVICE void conv_acc(const int8_t* x, const Codes* fragments, const ConvShape& s,
                          const Plan& plan, int32_t* y) {
  QMIR_DYNAMIC_SHARED(Octet, memory);
  __shared__ Pixels pixels;
  const Block block(s, plan);
  const Window window(s, plan, memory);
  int row, column;
  if (threadIdx.x < kTile) pixels.locate(s, plan, block, threadIdx.x, row, column);
  Accumulator acc = {};
  multiply<Codes, false>(acc, s, plan, block, window, x, fragments);
  write(acc, s, block, pixels, y, Accumulators{});
}

// The products, and what their results need; nothing needs the window any more.
template <class Codes>
QMIR_DEVICE void multiply_and_locate(Accumulator& acc, Pixels& pixels, const int8_t* x,
                                     const Codes* fragments, const ConvAffine& affine,
                                     const ConvShape& s, const Plan& plan, const Block& block,
                                     const Window& window) {
  multiply<Codes, true>(acc, s, plan, block, window, x, fragments);
  __syncthreads();
  if (threadIdx.x < kTile) {
    int row, column;
    const int pixel = threadIdx.x, position = window.position(s, plan, pixel);
    if (pixels.locate(s, plan, block, pixel, row, column) >= 0)
      pixels.constant[pixel] =
          affine.place(s, block.sample, s.rows.class_of(row), s.columns.class_of(column));
    int32_t sum = 0;
    for (int tap = 0; tap < (plan.shared ? s.taps() : 1); ++tap)
      sum += window.sums[position + window.offset(s, plan, tap)];
    pixels.sum[pixel] = (float)sum;
  }
  __syncthreads();
}

template <class Codes>
QMIR_DEVICE void conv(const int8_t* x, const Codes* fragments, const ConvAffine& affine,
                      const ConvEnd& end, const ConvShape& s, const Plan& plan, float* y) {
  QMIR_DYNAMIC_SHARED(Octet, memory);
  __shared__ Pixels pixels;
  const Block block(s, plan);
  const Window window(s, plan, memory);
  Accumulator acc = {};
  multiply_and_locate(acc, pixels, x, fragments, affine, s, plan, block, window);
  write(acc, s, block, pixels, y, Affine{affine, end, pixels, block.sample});
}

template <class Codes>
QMIR_DEVICE void conv_kept(const int8_t* x, const Codes* fragments, const ConvAffine& affine,
                           const ConvEnd& end, const ConvShape& s, const Plan& plan,
                           const PartsRoom& room, float* y) {
  QMIR_DYNAMIC_SHARED(Octet, memory);
  __shared__ Pixels pixels;
  const Block block(s, plan);
  const Window window(s, plan, memory);
  Accumulator acc = {};
  multiply_and_locate(acc, pixels, x, fragments, affine, s, plan, block, window);
  const ResultTile tile{reinterpret_cast<float*>(memory)};
  keep(acc, s, block, pixels, tile, Affine{affine, end, pixels, block.sample});
  const int first = block.group * s.group_features() + block.first_feature;
  const int channels = min_of(s.group_features() - block.first_feature, kTile);
  const auto some = [&](int pixel) { return pixels.place[pixel] >= 0; };
  const auto place = [&](int pixel, int channel) -> int64_t {
    const int at = pixels.place[pixel];
    return at < 0 || channel >= channels ? -1 : end.plane(s, block.sample, first + channel)[at];
  };
  const int across = (s.group_features() + kTile - 1) / kTile;
  finish_tile(tile, !end.channels_last, first, channels, end.end, room,
              room.at(block.sample, first, blockIdx.x / across % room.tiles), place, some, y);
}

}  // namespace

// One block for each tile: features first, then columns and rows of pixels, groups and samples. The
// dynamic shared memory holds 68 bytes for each position of the window; for the second kernel at
// least 64 * 65 floats. Nibbles hold 2-bit codes too. The first kernel knows no activation but relu;
// the second one keeps statistics of `result_tiles` tiles of each plane where `parts` is not null.
#define QMIR_CONV(name, Codes)                                                                     \
  extern "C" __global__ void __launch_bounds__(128, 4)                                             \
      qmir_conv2d_##name(const int8_t* x, const Codes* fragments, QMIR_CONV_AFFINE, QMIR_CONV_END, \
                         QMIR_CONV_SIZES, int tile_h, int tile_w, int shared, float* y) {          \
    conv(x, fragments, QMIR_CONV_AFFINE_OF, QMIR_CONV_END_OF, QMIR_CONV_SHAPE,                     \
         {tile_h, tile_w, shared != 0}, y);                                                        \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(128, 4) qmir_conv2d_kept_##name(                    \
      const int8_t* x, const Codes* fragments, QMIR_CONV_AFFINE, QMIR_CONV_END, QMIR_CONV_SIZES,   \
      int tile_h, int tile_w, int shared, QMIR_PARTS_ROOM, float* y) {                             \
    conv_kept(x, fragments, QMIR_CONV_AFFINE_OF, QMIR_CONV_END_OF, QMIR_CONV_SHAPE,                \
              {tile_h, tile_w, shared != 0}, QMIR_PARTS_ROOM_OF, y);                               \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(128, 4)                                             \
      qmir_conv2d_acc_##name(const int8_t* x, const Codes* fragments, QMIR_CONV_SIZES, int tile_h, \
                             int tile_w, int shared, int32_t* y) {                                 \
    conv_acc(x, fragments, QMIR_CONV_SHAPE, {tile_h, tile_w, shared != 0}, y);                     \
  }

QMIR_CONV(w4, Nibbles)
QMIR_CONV(w8, Octet)
