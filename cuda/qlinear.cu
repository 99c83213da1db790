// Linear layer on int8 codes with packed weights, on the tensor cores: the matrix of codes x
// (rows, K) times the weight (features, K), both in steps of 64 along K. A block makes a tile of 64
// rows and 64 features; each of its four warps 32 by 32 of it. While a step is multiplied the next
// one is on its way from memory to registers, where the weight is unpacked.
#include "epilogue.cuh"
#include "mma_tile.cuh"
#include "result_tile.cuh"
#include "row_constant.cuh"

using namespace qmir;

namespace {

constexpr int kTile = 64;
constexpr int kThreads = 128;
// Two threads share a row of a tile, half a step each.
constexpr int kPart = kStepOctets / 2;
constexpr int kRowTiles = 2, kColumnTiles = 4;  // 16 rows and 8 features each, of a warp

struct Sizes {
  int64_t rows, inputs, features;
};

// Where a block works: from a row and a feature on, before row `end`.
struct Corner {
  int64_t row, end, feature;

  QMIR_DEVICE explicit Corner(const Sizes& sizes)
      : row(blockIdx.x / across(sizes) * kTile),
        end(sizes.rows),
        feature(blockIdx.x % across(sizes) * kTile) {}

  // Tiles begin anew with each sample; this is tile `at` of `tiles` of each.
  QMIR_DEVICE Corner(const Sizes& sizes, int64_t rows_per_sample, int64_t tiles)
      : feature(blockIdx.x % across(sizes) * kTile) {
    const int64_t at = blockIdx.x / across(sizes), first = at / tiles * rows_per_sample;
    row = first + at % tiles * kTile;
    end = first + rows_per_sample;
  }

  QMIR_DEVICE static int64_t across(const Sizes& sizes) {
    return (sizes.features + kTile - 1) / kTile;
  }
};

// What a thread brings of the next step: octets [first, first + kPart) of one row of each operand.
template <class Codes>
struct Stage {
  Octet x[kPart];
  Codes weight[kPart];
  int32_t x_sum = 0, weight_sum = 0;
  uint32_t beyond;

  QMIR_DEVICE void load_row(const Stream& stream, int64_t row, int64_t k, int64_t inputs) {
    if (inputs % 16 == 0) {
      const auto* from = reinterpret_cast<const uint4*>(stream.data + row * inputs + k);
#pragma unroll
      for (int i = 0; i < kPart / 2; ++i) {
        const uint4 four = k + 16 * i < inputs ? from[i] : make_uint4(0, 0, 0, 0);
        x[2 * i] = octet_of(four.x, four.y);
        x[2 * i + 1] = octet_of(four.z, four.w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPart; ++i)
        x[i] = load_codes<Octet>(stream, 8, row * inputs + k + 8 * i, count_of(inputs - k - 8 * i));
    }
  }

  QMIR_DEVICE static int count_of(int64_t left) {
    return left > 8 ? 8 : (int)left;
  }

  QMIR_DEVICE void load(const Stream& x_stream, const Stream& w_stream, const Sizes& sizes,
                        int bits, int64_t row, int64_t end, int64_t feature, int64_t k) {
    if (row < end) {
      load_row(x_stream, row, k, sizes.inputs);
    } else {
#pragma unroll
      for (int i = 0; i < kPart; ++i) x[i] = {};
    }
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const int64_t at = k + 8 * i;
      const int count = feature < sizes.features ? count_of(sizes.inputs - at) : 0;
      weight[i] = load_codes<Codes>(w_stream, bits, feature * sizes.inputs + at, count);
    }
  }

  // Into the tiles; sums of the codes and whether x fits 4 bits come along.
  QMIR_DEVICE void store(Octet* x_tile, Codes* weight_tile, int row, int first) {
    beyond = 0;
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      x_tile[tile_place(row, first + i, x_tile)] = x[i];
      weight_tile[tile_place(row, first + i, weight_tile)] = weight[i];
      x_sum = add_codes(x[i], x_sum);
      weight_sum = add_codes(weight[i], weight_sum);
      beyond |= beyond_nibbles(x[i].even) | beyond_nibbles(x[i].odd);
    }
  }
};

template <class Codes>
struct Tiles {
  Octet x[2][kTile * kStepOctets];
  Codes weight[2][kTile * kStepOctets];
};

// Of the codes of the tile's rows and features.
struct CodeSums {
  int32_t x[kTile], weight[kTile];
};

// Where the lanes of a warp stand in the tile: d[0], d[1] of product (i, j) belong to row
// row + 16 * i and features column + 8 * j and the next one; d[2], d[3] to row + 8.
struct Lane {
  int group = lane_id() / 4, rank = lane_id() % 4;
  int row = warp_id() / 2 * 32, column = warp_id() % 2 * 32;
};

