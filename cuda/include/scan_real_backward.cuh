// Gradients of the selective scan (scan_real.cuh). Every chunk has by now the state at its start
// and the gradient of the state at its end. It goes through its tiles once to keep the state at the
// start of each, then backwards: through a tile to keep the states of its steps, and back through
// them.
//
// Sums over time of a chunk, and over the 32 channels of a block, are partial sums in memory;
// others add them in a fixed order. Nothing depends on the order in which blocks run.
#pragma once
#include "scan_real.cuh"

namespace qmir {

template <class T>
struct RealGradients {
  float* du;           // (batch, groups, per_group, length)
  T* ddelta;           // the same
  float* states;       // (batch, groups, slots, tiles of a chunk, states, per_group)
  float* parameters;   // (batch, groups, slots, states + 2, per_group): dA, dD, d(bias)
  float* projections;  // dB, then dC: (2, batch, groups, blocks of channels, states, length)
};

// v[i] of all lanes summed, in lane i. A tree in a fixed order; v is used up.
template <int kHalf = kWarp / 2>
QMIR_DEVICE float scatter_sum(float (&v)[kWarp], int lane) {
  const bool upper = (lane & kHalf) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float sent = upper ? v[i] : v[i + kHalf];
    const float kept = upper ? v[i + kHalf] : v[i];
    v[i] = kept + __shfl_xor_sync(kAllLanes, sent, kHalf);
  }
  if constexpr (kHalf > 1) return scatter_sum<kHalf / 2>(v, lane);
  return v[0];
}

template <bool kImage, int kStates, int kWarps, int kSteps, class T>
struct RealBackward : RealChunk<kImage, kStates, kWarps, kSteps, T> {
  using Base = RealChunk<kImage, kStates, kWarps, kSteps, T>;
  using Base::block, Base::in, Base::skip, Base::stage;
  using Base::kDt, Base::kGrad, Base::kRaw, Base::kU;
  using typename Base::Block, typename Base::Projection;
  // States go 16 at a time: their dB and dC are the 32 values of scatter_sum.
  static constexpr int kHalf = kWarp / 2;
  static constexpr int kSets = (kStates + kHalf - 1) / kHalf;
  // Four floats more, and one a warp: steps, and warps, lie in different banks.
  static constexpr int kSumPitch = kSets * kWarp + 4;
  static constexpr int kSums = kSteps * kSumPitch + 1;
  static constexpr int kHistory = kSteps * kStates * kWarp;

  const RealGradients<T>& out;
  float *history, *sums;  // of this warp; of the block
  float h[kStates], g[kStates], da[kStates];
  LongSum dd, dbias;

