// Selective scan backward, of sequences and of images in four directions. See scan_blocks.h.
//
// Sums over channels are made per block of kLanes channels in block order, and sums over samples in
// their order, so results do not depend on the number of threads.
#include <memory>
#include <type_traits>
#include <vector>

#include "scan_blocks.h"

namespace {

using namespace qmir;

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

extern "C" {

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
