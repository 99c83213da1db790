// Selective scan forward, of sequences and of images in four directions. See scan_blocks.h.
#include "scan_blocks.h"

namespace {

using namespace qmir;

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
}
