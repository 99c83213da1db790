// DLS on the device: step and shift of each group of activations from its statistics, codes, and
// values. The sums run in a fixed order (dls_sums.cuh), then chunks by kFold, so that both targets
// find the same step and shift to the byte.
#include "dls_sums.cuh"
#include "vectors.cuh"

using namespace qmir;

namespace {

constexpr int kRowGroups = 32;  // groups of a block where they are short

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
    const Group mine = half_warp_group([from](int i) { return from[i]; }, (int)count);
    if (lane == 0) found[at] = mine;
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
  store_chunk([values](int i) { return values[i]; }, size, first, low, high, sums, ranges);
}

// Combines the chunks of a group: a thread for each kFold of them, then two for what those found.
// The first values of the groups are `apart` floats from each other.
extern "C" __global__ void __launch_bounds__(128)
    qmir_dls_finish(const float* firsts, const double* sums, const float* ranges, const float* w,
                    const float* v, float* step, float* shift, int64_t apart, int64_t count,
                    int64_t chunks, float levels) {
  __shared__ double folds[2][kThreads], totals[2];
  __shared__ float scratch[2][kHalfWarps];
  const int64_t group = blockIdx.x, first_chunk = group * chunks;
  const float first = firsts[group * apart];
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