template <class Codes>
QMIR_DEVICE void multiply_step(int32_t (&acc)[kRowTiles * kColumnTiles][4], const Octet* x,
                               const Codes* weight, const Lane& lane, bool narrow, int halves) {
  Octet rows[kRowTiles][4];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
    load_rows(rows[i], x, lane.row + 16 * i + lane.group, lane.rank);
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    Codes columns[2];
    load_column(columns, weight, lane.column + 8 * j + lane.group, lane.rank);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      if (kNativeS4 && narrow)
        multiply_s4(acc[i * kColumnTiles + j], rows[i], columns);
      else
        multiply_s8(acc[i * kColumnTiles + j], rows[i], columns, halves);
    }
  }
}

// The sums of products of the block's tile, and those of both operands' codes.
template <class Codes>
QMIR_DEVICE void multiply(int32_t (&acc)[kRowTiles * kColumnTiles][4], Tiles<Codes>& tiles,
                          CodeSums& sums, const int8_t* x, const uint8_t* weight, int bits,
                          const Sizes& sizes, const Corner& corner) {
  const Stream x_stream{reinterpret_cast<const uint8_t*>(x), sizes.rows * sizes.inputs};
  const Stream w_stream{weight, (sizes.features * sizes.inputs * bits + 7) / 8};
  const int row = threadIdx.x / 2, first = threadIdx.x % 2 * kPart;
  const Lane lane;
  Precision<Codes> precision;
  Stage<Codes> stage;
  int buffer = 1;
  // The first turn only loads: code that loads is long, and so there is one copy of it.
#pragma unroll 1
  for (int64_t k = -kStepCodes; k < sizes.inputs; k += kStepCodes, buffer ^= 1) {
    if (k >= 0) {
      stage.store(tiles.x[buffer], tiles.weight[buffer], row, first);
      precision.meet(stage.beyond, acc);
    }
    if (k + kStepCodes < sizes.inputs)
      stage.load(x_stream, w_stream, sizes, bits, corner.row + row, corner.end,
                 corner.feature + row, k + kStepCodes + 8 * first);
    if (k >= 0)
      multiply_step(acc, tiles.x[buffer], tiles.weight[buffer], lane, precision.narrow,
                    sizes.inputs - k > kStepCodes / 2 ? 2 : 1);
  }
#pragma unroll
  for (int i = 0; i < kRowTiles * kColumnTiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] = precision.sum(acc[i][j]);
  const int32_t x_sum = stage.x_sum + __shfl_xor_sync(kAllLanes, stage.x_sum, 1);
  const int32_t w_sum = stage.weight_sum + __shfl_xor_sync(kAllLanes, stage.weight_sum, 1);
  if (first == 0) {
    sums.x[row] = x_sum;
    sums.weight[row] = w_sum >> kWidenedBits<Codes>;
  }
}

// Writes a tile: value.row(row in the tile, first feature of the lane)(i, sum of products) is
// result i of a row and a lane, which value.finish(result, place in y, feature) completes.
template <class T, class Value>
QMIR_DEVICE void write(const int32_t (&acc)[kRowTiles * kColumnTiles][4], const Sizes& sizes,
                       const Corner& corner, T* y, const Value& value) {
  using Pair = decltype(pair_of(T{}, T{}));
  const Lane lane;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int r = lane.row + 8 * i + lane.group;
    if (corner.row + r >= corner.end) continue;
    const auto at_row = value.row(r, lane.column + 2 * lane.rank);
    const int64_t line = (corner.row + r) * sizes.features;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      const int64_t c = corner.feature + lane.column + 8 * j + 2 * lane.rank;
      const int32_t* sums = &acc[i / 2 * kColumnTiles + j][i % 2 * 2];
      T first = at_row(2 * j, sums[0]), second = at_row(2 * j + 1, sums[1]);
      const int64_t left = sizes.features - c;
      if (left > 0) first = value.finish(first, line + c, c);
      if (left > 1) second = value.finish(second, line + c + 1, c + 1);
      if (left >= 2 && sizes.features % 2 == 0) {
        *reinterpret_cast<Pair*>(y + line + c) = pair_of(first, second);
      } else {
        if (left > 0) y[line + c] = first;
        if (left > 1) y[line + c + 1] = second;
      }
    }
  }
}

// The same into shared memory, and not completed.
template <class Value>
QMIR_DEVICE void keep(const int32_t (&acc)[kRowTiles * kColumnTiles][4], const Corner& corner,
                      const ResultTile& tile, const Value& value) {
  const Lane lane;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int r = lane.row + 8 * i + lane.group;
    if (corner.row + r >= corner.end) continue;
    const auto at_row = value.row(r, lane.column + 2 * lane.rank);
#pragma unroll
    for (int j = 0; j < 2 * kColumnTiles; ++j)
      tile.at(r, lane.column + j / 2 * 8 + 2 * lane.rank + j % 2) =
          at_row(j, acc[i / 2 * kColumnTiles + j / 2][i % 2 * 2 + j % 2]);
  }
}

