// Selective scan, forward and backward, 16 channels of one group in lanes.
//
// Shapes as in qmir_ao/ops/selective_scan.py: u, delta, y (B, E, L), A (E, N), B, C (B, K, N, L).
// All loops run in chunks of 16 time steps, transposed into lanes. Sums over channels are made
// per block of 16 channels in block order, so results do not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "simd.h"

#include "selective_scan.cuh"

namespace {

using namespace qmir;

#if defined(__AVX512F__)
#define QMIR_UNROLL _Pragma("GCC unroll 16")
#else
#define QMIR_UNROLL
#endif

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
  lanes a[N], d, bias;
  int64_t first;  // channel index of lane 0, counted over all groups
  int width;

  Block(const Scan& s, int64_t group, int64_t block, int n)
      : d{}, bias{}, first(group * s.per_group() + block * kLanes), width(s.width(block)) {
    for (int i = 0; i < n; ++i) a[i] = lanes{};
    for (int j = 0; j < width; ++j) {
      for (int i = 0; i < n; ++i) a[i][j] = s.A[(first + j) * s.states + i];
      if (s.D) d[j] = s.D[first + j];
      if (s.bias) bias[j] = s.bias[first + j];
    }
  }
};

// Columns of B or C for one chunk: out[t * N + i], zero beyond the sequence.
template <int N>
void load_projection(const float* src, int64_t length, int n, int steps, float* out) {
  for (int base = 0; base < n; base += kLanes) {
    const int rows = std::min(kLanes, n - base);
    lanes tile[kLanes];
    load_tile(src + base * length, length, rows, steps, tile);
    for (int t = 0; t < kChunk; ++t)
      for (int i = 0; i < rows; ++i) out[t * N + base + i] = tile[t][i];
  }
}

template <int N>
struct Chunk {
  lanes u[kChunk], raw[kChunk], dt[kChunk];

  void load(const Scan& s, const Block<N>& block, int64_t sample, int64_t start, int steps) {
    const int64_t at = (sample * s.channels + block.first) * s.length + start;
    load_tile(s.u + at, s.length, block.width, steps, u);
    load_tile(s.delta + at, s.length, block.width, steps, raw);
    for (int t = 0; t < kChunk; ++t) {
      raw[t] += block.bias;
      dt[t] = s.softplus ? softplus_lanes(raw[t]) : raw[t];
    }
  }
};

// N is the compile-time bound on the states; n the true number (equal for the common sizes, which
// lets the compiler keep the whole state in registers).
template <int N, bool kExact>
void forward_block(const Scan& s, int64_t sample, int64_t group, int64_t index, float* y) {
  const int n = kExact ? N : (int)s.states;
  const Block<N> block(s, group, index, n);
  const int64_t projection = (sample * s.groups + group) * n * s.length;
  lanes h[N];
  for (int i = 0; i < n; ++i) h[i] = lanes{};
  alignas(64) float b[kChunk * N], c[kChunk * N];
  Chunk<N> chunk;
  for (int64_t k = 0; k < s.chunks(); ++k) {
    const int64_t start = k * kChunk;
    const int steps = s.steps(k);
    chunk.load(s, block, sample, start, steps);
    load_projection<N>(s.B + projection + start, s.length, n, steps, b);
    load_projection<N>(s.C + projection + start, s.length, n, steps, c);
    lanes out[kChunk];
    for (int t = 0; t < steps; ++t) {
      const lanes dtu = chunk.dt[t] * chunk.u[t];
      lanes sum = block.d * chunk.u[t];
QMIR_UNROLL
      for (int i = 0; i < n; ++i) {
        scan_step(h[i], chunk.dt[t], block.a[i], dtu, broadcast(b[t * N + i]));
        sum = fmadd(broadcast(c[t * N + i]), h[i], sum);
      }
      out[t] = sum;
    }
    for (int t = steps; t < kChunk; ++t) out[t] = lanes{};
    store_tile(y + (sample * s.channels + block.first) * s.length + start, s.length, block.width,
               steps, out);
  }
}

template <int N, bool kExact>
void forward(const Scan& s, float* y) {
  const int64_t per_sample = s.groups * s.blocks();
#pragma omp parallel for schedule(dynamic)
  for (int64_t job = 0; job < s.batch * per_sample; ++job) {
    const int64_t rest = job % per_sample;
    forward_block<N, kExact>(s, job / per_sample, rest / s.blocks(), rest % s.blocks(), y);
  }
}

struct Gradients {
  const float* grad;
  float *du, *ddelta, *dB, *dC;
  float *dA, *dD, *dbias;  // one row per sample; the caller sums them in order
};

