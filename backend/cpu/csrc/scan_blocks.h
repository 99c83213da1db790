// Selective scan, forward and backward: what both read, in blocks of kLanes channels.
//
// Shapes as in qmir_ao/ops/selective_scan.py: u, delta, y (B, E, L), A (E, N), B, C (B, K, N, L).
// The scan of an image in four directions (ops/ss2d_scan.py) is the same with K = 4 and u shared;
// only where a group's steps lie in memory differs (directions.h).
// All loops run in chunks of kChunk time steps, transposed into lanes.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "simd.h"

#include "directions.h"
#include "selective_scan.cuh"

// Loops over a known number of states keep what they can of the state in registers.
#define QMIR_DISPATCH_STATES(call, ...)              \
  switch (s.states) {                                \
    case 1: call<1, true>(__VA_ARGS__); break;       \
    case 4: call<4, true>(__VA_ARGS__); break;       \
    case 8: call<8, true>(__VA_ARGS__); break;       \
    case 10: call<10, true>(__VA_ARGS__); break;     \
    case 16: call<16, true>(__VA_ARGS__); break;     \
    default: call<kMaxStates, false>(__VA_ARGS__);   \
  }

namespace qmir {

constexpr int kChunk = kLanes;
constexpr int kMaxStates = 64;

struct Scan {
  Planes<const float> u, delta, B, C;
  const float *A, *D, *bias;
  int64_t batch, channels, groups, states, length;
  bool softplus;
  Order order;

  int64_t per_group() const { return channels / groups; }
  int64_t blocks() const { return (per_group() + kLanes - 1) / kLanes; }
  int64_t chunks() const { return (length + kChunk - 1) / kChunk; }
  int width(int64_t block) const { return (int)std::min<int64_t>(kLanes, per_group() - block * kLanes); }
  int steps(int64_t chunk) const { return (int)std::min<int64_t>(kChunk, length - chunk * kChunk); }
};

// What one block of channels needs besides its sequences.
template <int N>
struct Block {
  DecayRate<lanes> rate[N];
  lanes d, bias;
  lanes reach;    // |delta| below this needs no clamp; NaN or zero where A is not finite
  int64_t group;
  int64_t local;  // channel of lane 0 within its group
  int64_t first;  // the same, counted over all groups
  int width;

  Block(const Scan& s, int64_t group, int64_t block, int n)
      : d{}, bias{}, group(group), local(block * kLanes), first(group * s.per_group() + local),
        width(s.width(block)) {
    lanes largest = broadcast(1e-30f);
    for (int i = 0; i < n; ++i) {
      rate[i] = DecayRate<lanes>{};
      for (int j = 0; j < width; ++j) {
        const DecayRate<float> one = decay_rate(s.A[(first + j) * s.states + i]);
        rate[i].a[j] = one.a;
        rate[i].high[j] = one.high;
        rate[i].low[j] = one.low;
      }
      largest = lane_max_abs(largest, rate[i].high);
    }
    reach = kExponentReach / largest;
    for (int j = 0; j < width; ++j) {
      if (s.D) d[j] = s.D[first + j];
      if (s.bias) bias[j] = s.bias[first + j];
    }
  }
};

// The steps of a chunk that was read from the end.
template <class V>
QMIR_FN void turn(V* steps, int count) {
  for (int i = 0; i < count / 2; ++i) {
    const V kept = steps[i];
    steps[i] = steps[count - 1 - i];
    steps[count - 1 - i] = kept;
  }
}

// Rows of B or C for one chunk, zero beyond the sequence: one element is then a broadcast load.
template <int N>
struct Projection {
  alignas(64) float row[N][kChunk];

  void load(const float* src, int64_t length, int n, int steps, bool back) {
    for (int i = 0; i < n; ++i) {
      if (steps == kChunk) {
        store(row[i], qmir::load(src + i * length));
      } else {
        store(row[i], lanes{});
        std::memcpy(row[i], src + i * length, steps * sizeof(float));
      }
      if (back) turn(row[i], steps);
    }
  }