struct Accumulators {
  struct Row {
    QMIR_DEVICE int32_t operator()(int, int32_t acc) const {
      return acc;
    }
  };
  QMIR_DEVICE Row row(int, int) const {
    return {};
  }
  QMIR_DEVICE int32_t finish(int32_t acc, int64_t, int64_t) const {
    return acc;
  }
};

struct Operands {
  const float *x_step, *x_shift, *w_step, *w_shift, *bias;
  int64_t rows_per_group, w_steps, w_shifts;
  Epilogue end;
};

// What the epilogue needs of the tile's features, in shared memory. `constant` holds where all rows
// belong to one group of activations; otherwise each row makes its own from the rest.
struct Features {
  float constant[kTile];
  RowConstant of[kTile];
};

class Affine {
 public:
  QMIR_DEVICE Affine(const Operands& in, const Sizes& sizes, const Corner& corner,
                     const CodeSums& sums, Features& features)
      : in_(in), x_sum_(sums.x), features_(features), first_row_(corner.row) {
    const int64_t last = min_of(first_row_ + kTile, corner.end) - 1;
    group_ = first_row_ / in.rows_per_group;
    one_group_ = last / in.rows_per_group == group_;
    if (threadIdx.x < kTile)
      describe(threadIdx.x, corner.feature + threadIdx.x, sizes, sums.weight[threadIdx.x]);
    __syncthreads();
  }

  struct Row {
    const RowConstant* features;
    float step, sum;
    float constant[2 * kColumnTiles];

    QMIR_DEVICE float operator()(int i, int32_t acc) const {
      const RowConstant& feature = features[place(i)];
      return affine_result(acc, sum, step * feature.step, step * feature.shift, constant[i]);
    }
  };

  QMIR_DEVICE float finish(float y, int64_t at, int64_t feature) const {
    return in_.end.exact(y, at, feature);
  }

  QMIR_DEVICE Row row(int r, int column) const {
    const int64_t group = one_group_ ? group_ : (first_row_ + r) / in_.rows_per_group;
    Row result{features_.of + column, in_.x_step[group], (float)x_sum_[r], {}};
    if (one_group_)
      copy_constants(result.constant, column);
    else
      make_constants(result.constant, result.features, in_.x_shift[group]);
    return result;
  }

 private:
  const Operands& in_;
  const int32_t* x_sum_;
  Features& features_;
  int64_t first_row_, group_;
  bool one_group_;

  QMIR_DEVICE void describe(int c, int64_t feature, const Sizes& sizes, int32_t sum) {
    // Beyond the last feature: a constant that is never in doubt.
    RowConstant found = row_constant(0, 0, 0.0f, 0.0f, 1.0f);
    if (feature < sizes.features)
      found = row_constant((int32_t)sizes.inputs, sum, in_.w_step[in_.w_steps > 1 ? feature : 0],
                           in_.w_shift[in_.w_shifts > 1 ? feature : 0],
                           in_.bias ? in_.bias[feature] : 0.0f);
    features_.of[c] = found;
    if (one_group_) features_.constant[c] = found.exact(in_.x_shift[group_]);
  }

  // Of the results of a lane, relative to its first feature.
  QMIR_DEVICE static int place(int i) {
    return i / 2 * 8 + i % 2;
  }

  QMIR_DEVICE void copy_constants(float (&constant)[2 * kColumnTiles], int column) const {
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) constant[i] = features_.constant[column + place(i)];
  }

  QMIR_DEVICE static void make_constants(float (&constant)[2 * kColumnTiles],
                                         const RowConstant* features, float beta) {
    uint32_t unsure = 0;
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) {
      bool sure;
      constant[i] = features[place(i)].quick(beta, sure);
      unsure |= (sure ? 0u : 1u) << i;
    }
    // Seldom, and so not worth a copy of the code for each result.
#pragma unroll 1
    for (int i = 0; unsure; ++i, unsure >>= 1) {
      if (!(unsure & 1)) continue;
      const float exact = features[place(i)].exact(beta);
#pragma unroll
      for (int j = 0; j < 2 * kColumnTiles; ++j)
        if (j == i) constant[j] = exact;
    }
  }
};

template <class Codes>
QMIR_DEVICE void linear_acc(const int8_t* x, const uint8_t* weight, int bits, const Sizes& sizes,
                            int32_t* y) {
  __shared__ Tiles<Codes> tiles;
  __shared__ CodeSums sums;
  const Corner corner(sizes);
  int32_t acc[kRowTiles * kColumnTiles][4] = {};
  multiply(acc, tiles, sums, x, weight, bits, sizes, corner);
  write(acc, sizes, corner, y, Accumulators{});
}