  QMIR_DEVICE RealBackward(const RealScan<T>& in, const RealGradients<T>& out, const Block& block,
                           float* shared)
      : Base(in, block, shared, 2), out(out), dd{0.0f, 0.0f}, dbias{0.0f, 0.0f} {
    float* rest = stage.channels + 4 * kWarps * Base::Stage::Channels::kFloats;
    history = rest + block.warp * kHistory;
    sums = rest + kWarps * kHistory;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      h[n] = this->real() ? in.end[this->carry_at(n)] : 0.0f;
      g[n] = this->real() ? in.reverse[this->carry_at(n)] : 0.0f;
      da[n] = 0.0f;
    }
  }

  // Keeps, or fetches, the state at the start of a tile.
  template <bool kKeep>
  QMIR_DEVICE void at_tile(int tile) {
    if (!this->real()) return;
    const int tiles = (block.walk.steps_at_most + kSteps - 1) / kSteps;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      float* slot = out.states + this->carry_at(tile * kStates + n, tiles * kStates);
      if constexpr (kKeep)
        *slot = h[n];
      else
        h[n] = *slot;
    }
  }

  QMIR_DEVICE float& past(int t, int n) const {
    return history[(t * kStates + n) * kWarp + block.lane];
  }

  template <bool kClamped>
  QMIR_DEVICE void forward(int steps, bool keep) {
#pragma unroll 1
    for (int t = 0; t < steps; ++t) {
      const float dt = stage.at(kDt, block.warp, block.lane, t);
      const float dtu = dt * stage.at(kU, block.warp, block.lane, t);
#pragma unroll
      for (int quad = 0; quad < Projection::kQuads; ++quad) {
        float b[4];
        Projection::load(stage.projection(0), block.warp, t, quad, b);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = 4 * quad + i;
          if (n >= kStates) break;
          if (keep) past(t, n) = h[n];
          scan_step<kClamped>(h[n], dt, this->rate(n), dtu, b[i]);
        }
      }
    }
  }

  // Step t; h is the state after it, and becomes the one before it.
  template <bool kClamped>
  QMIR_DEVICE void reverse_step(int t) {
    const int warp = block.warp, lane = block.lane;
    const float u = stage.at(kU, warp, lane, t), dt = stage.at(kDt, warp, lane, t);
    const float gy = stage.at(kGrad, warp, lane, t), raw = stage.at(kRaw, warp, lane, t);
    const float dtu = dt * u;
    StepGradient<float> part[2] = {};  // of even and odd states
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      float both[kWarp];
#pragma unroll
      for (int quad = 0; quad < kHalf / 4; ++quad) {
        float b[4], c[4];
        const int first = set * kHalf + 4 * quad;
        if (first < kStates) {
          Projection::load(stage.projection(0), warp, t, first / 4, b);
          Projection::load(stage.projection(1), warp, t, first / 4, c);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = first + i, at = 4 * quad + i;
          both[at] = both[at + kHalf] = 0.0f;
          if (n >= kStates) continue;
          const DecayRate<float> rate = this->rate(n);
          const float gn = fmadd(gy, c[i], g[n]);
          both[at] = gn * dtu;
          both[at + kHalf] = gy * h[n];
          h[n] = past(t, n);
          const float decay = exp2_product<kClamped>(dt, rate.high, rate.low);
          g[n] = scan_step_reverse(gn, decay, h[n], dt, rate.a, b[i], part[n % 2], da[n]);
        }
      }
      sums[warp * kSums + t * kSumPitch + set * kWarp + lane] = scatter_sum(both, lane);
    }
    const float gb = part[0].gb + part[1].gb;
    float ddt = fmadd(gb, u, part[0].decay_part + part[1].decay_part);
    if (in.softplus && !(raw > 20.0f)) ddt = ddt * sigmoid_lanes(raw);
    dbias.add(ddt);
    dd.add(gy * u);
    // Over what this step has read.
    stage.at(kU, warp, lane, t) = fmadd(gb, dt, skip * gy);
    stage.at(kRaw, warp, lane, t) = ddt;
  }

  template <bool kClamped>
  QMIR_DEVICE void through(int steps, bool returning) {
    forward<kClamped>(steps, returning);
#pragma unroll 1
    for (int t = returning ? steps - 1 : -1; t >= 0; --t) reverse_step<kClamped>(t);
  }

  QMIR_DEVICE void store(int tile) const {
    float* du = out.du + this->own_plane();
    T* ddelta = out.ddelta + this->own_plane();
    block.template each<kWarp, 4>(tile, [&](int owner, int item, const Place& p) {
      if (item >= block.channels) return;
      du[item * in.size.length + p.at] = stage.at(kU, owner, item, p.t);
      set_real(ddelta + item * in.size.length + p.at, stage.at(kRaw, owner, item, p.t));
    });
    const int64_t blocks = Block::blocks(in.size);
    const int64_t group = block.sample * in.size.groups + block.group;
    const int64_t half = in.size.batch * in.size.groups * blocks * kStates * in.size.length;
    float* db =
        out.projections + (group * blocks + block.channel / kWarp) * kStates * in.size.length;
    block.template each<kStates, 1>(tile, [&](int owner, int n, const Place& p) {
      const float* from = sums + owner * kSums + p.t * kSumPitch + n / kHalf * kWarp + n % kHalf;
      db[n * in.size.length + p.at] = from[0];
      db[half + n * in.size.length + p.at] = from[kHalf];
    });
  }

  QMIR_DEVICE void run() {
    // To the last tile, and back from it.
    const int tiles = block.tiles();
    for (int i = 0; i + 1 < 2 * tiles; ++i) {
      const bool returning = i + 1 >= tiles;
      const int tile = returning ? 2 * tiles - 2 - i : i;
      if (!returning)
        at_tile<true>(tile);
      else if (tile + 1 < tiles)
        at_tile<false>(tile);
      this->load_channels(tile, in.u + this->shared_plane(), kU);
      this->load_channels(tile, in.delta + this->own_plane(), kDt);
      this->load_projection(tile, in.b, 0);
      if (returning) {
        this->load_channels(tile, in.grad + this->shared_plane(), kGrad);
        this->load_projection(tile, in.c, 1);
      }
      block.sync();
      const int steps = block.steps_in(block.own, tile);
      if (this->template make_time_steps<true>(steps))
        through<true>(steps, returning);
      else
        through<false>(steps, returning);
      block.sync();
      if (returning) {
        store(tile);
        block.sync();
      }
    }
    if (!this->real()) return;
#pragma unroll
    for (int n = 0; n < kStates; ++n) out.parameters[this->carry_at(n, kStates + 2)] = da[n];
    out.parameters[this->carry_at(kStates, kStates + 2)] = dd.total();
    out.parameters[this->carry_at(kStates + 1, kStates + 2)] = dbias.total();
  }
};

