// DLS on the device: step and shift of each group of activations from its statistics, codes, and
// values. The sums run in the order of backend/cpu/csrc/reduce.h (chunks of 4096, sixteen lanes
// each, then chunks by kFold), so that both targets find the same step and shift to the byte.
//
// Where an architecture does 64 float operations in the time of a double one, the lanes add pairs
// of floats. Their sums are off by 2^-43 of the largest partial sum, which the statistics, rounded
// to float, show about once in 2^18 times, by one unit. Tests choose with QMIR_FLOAT_PAIRS.
#include "dls_device.cuh"
#include "vectors.cuh"

#if !defined(QMIR_FLOAT_PAIRS)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
#define QMIR_FLOAT_PAIRS 0
#else
#define QMIR_FLOAT_PAIRS 1
#endif
#endif

using namespace qmir;

namespace {

constexpr int kChunk = 4096, kLanes = 16;
constexpr int kThreads = 128, kHalfWarps = kThreads / kLanes;
constexpr int kRowGroups = 32;  // groups of a block where they are short

// A running sum of x - first, or of its square.
struct DoubleSum {
  double total = 0.0;

  QMIR_DEVICE void add(float x, float first, bool squared) {
    const double d = (double)x - (double)first;
    total = total + (squared ? d * d : d);
  }
  QMIR_DEVICE double value() const {
    return total;
  }
};

struct PairSum {
  float high = 0.0f, low = 0.0f;

  QMIR_DEVICE void add(float x, float first, bool squared) {
    float d = x - first;
    const float back = d - x;
    float rest = (x - (d - back)) - (first + back);
    if (squared) {
      const float square = d * d;
      rest = fmaf(d, d, -square) + 2.0f * d * rest;
      d = square;
    }
    const float sum = high + d;
    const float added = sum - high;
    low += ((high - (sum - added)) + (d - added)) + rest;
    high = sum + low;
    low -= high - sum;
  }
  QMIR_DEVICE double value() const {
    return (double)high + (double)low;
  }
};

// Sum over 16 neighbouring lanes as Sum8::total adds them, twice over.
QMIR_DEVICE double lanes_sum(double x) {
  x = x + __shfl_xor_sync(kAllLanes, x, 4);
  x = x + __shfl_xor_sync(kAllLanes, x, 2);
  x = x + __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 8);
}

// Lane's share of a chunk: every 16th value. Of the last, partial 16 the first 8 belong to the
// lanes 0 to 7 only where they are all there, otherwise to the lanes from 8 on.
template <class Sum, class Values>
QMIR_DEVICE double lane_sum(const Values& at, int count, float first, int lane, bool squared) {
  Sum sum;
  const int whole = count / kLanes * kLanes, rest = count - whole;
#pragma unroll 8
  for (int i = 0; i < whole; i += kLanes) sum.add(at(i + lane), first, squared);
  const int from = rest < kLanes / 2 ? lane - kLanes / 2 : lane;
  if (from >= 0 && from < rest) sum.add(at(whole + from), first, squared);
  return sum.value();
}

// Both sums of a chunk, in every lane of 32: the lanes 0 to 15 and 16 to 31 each add one of them.
template <class Values>
QMIR_DEVICE void chunk_sums(const Values& at, int count, float first, double& sum,
                            double& squares) {
  const int lane = lane_id() % kLanes;
  const bool squared = lane_id() >= kLanes;
  const auto both = [&](double mine) {
    mine = lanes_sum(mine);
    sum = __shfl_sync(kAllLanes, mine, 0);
    squares = __shfl_sync(kAllLanes, mine, kLanes);
  };
  if (QMIR_FLOAT_PAIRS) {
    both(lane_sum<PairSum>(at, count, first, lane, squared));
    // Beyond these a float overflows, or the rest of a product underflows.
    if (squares > 1e-25 && squares < 1e37) return;
  }
  both(lane_sum<DoubleSum>(at, count, first, lane, squared));
}

// The sums of a group, and its first element.
struct Group {
  Moments moments;
  float first;
};

QMIR_DEVICE void predict(const Group& group, int64_t count, const Predictor& predictor, float* step,
                         float* shift) {
  const Prediction found = predict_group(group.moments, group.first, count, predictor);
  *step = found.step;
  *shift = found.shift;
}

// Minimum and maximum over each half of a warp.
QMIR_DEVICE void half_warp_range(float& low, float& high) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    low = min_of(low, __shfl_xor_sync(kAllLanes, low, offset));
    high = max_of(high, __shfl_xor_sync(kAllLanes, high, offset));
  }
}

// The same over the block, in every thread.
QMIR_DEVICE void block_range(float& low, float& high, float (&scratch)[2][kHalfWarps]) {
  half_warp_range(low, high);
  if (threadIdx.x % kLanes == 0) {
    scratch[0][threadIdx.x / kLanes] = low;
    scratch[1][threadIdx.x / kLanes] = high;
  }
  __syncthreads();
  for (int i = 0; i < kHalfWarps; ++i) {
    low = min_of(low, scratch[0][i]);
    high = max_of(high, scratch[1][i]);
  }
}

}  // namespace

