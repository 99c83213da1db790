// Layer norm, activation, gate and channel shift of a tensor (batch, channels, pixels) of any
// strides, the statistics of the result, and its codes; three ways, chosen by the launcher:
//
// - tokens: rows of channels with a step each. One kernel does everything in shared memory.
// - chunks and codes: no norm, and memory follows the order of the codes. Values are made twice,
//   for the sums of a chunk and for its codes; qmir_dls_finish stands in between.
// - values: everything else. The values are written in the order of the codes, for cuda/dls.cu.
//
// Where step and shift are known before (cuda/moments.cu), codes are all there is to make: those of
// the second way, or tile codes, which are turned as values are.
//
// Arithmetic and the order of sums are those of backend/cpu/csrc/chain_quantize.cpp, to the byte.
#include "activations.cuh"
#include "dls_sums.cuh"
#include "layer_norm.cuh"
#include "vectors.cuh"

using namespace qmir;

namespace {

constexpr int kMostRows = 32;  // of a tile

struct Strides {
  int64_t batch, channel, pixel;
};

struct Chain {
  const float *x, *norm_weight, *norm_bias, *gate, *offset;
  int64_t channels, pixels;
  Strides x_by, gate_by;
  Activation activation, gate_activation;

  // What is quantized, from what comes before the activation.
  QMIR_DEVICE float value(float y, int64_t gate_at, int64_t channel) const {
    y = activate(activation, y);
    if (gate) y = y * activate(gate_activation, gate[gate_at]);
    if (offset) y = y + offset[channel];
    return y;
  }
};

// Positions of a group in the order of its codes, as (sample, outer, inner) dimension.
struct Walk {
  int64_t outer_size, inner_size, outer_step, inner_step;
  int64_t sample, outer, inner;

  QMIR_DEVICE Walk(const Chain& chain, bool channels_first, int64_t sample, int64_t at, int step)
      : outer_size(channels_first ? chain.channels : chain.pixels),
        inner_size(channels_first ? chain.pixels : chain.channels),
        outer_step(step / inner_size),
        inner_step(step % inner_size),
        sample(sample + at / inner_size / outer_size),
        outer(at / inner_size % outer_size),
        inner(at % inner_size) {}

  QMIR_DEVICE void go() {
    inner += inner_step;
    outer += outer_step;
    if (inner >= inner_size) {
      inner -= inner_size;
      ++outer;
    }
    while (outer >= outer_size) {
      outer -= outer_size;
      ++sample;
    }
  }

  QMIR_DEVICE float value(const Chain& chain, bool channels_first) const {
    const int64_t channel = channels_first ? outer : inner, pixel = channels_first ? inner : outer;
    const auto at = [&](const Strides& by) {
      return sample * by.batch + channel * by.channel + pixel * by.pixel;
    };
    return chain.value(chain.x[at(chain.x_by)], at(chain.gate_by), channel);
  }
};

// Pixels of any samples as rows, from one channel on. The pitch is odd: columns meet no bank twice.
struct Tile {
  float* values;
  int64_t first_row, first_channel;
  int rows, channels;