template <bool kImage, int kStates, int kWarps, int kSteps, class T>
QMIR_DEVICE void scan_real_backward(const RealScan<T>& in, const RealGradients<T>& out) {
  QMIR_DYNAMIC_SHARED(float, shared);
  const ScanBlock<kImage, kWarps, kSteps> block(in.size);
  if (block.idle()) return;
  RealBackward<kImage, kStates, kWarps, kSteps, T> chunk(in, out, block, shared);
  chunk.run();
}

// dB and dC: the blocks' sums over their channels, added in order. A thread is one element of both.
template <class T>
QMIR_DEVICE void sum_projections(const float* parts, T* db, T* dc, int64_t groups, int64_t blocks,
                                 int64_t plane) {
  const int64_t stride = (int64_t)gridDim.x * blockDim.x;
  const int64_t half = groups * blocks * plane;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < groups * plane;
       i += stride) {
    const float* p = parts + i / plane * blocks * plane + i % plane;
    float b = 0.0f, c = 0.0f;
    for (int64_t k = 0; k < blocks; ++k) {
      b = b + p[k * plane];
      c = c + p[half + k * plane];
    }
    set_real(db + i, b);
    set_real(dc + i, c);
  }
}

// dA, dD and d(bias): the chunks' sums over their steps, added in order, in float64. A thread is
// one of states + 2 values of a channel.
template <bool kImage>
QMIR_DEVICE void sum_parameters(const ScanSize& size, int states, const float* parts, float* da,
                                float* dd, float* dbias) {
  const int64_t thread = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t stride = (states + 2) * size.per_group;
  const int64_t group = thread / stride, row = thread % stride / size.per_group;
  if (group >= size.groups) return;
  const int64_t channel = group * size.per_group + thread % size.per_group;
  const int64_t chunks = Walk<kImage>(size, group).chunks();
  double sum = 0.0;
  for (int64_t sample = 0; sample < size.batch; ++sample) {
    const float* p = parts + (sample * size.groups + group) * size.slots * stride + thread % stride;
    for (int64_t k = 0; k < chunks; ++k) sum = sum + (double)p[k * stride];
  }
  if (row < states)
    da[channel * states + row] = (float)sum;
  else if (row == states && dd)
    dd[channel] = (float)sum;
  else if (row == states + 1 && dbias)
    dbias[channel] = (float)sum;
}

}  // namespace qmir
