// Selective scan, forward and backward, 16 channels of one group in lanes.
//
// Shapes as in qmir_ao/ops/selective_scan.py: u, delta, y (B, E, L), A (E, N), B, C (B, K, N, L).
// The scan of an image in four directions (ops/ss2d_scan.py) is the same with K = 4 and u shared;
// only where a group's steps lie in memory differs (directions.h).
// All loops run in chunks of 16 time steps, transposed into lanes. Sums over channels are made
// per block of 16 channels in block order, so results do not depend on the number of threads.
#include <algorithm>
#include <memory>
#include <vector>

#include "simd.h"

#include "directions.h"
#include "selective_scan.cuh"

namespace {

using namespace qmir;

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

// What one block of 16 channels needs besides its sequences.
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
void prefetch_rows(const float* src, int64_t stride, int rows) {
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

// N is the compile-time bound on the states; n the true number (equal for the common sizes, which
// lets the compiler keep the whole state in registers).
template <int N, bool kExact>
struct Forward {
  const Scan& s;
  const int64_t sample;
  const int n;
  const Block<N> block;
  lanes h[N] = {};
  Projection<N> b, c;
  Chunk chunk;
  lanes out[kChunk] = {};

  Forward(const Scan& scan, int64_t sample, int64_t group, int64_t index)
      : s(scan), sample(sample), n(kExact ? N : (int)scan.states),
        block(scan, group, index, n) {}

  template <bool kClamped>
  void advance(int steps) {
    lanes state[N];
    std::memcpy(state, h, sizeof h);
    for (int t = 0; t < steps; ++t) {
      const lanes dtu = chunk.dt[t] * chunk.u[t];
      lanes sum[2] = {};  // of even and odd states: half the roundings in a row
QMIR_UNROLL
      for (int i = 0; i < n; ++i) {
        scan_step<kClamped>(state[i], chunk.dt[t], block.rate[i], dtu, b.at(i, t));
        sum[i % 2] = fmadd(c.at(i, t), state[i], sum[i % 2]);
      }
      out[t] = fmadd(block.d, chunk.u[t], sum[0] + sum[1]);
    }
    std::memcpy(h, state, sizeof h);
  }

  void run(const Planes<float>& y) {
    const int64_t group = block.group;
    const bool back = s.order.back(group);
    for (int64_t k = 0; k < s.chunks(); ++k) {
      const int64_t start = k * kChunk;
      const int steps = s.steps(k);
      chunk.load(s, block, sample, start, steps);
      chunk.prefetch(s, block, sample, start + kChunk);
      const int64_t at = s.order.at(group, start, steps);
      b.load(s.B.at(sample, group) + at, s.length, n, steps, back);
      c.load(s.C.at(sample, group) + at, s.length, n, steps, back);
      if (chunk.clamped)
        advance<true>(steps);
      else
        advance<false>(steps);
      if (back) turn(out, steps);
      store_tile(y.at(sample, group) + block.local * s.length + at, s.length, block.width, steps,
                 out);
    }
  }
};

template <int N, bool kExact>
void forward(const Scan& s, const Planes<float>& y) {
  const int64_t per_sample = s.groups * s.blocks();
#pragma omp parallel for schedule(dynamic)
  for (int64_t job = 0; job < s.batch * per_sample; ++job) {
    const int64_t group = job % per_sample / s.blocks();
    Forward<N, kExact> work(s, job / per_sample, group, job % s.blocks());
    work.run(y);
  }
}

struct Gradients {
  Planes<const float> grad;
  Planes<float> du, ddelta, dB, dC;
  float *dA, *dD, *dbias;
};

// Gradients of A, D and the bias are sums over the whole sequence: in double, since one after the
// other in float32 they lose a unit per sqrt(length).
struct WideLanes {
  double at[kLanes];

  void add(lanes x) {
    for (int j = 0; j < kLanes; ++j) at[j] += (double)x[j];
  }

  void add_product(lanes x, lanes y) {
    for (int j = 0; j < kLanes; ++j) at[j] += (double)x[j] * (double)y[j];
  }
};

// Sums of one sample over time, (E, N) and (E,).
struct ParameterSums {
  std::vector<double> dA, dD, dbias;
};

// State of one block that outlives a chunk of the backward pass.
template <int N>
struct Carry {
  lanes g[N];
  WideLanes da[N], dd, dbias;
};

template <int N, bool kExact>
struct Backward {
  const Scan& s;
  const Gradients& out;
  const int64_t sample, group;
  const int n;
  std::vector<Block<N>> blocks;
  std::vector<Carry<N>> carries;
  std::vector<lanes> checkpoints;  // state before each chunk, of each block
  Projection<N> b, c;
  Chunk chunk;
  lanes db[kChunk * N], dc[kChunk * N];  // summed over blocks, not yet over lanes
  lanes h[(kChunk + 1) * N], decay[kChunk * N];

  Backward(const Scan& scan, const Gradients& gradients, int64_t sample, int64_t group)
      : s(scan), out(gradients), sample(sample), group(group), n(kExact ? N : (int)scan.states),
        carries(scan.blocks()), checkpoints(scan.chunks() * scan.blocks() * n) {
    for (int64_t j = 0; j < s.blocks(); ++j) {
      blocks.emplace_back(s, group, j, n);
      std::memset(&carries[j], 0, sizeof(Carry<N>));
    }
  }

  lanes* checkpoint(int64_t k, int64_t j) { return &checkpoints[(k * s.blocks() + j) * n]; }

  void load_projections(int64_t k) {
    const int64_t at = s.order.at(group, k * kChunk, s.steps(k));
    const bool back = s.order.back(group);
    b.load(s.B.at(sample, group) + at, s.length, n, s.steps(k), back);
    c.load(s.C.at(sample, group) + at, s.length, n, s.steps(k), back);
  }

  template <bool kClamped>
  void advance(const Block<N>& block, const lanes* from, lanes* to) {
    lanes state[N];
    for (int i = 0; i < n; ++i) state[i] = from[i];
    for (int t = 0; t < kChunk; ++t) {
      const lanes dtu = chunk.dt[t] * chunk.u[t];
QMIR_UNROLL
      for (int i = 0; i < n; ++i)
        scan_step<kClamped>(state[i], chunk.dt[t], block.rate[i], dtu, b.at(i, t));
    }
    for (int i = 0; i < n; ++i) to[i] = state[i];
  }

  void store_checkpoints() {
    for (int64_t j = 0; j < s.blocks(); ++j)
      for (int i = 0; i < n; ++i) checkpoint(0, j)[i] = lanes{};
    for (int64_t k = 0; k + 1 < s.chunks(); ++k) {
      load_projections(k);
      for (int64_t j = 0; j < s.blocks(); ++j) {
        chunk.load(s, blocks[j], sample, k * kChunk, kChunk);
        chunk.prefetch(s, blocks[j], sample, (k + 1) * kChunk);
        if (chunk.clamped)
          advance<true>(blocks[j], checkpoint(k, j), checkpoint(k + 1, j));
        else
          advance<false>(blocks[j], checkpoint(k, j), checkpoint(k + 1, j));
      }
    }
  }

  template <bool kClamped>
  void recompute(const Block<N>& block, const lanes* from, int steps) {
    for (int i = 0; i < n; ++i) h[i] = from[i];
    for (int t = 0; t < steps; ++t) {
      const lanes dtu = chunk.dt[t] * chunk.u[t];
QMIR_UNROLL
      for (int i = 0; i < n; ++i) {
        lanes state = h[t * N + i];
        decay[t * N + i] =
            scan_step<kClamped>(state, chunk.dt[t], block.rate[i], dtu, b.at(i, t));
        h[(t + 1) * N + i] = state;
      }
    }
  }

  void reverse(int64_t k, int64_t j, int steps) {
    const Block<N>& block = blocks[j];
    Carry<N>& carry = carries[j];
    const int64_t at = block.local * s.length + s.order.at(group, k * kChunk, steps);
    const bool back = s.order.back(group);
    lanes gy[kChunk], du[kChunk] = {}, ddelta[kChunk] = {}, g[N] = {}, da[N] = {};
    load_tile(out.grad.at(sample, group) + at, s.length, block.width, steps, gy);
    if (back) turn(gy, steps);
    for (int i = 0; i < n; ++i) g[i] = carry.g[i];
    for (int t = steps - 1; t >= 0; --t) {
      const lanes dt = chunk.dt[t], u = chunk.u[t], dtu = dt * u;
      StepGradient<lanes> part[2] = {};  // of even and odd states
QMIR_UNROLL
      for (int i = 0; i < n; ++i) {
        const int ti = t * N + i;
        const lanes gi = fmadd(gy[t], c.at(i, t), g[i]);
        dc[ti] = fmadd(gy[t], h[ti + N], dc[ti]);
        db[ti] = fmadd(gi, dtu, db[ti]);
        g[i] = scan_step_reverse(gi, decay[ti], h[ti], dt, block.rate[i].a, b.at(i, t), part[i % 2],
                                 da[i]);
      }
      const lanes gb = part[0].gb + part[1].gb;
      du[t] = fmadd(gb, dt, block.d * gy[t]);
      lanes ddt = fmadd(gb, u, part[0].decay_part + part[1].decay_part);
      if (s.softplus) ddt *= chunk.raw[t] > 20.0f ? lanes{} + 1.0f : sigmoid_lanes(chunk.raw[t]);
      ddelta[t] = ddt;
    }
    for (int i = 0; i < n; ++i) {
      carry.g[i] = g[i];
      carry.da[i].add(da[i]);
    }
    for (int t = 0; t < steps; ++t) {
      carry.dbias.add(ddelta[t]);
      carry.dd.add_product(gy[t], chunk.u[t]);
    }
    if (back) {
      turn(du, steps);
      turn(ddelta, steps);
    }
    store_tile(out.du.at(sample, group) + at, s.length, block.width, steps, du);
    store_tile(out.ddelta.at(sample, group) + at, s.length, block.width, steps, ddelta);
  }

  void store_projection(const lanes* sums, const Planes<float>& dst, int64_t k, int steps) {
    float* to = dst.at(sample, group) + s.order.at(group, k * kChunk, steps);
    const bool back = s.order.back(group);
    for (int i = 0; i < n; ++i)
      for (int t = 0; t < steps; ++t)
        to[i * s.length + (back ? steps - 1 - t : t)] = reduce_add(sums[t * N + i]);
  }

  void store_parameters(ParameterSums& sums) {
    for (int64_t j = 0; j < s.blocks(); ++j) {
      for (int lane = 0; lane < blocks[j].width; ++lane) {
        const int64_t channel = sample * s.channels + blocks[j].first + lane;
        for (int i = 0; i < n; ++i) sums.dA[channel * n + i] = carries[j].da[i].at[lane];
        sums.dD[channel] = carries[j].dd.at[lane];
        sums.dbias[channel] = carries[j].dbias.at[lane];
      }
    }
  }

  void run(ParameterSums& sums) {
    store_checkpoints();
    for (int64_t k = s.chunks() - 1; k >= 0; --k) {
      const int steps = s.steps(k);
      load_projections(k);
      std::memset(db, 0, sizeof db);
      std::memset(dc, 0, sizeof dc);
      for (int64_t j = 0; j < s.blocks(); ++j) {
        chunk.load(s, blocks[j], sample, k * kChunk, steps);
        if (chunk.clamped)
          recompute<true>(blocks[j], checkpoint(k, j), steps);
        else
          recompute<false>(blocks[j], checkpoint(k, j), steps);
        reverse(k, j, steps);
      }
      store_projection(db, out.dB, k, steps);
      store_projection(dc, out.dC, k, steps);
    }
    store_parameters(sums);
  }
};

// The samples' sums, added in order.
void add_samples(const std::vector<double>& rows, int64_t batch, float* out) {
  const int64_t width = rows.size() / batch;
  for (int64_t i = 0; i < width; ++i) {
    double total = 0.0;
    for (int64_t sample = 0; sample < batch; ++sample) total += rows[sample * width + i];
    out[i] = (float)total;
  }
}

template <int N, bool kExact>
void backward(const Scan& s, const Gradients& gradients) {
  const int64_t rows = s.batch * s.channels;
  ParameterSums sums{std::vector<double>(rows * s.states), std::vector<double>(rows),
                     std::vector<double>(rows)};
#pragma omp parallel for schedule(dynamic)
  for (int64_t job = 0; job < s.batch * s.groups; ++job) {
    // On the heap: it is larger than a thread's stack likes.
    const auto work = std::make_unique<Backward<N, kExact>>(s, gradients, job / s.groups,
                                                            job % s.groups);
    work->run(sums);
  }
  add_samples(sums.dA, s.batch, gradients.dA);
  if (s.D) add_samples(sums.dD, s.batch, gradients.dD);
  if (s.bias) add_samples(sums.dbias, s.batch, gradients.dbias);
}

}  // namespace

// Without 512-bit registers the state does not stay in registers anyway, and compiling one copy per
// size takes minutes.
#if defined(__AVX512F__)
#define QMIR_DISPATCH_STATES(call, ...)              \
  switch (s.states) {                                \
    case 1: call<1, true>(__VA_ARGS__); break;       \
    case 4: call<4, true>(__VA_ARGS__); break;       \
    case 8: call<8, true>(__VA_ARGS__); break;       \
    case 10: call<10, true>(__VA_ARGS__); break;     \
    case 16: call<16, true>(__VA_ARGS__); break;     \
    default: call<kMaxStates, false>(__VA_ARGS__);   \
  }
#else
#define QMIR_DISPATCH_STATES(call, ...) call<kMaxStates, false>(__VA_ARGS__);
#endif

namespace {

// What callers give, as pointers to contiguous tensors.
struct Operands {
  const float *u, *delta, *A, *B, *C, *D, *bias;
};

struct Sizes {
  int64_t batch, channels, groups, states, length;
};

Scan plain(const Operands& x, const Sizes& z, bool softplus) {
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

}  // namespace

extern "C" {

int qmir_selective_scan_max_states() { return kMaxStates; }

void qmir_selective_scan(const float* u, const float* delta, const float* A, const float* B,
                         const float* C, const float* D, const float* bias, int softplus,
                         int64_t batch, int64_t channels, int64_t groups, int64_t states,
                         int64_t length, float* y) {
  const Scan s = plain({u, delta, A, B, C, D, bias}, {batch, channels, groups, states, length},
                       softplus != 0);
  const Planes<float> out{y, nullptr, s.u.sample_stride, s.u.group_stride};
  QMIR_DISPATCH_STATES(forward, s, out)
}

void qmir_selective_scan_backward(const float* grad, const float* u, const float* delta,
                                  const float* A, const float* B, const float* C, const float* D,
                                  const float* bias, int softplus, int64_t batch, int64_t channels,
                                  int64_t groups, int64_t states, int64_t length, float* du,
                                  float* ddelta, float* dA, float* dB, float* dC, float* dD,
                                  float* dbias) {
  const Scan s = plain({u, delta, A, B, C, D, bias}, {batch, channels, groups, states, length},
                       softplus != 0);
  const auto like = [](auto& x, auto* p) {
    return Planes<std::remove_pointer_t<decltype(p)>>{p, nullptr, x.sample_stride, x.group_stride};
  };
  const Gradients gradients{like(s.u, grad), like(s.u, du), like(s.u, ddelta), like(s.B, dB),
                            like(s.C, dC), dA, dD, dbias};
  QMIR_DISPATCH_STATES(backward, s, gradients)
}

// u, y (batch, channels, height, width), delta (batch, 4 * channels, ..), B, C
// (batch, 4, states, ..), A (4 * channels, states), D, bias (4 * channels).
void qmir_ss2d_scan(const float* u, const float* delta, const float* A, const float* B,
                    const float* C, const float* D, const float* bias, int softplus, int64_t batch,
                    int64_t channels, int64_t states, int64_t height, int64_t width, float* y) {
  Images images{batch, channels, states, height, width, {}};
  const Scan s = images.scan({u, delta, A, B, C, D, bias}, softplus != 0);
  const Planes<float> parts = images.parts(channels);
  QMIR_DISPATCH_STATES(forward, s, parts)
  merge_directions(parts.rows, y, batch, channels, height, width);
}

void qmir_ss2d_scan_backward(const float* grad, const float* u, const float* delta, const float* A,
                             const float* B, const float* C, const float* D, const float* bias,
                             int softplus, int64_t batch, int64_t channels, int64_t states,
                             int64_t height, int64_t width, float* du, float* ddelta, float* dA,
                             float* dB, float* dC, float* dD, float* dbias) {
  Images images{batch, channels, states, height, width, {}};
  const Scan s = images.scan({u, delta, A, B, C, D, bias}, softplus != 0);
  const Gradients gradients{images.read(grad, channels, true), images.parts(channels),
                            images.written(ddelta, channels), images.written(dB, states),
                            images.written(dC, states), dA, dD, dbias};
  QMIR_DISPATCH_STATES(backward, s, gradients)
  merge_directions(gradients.du.rows, du, batch, channels, height, width);
  images.finish(gradients.ddelta, channels);
  images.finish(gradients.dB, states);
  images.finish(gradients.dC, states);
}
}