  QMIR_DEVICE float* row(int i) const {
    return values + i * (channels | 1);
  }
};

// Where the rows of a tile begin in memory, and what normalizes them.
struct Rows {
  int64_t x[kMostRows], gate[kMostRows], result[kMostRows];
  RowNorm norm[kMostRows];
};

// Calls body(row, channel) for a tile, for neighbours in memory at the same time.
template <class Body>
QMIR_DEVICE void for_tile(int rows, int channels, bool by_pixel, const Body& body) {
  const int size = by_pixel ? rows : channels, count = by_pixel ? channels : rows;
  const int outer_step = kThreads / size, inner_step = kThreads % size;
  int outer = (int)threadIdx.x / size, inner = (int)threadIdx.x % size;
  while (outer < count) {
    if (by_pixel)
      body(inner, outer);
    else
      body(outer, inner);
    inner += inner_step;
    outer += outer_step;
    if (inner >= size) {
      inner -= size;
      ++outer;
    }
  }
}

QMIR_DEVICE bool by_pixel(const Strides& by) { return by.pixel == 1 && by.channel != 1; }

// Half a warp adds up one row after the other; those that there are not repeat the last one, since
// whole warps go on together.
template <class Body>
QMIR_DEVICE void for_rows(const Tile& tile, const Body& body) {
  for (int first = 0; first < tile.rows; first += kHalfWarps) {
    const int i = first + (int)threadIdx.x / kLanes;
    body(i, tile.row(min_of(i, tile.rows - 1)));
  }
}

// Fills a tile with what is quantized.
QMIR_DEVICE void make_values(const Chain& chain, const Tile& tile, Rows& rows, bool norm,
                             float eps) {
  const int i = (int)threadIdx.x;
  if (i < tile.rows) {
    const int64_t b = (tile.first_row + i) / chain.pixels, p = (tile.first_row + i) % chain.pixels;
    rows.x[i] = b * chain.x_by.batch + p * chain.x_by.pixel;
    rows.gate[i] = b * chain.gate_by.batch + p * chain.gate_by.pixel;
    rows.result[i] = b * chain.channels * chain.pixels + p;
  }
  __syncthreads();
  for_tile(tile.rows, tile.channels, by_pixel(chain.x_by), [&](int row, int c) {
    tile.row(row)[c] = chain.x[rows.x[row] + (tile.first_channel + c) * chain.x_by.channel];
  });
  __syncthreads();
  if (norm) {
    for_rows(tile, [&](int row, const float* x) {
      double sum = 0.0, squares = 0.0;
      half_warp_sums([x](int c) { return x[c]; }, tile.channels, x[0], sum, squares);
      if (threadIdx.x % kLanes == 0)
        rows.norm[row] = row_norm(sum, squares, x[0], tile.channels, eps);
    });
    __syncthreads();
  }
  const bool columns = chain.gate ? by_pixel(chain.gate_by) : false;
  for_tile(tile.rows, tile.channels, columns, [&](int row, int c) {
    const int64_t channel = tile.first_channel + c;
    float& y = tile.row(row)[c];
    const float x =
        norm ? norm_value(y, rows.norm[row], chain.norm_weight, chain.norm_bias, channel) : y;
    y = chain.value(x, rows.gate[row] + channel * chain.gate_by.channel, channel);
  });
  __syncthreads();
}

// Codes above 127 wrap: as uint8 the byte is theirs.
QMIR_DEVICE int8_t code_of(float x, const Grid& grid) {
  return (int8_t)(int32_t)grid_code(grid_ratio(x, grid), grid);
}

}  // namespace

#define QMIR_CHAIN                                                                               \
  const float *x, const float *norm_weight, const float *norm_bias, const float *gate,           \
      const float *offset, int64_t channels, int64_t pixels, int64_t x_batch, int64_t x_channel, \
      int64_t x_pixel, int64_t gate_batch, int64_t gate_channel, int64_t gate_pixel,             \
      int64_t activation, int64_t gate_activation

#define QMIR_GIVEN_CHAIN                                                             \
  Chain {                                                                            \
    x, norm_weight, norm_bias, gate, offset, channels, pixels,                       \
        {x_batch, x_channel, x_pixel}, {gate_batch, gate_channel, gate_pixel},       \
        (Activation)activation, (Activation)gate_activation                          \
  }

// `rows` tokens of all channels to a block: 8, 16 or 32.
extern "C" __global__ void __launch_bounds__(128)
    qmir_chain_tokens(QMIR_CHAIN, const float* w, const float* v, int8_t* codes, float* step,
                      float* shift, int64_t tokens, int64_t rows, int64_t norm, float eps,
                      float levels, float low, float high) {
  QMIR_DYNAMIC_SHARED(float, values);
  __shared__ Rows places;
  __shared__ Group found[kMostRows];
  __shared__ Grid grids[kMostRows];
  const Chain chain = QMIR_GIVEN_CHAIN;
  const int64_t first = blockIdx.x * rows;
  const int valid = (int)min_of(rows, tokens - first);
  const Tile tile{values, first, 0, valid, (int)channels};
  make_values(chain, tile, places, norm, eps);
  for_rows(tile, [&](int row, const float* y) {
    const Group mine = half_warp_group([y](int c) { return y[c]; }, tile.channels);
    if (threadIdx.x % kLanes == 0) found[row] = mine;
  });
  __syncthreads();
  if (threadIdx.x < valid) {
    const int64_t token = first + threadIdx.x;
    const Prediction p =
        predict(found[threadIdx.x], channels, {w, v, levels}, step + token, shift + token);
    grids[threadIdx.x] = {p.step, p.shift, low, high};
  }
  __syncthreads();
  int8_t* to = codes + first * channels;
  if (channels % 4 == 0) {
    for_tile(valid, (int)channels / 4, false, [&](int row, int c) {
      int8_t four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] = code_of(tile.row(row)[4 * c + i], grids[row]);
      store_values(to + row * channels + 4 * c, four);
    });
  } else {
    for_tile(valid, (int)channels, false, [&](int row, int c) {
      to[row * channels + c] = code_of(tile.row(row)[c], grids[row]);
    });
  }
}

