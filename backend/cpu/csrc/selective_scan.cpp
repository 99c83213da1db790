// Selective scan, forward and backward, 16 channels of one group in lanes.
//
// Shapes as in qmir_ao/ops/selective_scan.py: u, delta, y (B, E, L), A (E, N), B, C (B, K, N, L).
// All loops run in chunks of 16 time steps, transposed into lanes. Sums over channels are made
// per block of 16 channels in block order, so results do not depend on the number of threads.
#include <algorithm>
#include <memory>
#include <vector>

#include "simd.h"

#include "selective_scan.cuh"

namespace {

using namespace qmir;

constexpr int kChunk = kLanes;
constexpr int kMaxStates = 64;

struct Scan {
  const float *u, *delta, *A, *B, *C, *D, *bias;
  int64_t batch, channels, groups, states, length;
  bool softplus;

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
  int64_t first;  // channel index of lane 0, counted over all groups
  int width;

  Block(const Scan& s, int64_t group, int64_t block, int n)
      : d{}, bias{}, first(group * s.per_group() + block * kLanes), width(s.width(block)) {
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

// Rows of B or C for one chunk, zero beyond the sequence: one element is then a broadcast load.
template <int N>
struct Projection {
  alignas(64) float row[N][kChunk];

  void load(const float* src, int64_t length, int n, int steps) {
    for (int i = 0; i < n; ++i) {
      if (steps == kChunk) {
        store(row[i], qmir::load(src + i * length));
      } else {
        store(row[i], lanes{});
        std::memcpy(row[i], src + i * length, steps * sizeof(float));
      }
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
    const int64_t at = (sample * s.channels + block.first) * s.length + start;
    load_tile(s.u + at, s.length, block.width, steps, u);
    load_tile(s.delta + at, s.length, block.width, steps, raw);
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
    const int64_t at = (sample * s.channels + block.first) * s.length + start;
    prefetch_rows(s.u + at, s.length, block.width);
    prefetch_rows(s.delta + at, s.length, block.width);
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

  void run(int64_t group, float* y) {
    const int64_t projection = (sample * s.groups + group) * n * s.length;
    for (int64_t k = 0; k < s.chunks(); ++k) {
      const int64_t start = k * kChunk;
      const int steps = s.steps(k);
      chunk.load(s, block, sample, start, steps);
      chunk.prefetch(s, block, sample, start + kChunk);
      b.load(s.B + projection + start, s.length, n, steps);
      c.load(s.C + projection + start, s.length, n, steps);
      if (chunk.clamped)
        advance<true>(steps);
      else
        advance<false>(steps);
      store_tile(y + (sample * s.channels + block.first) * s.length + start, s.length, block.width,
                 steps, out);
    }
  }
};

template <int N, bool kExact>
void forward(const Scan& s, float* y) {
  const int64_t per_sample = s.groups * s.blocks();
#pragma omp parallel for schedule(dynamic)
  for (int64_t job = 0; job < s.batch * per_sample; ++job) {
    const int64_t group = job % per_sample / s.blocks();
    Forward<N, kExact> work(s, job / per_sample, group, job % s.blocks());
    work.run(group, y);
  }
}

struct Gradients {
  const float* grad;
  float *du, *ddelta, *dA, *dB, *dC, *dD, *dbias;
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
    const int64_t at = (sample * s.groups + group) * n * s.length + k * kChunk;
    b.load(s.B + at, s.length, n, s.steps(k));
    c.load(s.C + at, s.length, n, s.steps(k));
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
    const int64_t at = (sample * s.channels + block.first) * s.length + k * kChunk;
    lanes gy[kChunk], du[kChunk] = {}, ddelta[kChunk] = {}, g[N] = {}, da[N] = {};
    load_tile(out.grad + at, s.length, block.width, steps, gy);
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
    store_tile(out.du + at, s.length, block.width, steps, du);
    store_tile(out.ddelta + at, s.length, block.width, steps, ddelta);
  }

  void store_projection(const lanes* sums, float* dst, int64_t k, int steps) {
    const int64_t at = (sample * s.groups + group) * n * s.length + k * kChunk;
    for (int i = 0; i < n; ++i)
      for (int t = 0; t < steps; ++t) dst[at + i * s.length + t] = reduce_add(sums[t * N + i]);
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

extern "C" {

int qmir_selective_scan_max_states() { return kMaxStates; }

void qmir_selective_scan(const float* u, const float* delta, const float* A, const float* B,
                         const float* C, const float* D, const float* bias, int softplus,
                         int64_t batch, int64_t channels, int64_t groups, int64_t states,
                         int64_t length, float* y) {
  const Scan s{u, delta, A, B, C, D, bias, batch, channels, groups, states, length, softplus != 0};
  QMIR_DISPATCH_STATES(forward, s, y)
}

void qmir_selective_scan_backward(const float* grad, const float* u, const float* delta,
                                  const float* A, const float* B, const float* C, const float* D,
                                  const float* bias, int softplus, int64_t batch, int64_t channels,
                                  int64_t groups, int64_t states, int64_t length, float* du,
                                  float* ddelta, float* dA, float* dB, float* dC, float* dD,
                                  float* dbias) {
  const Scan s{u, delta, A, B, C, D, bias, batch, channels, groups, states, length, softplus != 0};
  const Gradients gradients{grad, du, ddelta, dA, dB, dC, dD, dbias};
  QMIR_DISPATCH_STATES(backward, s, gradients)
}
}