// State of one block that outlives a chunk of the backward pass.
template <int N>
struct Carry {
  lanes g[N], da[N], dd, dbias;
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
  alignas(64) float b[kChunk * N], c[kChunk * N];
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
    load_projection<N>(s.B + at, s.length, n, s.steps(k), b);
    load_projection<N>(s.C + at, s.length, n, s.steps(k), c);
  }

  void store_checkpoints() {
    Chunk<N> chunk;
    for (int64_t k = 0; k + 1 < s.chunks(); ++k) {
      load_projections(k);
      for (int64_t j = 0; j < s.blocks(); ++j) {
        chunk.load(s, blocks[j], sample, k * kChunk, kChunk);
        lanes state[N];
        for (int i = 0; i < n; ++i) state[i] = k ? checkpoint(k, j)[i] : lanes{};
        for (int t = 0; t < kChunk; ++t) {
          const lanes dtu = chunk.dt[t] * chunk.u[t];
QMIR_UNROLL
          for (int i = 0; i < n; ++i)
            scan_step(state[i], chunk.dt[t], blocks[j].a[i], dtu, broadcast(b[t * N + i]));
        }
        for (int i = 0; i < n; ++i) checkpoint(k + 1, j)[i] = state[i];
      }
    }
  }

  void recompute(const Chunk<N>& chunk, int64_t k, int64_t j, int steps) {
    for (int i = 0; i < n; ++i) h[i] = k ? checkpoint(k, j)[i] : lanes{};
    for (int t = 0; t < steps; ++t) {
      const lanes dtu = chunk.dt[t] * chunk.u[t];
QMIR_UNROLL
      for (int i = 0; i < n; ++i) {
        lanes state = h[t * N + i];
        decay[t * N + i] =
            scan_step(state, chunk.dt[t], blocks[j].a[i], dtu, broadcast(b[t * N + i]));
        h[(t + 1) * N + i] = state;
      }
    }
  }

  void reverse(const Chunk<N>& chunk, int64_t k, int64_t j, int steps) {
    const Block<N>& block = blocks[j];
    Carry<N>& carry = carries[j];
    const int64_t at = (sample * s.channels + block.first) * s.length + k * kChunk;
    lanes gy[kChunk], du[kChunk] = {}, ddelta[kChunk] = {};
    load_tile(out.grad + at, s.length, block.width, steps, gy);
    for (int t = steps - 1; t >= 0; --t) {
      const lanes dt = chunk.dt[t], u = chunk.u[t], dtu = dt * u;
      lanes ddt{}, gb{};
QMIR_UNROLL
      for (int i = 0; i < n; ++i) {
        const int ti = t * N + i;
        const lanes g = fmadd(gy[t], broadcast(c[ti]), carry.g[i]);
        dc[ti] = fmadd(gy[t], h[ti + N], dc[ti]);
        db[ti] = fmadd(g, dtu, db[ti]);
        carry.g[i] = scan_step_reverse(g, decay[ti], h[ti], dt, block.a[i], u, broadcast(b[ti]),
                                       ddt, gb, carry.da[i]);
      }
      du[t] = fmadd(gb, dt, block.d * gy[t]);
      if (s.softplus) ddt = ddt * (chunk.raw[t] > 20.0f ? lanes{} + 1.0f : sigmoid_lanes(chunk.raw[t]));
      ddelta[t] = ddt;
      carry.dbias += ddt;
      carry.dd = fmadd(gy[t], u, carry.dd);
    }
    store_tile(out.du + at, s.length, block.width, steps, du);
    store_tile(out.ddelta + at, s.length, block.width, steps, ddelta);
  }

  void store_projection(const lanes* sums, float* dst, int64_t k, int steps) {
    const int64_t at = (sample * s.groups + group) * n * s.length + k * kChunk;
    for (int i = 0; i < n; ++i)
      for (int t = 0; t < steps; ++t) dst[at + i * s.length + t] = reduce_add(sums[t * N + i]);
  }

  void store_parameters() {
    for (int64_t j = 0; j < s.blocks(); ++j) {
      const int64_t row = sample * s.channels + blocks[j].first;
      for (int lane = 0; lane < blocks[j].width; ++lane) {
        for (int i = 0; i < n; ++i) out.dA[(row + lane) * n + i] = carries[j].da[i][lane];
        out.dD[row + lane] = carries[j].dd[lane];
        out.dbias[row + lane] = carries[j].dbias[lane];
      }
    }
  }

  void run() {
    store_checkpoints();
    Chunk<N> chunk;
    for (int64_t k = s.chunks() - 1; k >= 0; --k) {
      const int steps = s.steps(k);
      load_projections(k);
      std::memset(db, 0, sizeof db);
      std::memset(dc, 0, sizeof dc);
      for (int64_t j = 0; j < s.blocks(); ++j) {
        chunk.load(s, blocks[j], sample, k * kChunk, steps);
        recompute(chunk, k, j, steps);
        reverse(chunk, k, j, steps);
      }
      store_projection(db, out.dB, k, steps);
      store_projection(dc, out.dC, k, steps);
    }
    store_parameters();
  }
};

template <int N, bool kExact>
void backward(const Scan& s, const Gradients& gradients) {
#pragma omp parallel for schedule(dynamic)
  for (int64_t job = 0; job < s.batch * s.groups; ++job) {
    std::vector<Backward<N, kExact>> work;  // on the heap: it is larger than a thread's stack likes
    work.reserve(1);
    work.emplace_back(s, gradients, job / s.groups, job % s.groups);
    work[0].run();
  }
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
  const Gradients gradients{grad, du, ddelta, dB, dC, dA, dD, dbias};
  QMIR_DISPATCH_STATES(backward, s, gradients)
}
}