  lanes at(int i, int t) const { return broadcast(row[i][t]); }
};

// The hardware does not follow so many rows at once. Into the second level: rows a power of two
// apart would push each other out of the first.
inline void prefetch_rows(const float* src, int64_t stride, int rows) {
  for (int i = 0; i < rows; ++i) __builtin_prefetch(src + i * stride, 0, 2);
}

struct Chunk {
  lanes u[kChunk], dt[kChunk];
  lanes raw[kChunk];  // delta + bias, for the slope of softplus
  bool clamped;

  template <int N>
  void load(const Scan& s, const Block<N>& block, int64_t sample, int64_t start, int steps) {
    const int64_t at = block.local * s.length + s.order.at(block.group, start, steps);
    load_tile(s.u.at(sample, block.group) + at, s.length, block.width, steps, u);
    load_tile(s.delta.at(sample, block.group) + at, s.length, block.width, steps, raw);
    if (s.order.back(block.group)) {
      turn(u, steps);
      turn(raw, steps);
    }
    lanes largest{};
    for (int t = 0; t < kChunk; ++t) {
      raw[t] += block.bias;
      dt[t] = s.softplus ? softplus_lanes(raw[t]) : raw[t];
      largest = lane_max_abs(largest, dt[t]);
    }
    clamped = !all_of(largest < block.reach);
  }

  template <int N>
  void prefetch(const Scan& s, const Block<N>& block, int64_t sample, int64_t start) const {
    if (start >= s.length) return;
    const int64_t steps = std::min<int64_t>(kChunk, s.length - start);
    const int64_t at = block.local * s.length + s.order.at(block.group, start, steps);
    prefetch_rows(s.u.at(sample, block.group) + at, s.length, block.width);
    prefetch_rows(s.delta.at(sample, block.group) + at, s.length, block.width);
  }
};

// What callers give, as pointers to contiguous tensors.
struct Operands {
  const float *u, *delta, *A, *B, *C, *D, *bias;
};

struct Sizes {
  int64_t batch, channels, groups, states, length;
};

inline Scan plain(const Operands& x, const Sizes& z, bool softplus) {
  const int64_t rows = z.channels / z.groups * z.length, states = z.states * z.length;
  const auto planes = [&](const float* p, int64_t group) {
    return Planes<const float>{p, nullptr, z.groups * group, group};
  };
  return {planes(x.u, rows), planes(x.delta, rows), planes(x.B, states), planes(x.C, states),
          x.A, x.D, x.bias, z.batch, z.channels, z.groups, z.states, z.length, softplus,
          Order{z.length, false}};
}

// Images of one call: their sizes, and the memory that their columns take.
struct Images {
  int64_t batch, channels, states, height, width;  // channels of the image, not of all directions
  std::vector<std::unique_ptr<float[]>> kept;

  int64_t length() const { return height * width; }

  float* memory(int64_t count) {
    kept.push_back(scratch<float>(count));
    return kept.back().get();
  }

  // (batch, 4, rows, length), or (batch, rows, length) that all directions share.
  Planes<const float> read(const float* x, int64_t rows, bool shared) {
    const int64_t groups = shared ? 1 : kDirections, group = rows * length();
    float* columns = memory(batch * groups * group);
    transpose_columns(x, columns, batch, groups, rows, height, width);
    return {x, columns, groups * group, shared ? 0 : group};
  }

  // Results of the directions, to be merged or, in column order, to be transposed.
  Planes<float> written(float* rows_at, int64_t rows) {
    const int64_t group = rows * length();
    return {rows_at, memory(batch * kDirections * group), kDirections * group, group};
  }

  Planes<float> parts(int64_t rows) {
    const int64_t group = rows * length();
    float* all = memory(batch * kDirections * group);
    return {all, all, kDirections * group, group};
  }

  void finish(const Planes<float>& result, int64_t rows) const {
    transpose_columns<float>(result.columns, result.rows, batch, kDirections, rows, width, height);
  }

  Scan scan(const Operands& x, bool softplus) {
    return {read(x.u, channels, true), read(x.delta, channels, false), read(x.B, states, false),
            read(x.C, states, false), x.A, x.D, x.bias, batch, kDirections * channels, kDirections,
            states, length(), softplus, Order{length(), true}};
  }
};

}  // namespace qmir