namespace {

// The block's tile of `rows` pixels and `width` channels.
QMIR_DEVICE Tile tile_of(float* values, int64_t channels, int64_t tokens, int64_t rows,
                         int64_t width) {
  const int64_t tiles = (channels + width - 1) / width;
  const int64_t first = blockIdx.x / tiles * rows, channel = blockIdx.x % tiles * width;
  return {values, first, channel, (int)min_of(rows, tokens - first),
          (int)min_of(width, channels - channel)};
}

// Calls body(row, channel in the tile, place among the codes) for a tile in the order of the codes.
template <class Body>
QMIR_DEVICE void for_places(const Chain& chain, const Tile& tile, const Rows& rows,
                            bool channels_first, const Body& body) {
  for_tile(tile.rows, tile.channels, channels_first, [&](int row, int c) {
    const int64_t channel = tile.first_channel + c;
    body(row, c, channels_first ? rows.result[row] + channel * chain.pixels
                                : (tile.first_row + row) * chain.channels + channel);
  });
}

}  // namespace

// The values of `rows` pixels and `width` channels to a block, for which the norm takes all.
extern "C" __global__ void __launch_bounds__(128)
    qmir_chain_values(QMIR_CHAIN, float* y, int64_t channels_first, int64_t tokens, int64_t rows,
                      int64_t width, int64_t norm, float eps) {
  QMIR_DYNAMIC_SHARED(float, values);
  __shared__ Rows places;
  const Chain chain = QMIR_GIVEN_CHAIN;
  const Tile tile = tile_of(values, channels, tokens, rows, width);
  make_values(chain, tile, places, norm, eps);
  for_places(chain, tile, places, channels_first,
             [&](int row, int c, int64_t to) { y[to] = tile.row(row)[c]; });
}

// Their codes, without a norm, where step and shift of each group of `samples` samples are known.
extern "C" __global__ void __launch_bounds__(128)
    qmir_chain_tile_codes(QMIR_CHAIN, const float* step, const float* shift, int8_t* codes,
                          int64_t channels_first, int64_t tokens, int64_t rows, int64_t width,
                          int64_t samples, float low, float high) {
  QMIR_DYNAMIC_SHARED(float, values);
  __shared__ Rows places;
  __shared__ Grid grids[kMostRows];
  const Chain chain = QMIR_GIVEN_CHAIN;
  const Tile tile = tile_of(values, channels, tokens, rows, width);
  if (threadIdx.x < tile.rows) {
    const int64_t group = (tile.first_row + threadIdx.x) / pixels / samples;
    grids[threadIdx.x] = {step[group], shift[group], low, high};
  }
  make_values(chain, tile, places, false, 0.0f);
  for_places(chain, tile, places, channels_first, [&](int row, int c, int64_t to) {
    codes[to] = code_of(tile.row(row)[c], grids[row]);
  });
}

// Sums and range of one chunk of a group of `samples` samples, and the first value of each group.
extern "C" __global__ void __launch_bounds__(128)
    qmir_chain_chunks(QMIR_CHAIN, double* sums, float* ranges, float* firsts,
                      int64_t channels_first, int64_t samples, int64_t count, int64_t chunks) {
  __shared__ float values[kChunk];
  __shared__ float scratch[2][kHalfWarps];
  const Chain chain = QMIR_GIVEN_CHAIN;
  const int64_t group = blockIdx.x / chunks, start = blockIdx.x % chunks * kChunk;
  const int size = (int)min_of<int64_t>(kChunk, count - start);
  const float first =
      Walk(chain, channels_first, group * samples, 0, kThreads).value(chain, channels_first);
  float low = first, high = first;
  Walk at(chain, channels_first, group * samples, start + threadIdx.x, kThreads);
#pragma unroll 4
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const float y = at.value(chain, channels_first);
    low = min_of(low, y);
    high = max_of(high, y);
    values[i] = y;
    at.go();
  }
  block_range(low, high, scratch);
  if (threadIdx.x == 0 && start == 0) firsts[group] = first;
  store_chunk([&](int i) { return values[i]; }, size, first, low, high, sums, ranges);
}

extern "C" __global__ void __launch_bounds__(128)
    qmir_chain_codes(QMIR_CHAIN, const float* step, const float* shift, int8_t* codes,
                     int64_t channels_first, int64_t samples, int64_t count, int64_t chunks,
                     float low, float high) {
  const Chain chain = QMIR_GIVEN_CHAIN;
  const int64_t group = blockIdx.x / chunks, start = blockIdx.x % chunks * kChunk;
  const int size = (int)min_of<int64_t>(kChunk, count - start);
  const Grid grid{step[group], shift[group], low, high};
  int8_t* to = codes + group * count + start;
  Walk at(chain, channels_first, group * samples, start + threadIdx.x, kThreads);
#pragma unroll 4
  for (int i = threadIdx.x; i < size; i += kThreads) {
    to[i] = code_of(at.value(chain, channels_first), grid);
    at.go();
  }
}