// Short groups, 32 to a block: half a warp adds up one group after the other, and one thread for
// each group does what remains.
extern "C" __global__ void __launch_bounds__(128)
    qmir_dls_rows(const float* x, const float* w, const float* v, float* step, float* shift,
                  int64_t groups, int64_t count, float levels) {
  __shared__ Group found[kRowGroups];
  const int64_t block = (int64_t)blockIdx.x * kRowGroups;
  const int lane = threadIdx.x % kLanes;
  for (int at = threadIdx.x / kLanes; at < kRowGroups; at += kHalfWarps) {
    // Whole warps go on together, so that those beyond the last group repeat it.
    const float* from = x + min_of(block + at, groups - 1) * count;
    const float first = from[0];
    float low = first, high = first;
    for (int i = lane; i < (int)count; i += kLanes) {
      low = min_of(low, from[i]);
      high = max_of(high, from[i]);
    }
    half_warp_range(low, high);
    const auto value = [from](int i) { return from[i]; };
    double sum = 0.0, squares = 0.0;
    bool trusted = false;
    if (QMIR_FLOAT_PAIRS) {
      sum = lanes_sum(lane_sum<PairSum>(value, (int)count, first, lane, false));
      squares = lanes_sum(lane_sum<PairSum>(value, (int)count, first, lane, true));
      trusted = squares > 1e-25 && squares < 1e37;
    }
    if (!__all_sync(kAllLanes, trusted)) {
      const double exact_sum =
          lanes_sum(lane_sum<DoubleSum>(value, (int)count, first, lane, false));
      const double exact = lanes_sum(lane_sum<DoubleSum>(value, (int)count, first, lane, true));
      if (!trusted) {
        sum = exact_sum;
        squares = exact;
      }
    }
    if (lane == 0) found[at] = {{sum, squares, low, high}, first};
  }
  __syncthreads();
  const int64_t group = block + threadIdx.x;
  if (threadIdx.x < kRowGroups && group < groups)
    predict(found[threadIdx.x], count, {w, v, levels}, step + group, shift + group);
}

// Sums and range of one chunk of one group: block c of a group is its chunk c.
extern "C" __global__ void __launch_bounds__(128)
    qmir_dls_chunks(const float* x, double* sums, float* ranges, int64_t count, int64_t chunks) {
  __shared__ float4 tile[kChunk / 4];
  __shared__ float scratch[2][kHalfWarps];
  const int64_t group = blockIdx.x / chunks, start = blockIdx.x % chunks * kChunk;
  const float* whole = x + group * count;
  const float* from = whole + start;
  const int size = (int)min_of<int64_t>(kChunk, count - start);
  const float first = whole[0];
  float low = first, high = first;
  const auto meet = [&](float value) {
    low = min_of(low, value);
    high = max_of(high, value);
  };
  float* values = reinterpret_cast<float*>(tile);
  if (count % 4 == 0) {
#pragma unroll 4
    for (int i = threadIdx.x; i < size / 4; i += kThreads) {
      const float4 four = reinterpret_cast<const float4*>(from)[i];
      tile[i] = four;
      meet(four.x);
      meet(four.y);
      meet(four.z);
      meet(four.w);
    }
  } else {
#pragma unroll 8
    for (int i = threadIdx.x; i < size; i += kThreads) {
      values[i] = from[i];
      meet(values[i]);
    }
  }
  block_range(low, high, scratch);
  if (threadIdx.x >= kWarp) return;
  double sum, squares;
  chunk_sums([values](int i) { return values[i]; }, size, first, sum, squares);
  if (threadIdx.x > 0) return;
  sums[2 * (int64_t)blockIdx.x] = sum;
  sums[2 * (int64_t)blockIdx.x + 1] = squares;
  ranges[2 * (int64_t)blockIdx.x] = low;
  ranges[2 * (int64_t)blockIdx.x + 1] = high;
}

// Combines the chunks of a group: a thread for each kFold of them, then two for what those found.
extern "C" __global__ void __launch_bounds__(128)
    qmir_dls_finish(const float* x, const double* sums, const float* ranges, const float* w,
                    const float* v, float* step, float* shift, int64_t count, int64_t chunks,
                    float levels) {
  __shared__ double folds[2][kThreads], totals[2];
  __shared__ float scratch[2][kHalfWarps];
  const int64_t group = blockIdx.x, first_chunk = group * chunks;
  const float first = x[group * count];
  float low = first, high = first;
  double total = 0.0;
  for (int64_t begin = 0; begin < chunks; begin += kThreads * kFold) {
    const int64_t from = begin + threadIdx.x * kFold, to = min_of(from + kFold, chunks);
    double sum = 0.0, squares = 0.0;
#pragma unroll 16
    for (int64_t c = from; c < to; ++c) {
      sum += sums[2 * (first_chunk + c)];
      squares += sums[2 * (first_chunk + c) + 1];
      low = min_of(low, ranges[2 * (first_chunk + c)]);
      high = max_of(high, ranges[2 * (first_chunk + c) + 1]);
    }
    folds[0][threadIdx.x] = sum;
    folds[1][threadIdx.x] = squares;
    __syncthreads();
    const int used = (int)min_of<int64_t>(kThreads, (chunks - begin + kFold - 1) / kFold);
    if (threadIdx.x < 2)
      for (int i = 0; i < used; ++i) total += folds[threadIdx.x][i];
    __syncthreads();
  }
  if (threadIdx.x < 2) totals[threadIdx.x] = total;
  block_range(low, high, scratch);
  if (threadIdx.x == 0)
    predict({{totals[0], totals[1], low, high}, first}, count, {w, v, levels}, step + group,
            shift + group);
}