template <class Codes>
QMIR_DEVICE void linear(const int8_t* x, const uint8_t* weight, int bits, const Operands& operands,
                        const Sizes& sizes, float* y) {
  __shared__ Tiles<Codes> tiles;
  __shared__ CodeSums sums;
  __shared__ Features features;
  const Corner corner(sizes);
  int32_t acc[kRowTiles * kColumnTiles][4] = {};
  multiply(acc, tiles, sums, x, weight, bits, sizes, corner);
  __syncthreads();
  const Affine affine(operands, sizes, corner, sums, features);
  write(acc, sizes, corner, y, affine);
}

// Results take the place of the operands' tiles, which nothing needs any more.
template <class Codes>
union TilesThenResults {
  Tiles<Codes> tiles;
  float results[kTile * ResultTile::kPitch];
};

template <class Codes>
QMIR_DEVICE void linear_kept(const int8_t* x, const uint8_t* weight, int bits,
                             const Operands& operands, const Sizes& sizes, int64_t rows_per_sample,
                             const PartsRoom& room, float* y) {
  __shared__ TilesThenResults<Codes> memory;
  __shared__ CodeSums sums;
  __shared__ Features features;
  const Corner corner(sizes, rows_per_sample, room.tiles);
  int32_t acc[kRowTiles * kColumnTiles][4] = {};
  multiply(acc, memory.tiles, sums, x, weight, bits, sizes, corner);
  __syncthreads();
  const ResultTile tile{memory.results};
  keep(acc, corner, tile, Affine(operands, sizes, corner, sums, features));
  const int rows = (int)min_of<int64_t>(corner.end - corner.row, kTile);
  const int channels = (int)min_of<int64_t>(sizes.features - corner.feature, kTile);
  const auto some = [rows](int row) { return row < rows; };
  const auto place = [&](int row, int channel) -> int64_t {
    if (row >= rows || channel >= channels) return -1;
    return (corner.row + row) * sizes.features + corner.feature + channel;
  };
  const int64_t at = blockIdx.x / Corner::across(sizes);
  finish_tile(tile, false, (int)corner.feature, channels, operands.end, room,
              room.at(at / room.tiles, corner.feature, at % room.tiles), place, some, y);
}

}  // namespace

#define QMIR_LINEAR_OPERANDS                                                                     \
  const int8_t *x, const float *x_step, const float *x_shift, const uint8_t *weight,             \
      const float *w_step, const float *w_shift, const float *bias, const float *residual,       \
      const float *residual_scale, int bits, int64_t rows, int64_t rows_per_group,               \
      int64_t inputs, int64_t features, int64_t w_steps, int64_t w_shifts, int activation

#define QMIR_LINEAR_OPERANDS_OF                                                        \
  Operands {                                                                           \
    x_step, x_shift, w_step, w_shift, bias, rows_per_group, w_steps, w_shifts, {       \
      residual, residual_scale, (Activation)activation                                 \
    }                                                                                  \
  }

// One block for each tile, features first. Weight codes have `bits` bits: 8, or 2 or 4 for the
// kernels of nibbles. w_steps and w_shifts are 1 or `features`; bias, residual and residual_scale
// may be null; row r of x belongs to the group r / rows_per_group. The first kernel knows no
// activation but relu. The second one has `result_tiles` tiles for each rows_per_sample rows, whose
// statistics it keeps where `parts` is not null.
#define QMIR_LINEAR(name, Codes)                                                                 \
  extern "C" __global__ void __launch_bounds__(128, 5)                                           \
      qmir_linear_##name(QMIR_LINEAR_OPERANDS, float* y) {                                       \
    linear<Codes>(x, weight, bits, QMIR_LINEAR_OPERANDS_OF, {rows, inputs, features}, y);        \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(128, 5) qmir_linear_kept_##name(                  \
      QMIR_LINEAR_OPERANDS, int64_t rows_per_sample, QMIR_PARTS_ROOM, float* y) {                \
    linear_kept<Codes>(x, weight, bits, QMIR_LINEAR_OPERANDS_OF, {rows, inputs, features},       \
                       rows_per_sample, QMIR_PARTS_ROOM_OF, y);                                  \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(128, 5)                                           \
      qmir_linear_acc_##name(const int8_t* x, const uint8_t* weight, int bits, int64_t rows,     \
                             int64_t inputs, int64_t features, int32_t* y) {                     \
    linear_acc<Codes>(x, weight, bits, {rows, inputs, features}, y);                             \
  }

QMIR_LINEAR(w4, Nibbles)
QMIR_LINEAR(w8, Octet)