namespace {

struct Shape {
  int64_t total, count;

  // The group of element `at`; divisions of 64 bits cost several of 32.
  QMIR_DEVICE int64_t group(int64_t at) const {
    if (total == count) return 0;
    return total <= 0xffffffffll ? (int64_t)((uint32_t)at / (uint32_t)count) : at / count;
  }
};

// Codes of kVector values from `at` on, which lie in one group.
template <int kVector>
QMIR_DEVICE void make_codes(int8_t (&codes)[kVector], const float* x, const float* step,
                            const float* shift, const Shape& shape, int64_t at, float low,
                            float high) {
  const int64_t group = shape.group(at);
  const Grid grid{step[group], shift[group], low, high};
  float values[kVector];
  load_values(values, x + at);
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    codes[i] = (int8_t)(int32_t)grid_code(grid_ratio(values[i], grid), grid);
}

// Codes above 127 wrap: as uint8 the byte is theirs.
template <int kVector>
QMIR_DEVICE void quantize(const float* x, const float* step, const float* shift, int8_t* q,
                          const Shape& shape, float low, float high) {
  const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * kVector;
  if (at >= shape.total) return;
  int8_t codes[kVector];
  make_codes(codes, x, step, shift, shape, at, low, high);
  store_values(q + at, codes);
}

// The same, packed: 16 codes for each thread, or those of one byte, which may lie in several
// groups.
template <int kBits, int kVector>
QMIR_DEVICE void quantize_pack(const float* x, const float* step, const float* shift, uint8_t* q,
                               const Shape& shape, float low, float high) {
  const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * kVector;
  if (at >= shape.total) return;
  int8_t codes[kVector] = {};
  if constexpr (kVector == 16) {
    make_codes(codes, x, step, shift, shape, at, low, high);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      int8_t one[1] = {};
      if (at + i < shape.total) make_codes(one, x, step, shift, shape, at + i, low, high);
      codes[i] = one[0];
    }
  }
  pack_store<kBits>(q + at * kBits / 8, codes);
}

template <int kVector, class Code>
QMIR_DEVICE void dequantize(const Code* q, const float* step, const float* shift, float* y,
                            const Shape& shape) {
  const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * kVector;
  if (at >= shape.total) return;
  const int64_t group = shape.group(at);
  const Grid grid{step[group], shift[group], 0.0f, 0.0f};
  Code codes[kVector];
  float values[kVector];
  load_values(codes, q + at);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = grid_value((float)codes[i], grid);
  store_values(y + at, values);
}

}  // namespace

// kVector values for each thread, all of one group: `count` is a multiple of it.
#define QMIR_ELEMENTWISE(vector)                                                               \
  extern "C" __global__ void qmir_dls_quantize_v##vector(                                      \
      const float* x, const float* step, const float* shift, int8_t* q, int64_t total,         \
      int64_t count, float low, float high) {                                                  \
    quantize<vector>(x, step, shift, q, {total, count}, low, high);                            \
  }                                                                                            \
  extern "C" __global__ void qmir_dls_dequantize_v##vector(const int8_t* q, const float* step, \
                                                           const float* shift, float* y,       \
                                                           int64_t total, int64_t count) {     \
    dequantize<vector>(q, step, shift, y, {total, count});                                     \
  }                                                                                            \
  extern "C" __global__ void qmir_dls_dequantize_unsigned_v##vector(                           \
      const uint8_t* q, const float* step, const float* shift, float* y, int64_t total,        \
      int64_t count) {                                                                         \
    dequantize<vector>(q, step, shift, y, {total, count});                                     \
  }

QMIR_ELEMENTWISE(16)
QMIR_ELEMENTWISE(4)
QMIR_ELEMENTWISE(1)

#define QMIR_QUANTIZE_PACK(bits, vector)                                                \
  extern "C" __global__ void qmir_dls_quantize_pack##bits##_v##vector(                  \
      const float* x, const float* step, const float* shift, uint8_t* q, int64_t total, \
      int64_t count, float low, float high) {                                           \
    quantize_pack<bits, vector>(x, step, shift, q, {total, count}, low, high);          \
  }

QMIR_QUANTIZE_PACK(4, 16)
QMIR_QUANTIZE_PACK(4, 2)
QMIR_QUANTIZE_PACK(2, 16)
QMIR_QUANTIZE_PACK(2, 4)
