// Selective scan of float32 or bf16 operands in chunks, for sequences and images (scan_walk.cuh).
// A, D and the bias are float32. The recurrence runs in float32 with the steps of
// selective_scan.cuh. A lane is a channel. A state that crosses a chunk is multiplied by the
// product of its decays, which rounds once a step where the recurrence rounds twice.
#pragma once
#include "scan_merge.cuh"
#include "scan_walk.cuh"
#include "selective_scan.cuh"

namespace qmir {

template <class T>
struct RealScan {
  ScanSize size;
  const T *u, *delta, *b, *c;
  const float *a, *d, *bias;  // d and bias may be null
  const T* grad;              // of y; null in the forward pass
  bool softplus;
  // (batch, groups, slots, states, per_group); null in a forward pass of one chunk. State at the
  // end, later at the start, of a chunk; product of its decays; the gradient of the state that it
  // passes back to its start, later the one that it gets at its end.
  float *end, *decay, *reverse;
};

// Of how many states the rates stay in registers; with more they lie in shared memory.
constexpr int kRealRegisterStates = 16;

// Shared memory of a block: rates of its channels, then tiles of each warp. `channels` of those
// hold floats of 32 channels, `projections` hold B or C.
template <int kStates, int kWarps, int kSteps>
struct RealStage {
  using Channels = ChannelTile<kWarps, kSteps>;
  using Projection = ProjectionTile<kStates, kSteps>;
  static constexpr bool kShared = kStates > kRealRegisterStates;
  static constexpr int kRates = kShared ? 3 * kStates * kWarp : 0;

  float *rates, *projections, *channels;

  QMIR_DEVICE RealStage(float* shared, int projection_tiles)
      : rates(shared),
        projections(shared + kRates),
        channels(projections + projection_tiles * kWarps * Projection::kFloats) {}

  QMIR_DEVICE float* projection(int i) const {
    return projections + i * (kWarps * Projection::kFloats);
  }

  QMIR_DEVICE float& at(int tile, int owner, int channel, int t) const {
    return channels[(tile * kWarps + owner) * Channels::kFloats + Channels::slot(channel, t)];
  }
};

// What all passes share: a warp's chunk, its channels' constants, and its tiles.
template <bool kImage, int kStates, int kWarps, int kSteps, class T>
struct RealChunk {
  using Block = ScanBlock<kImage, kWarps, kSteps>;
  using Stage = RealStage<kStates, kWarps, kSteps>;
  using Projection = typename Stage::Projection;
  // Tiles of channels.
  enum { kU, kDt, kGrad, kRaw };
  // Loads under way; many states leave few registers for them.
  static constexpr int kAhead = kStates > 12 ? 2 : 4;

  const RealScan<T>& in;
  const Block& block;
  Stage stage;
  float skip, bias;
  float reach;  // |delta| below this needs no clamp; NaN or zero where A is not finite
  DecayRate<float> rates[Stage::kShared ? 1 : kStates];

  QMIR_DEVICE RealChunk(const RealScan<T>& in, const Block& block, float* shared,
                        int projection_tiles)
      : in(in), block(block), stage(shared, projection_tiles), skip(0.0f), bias(0.0f) {
    const int64_t channel =
        block.group * in.size.per_group + block.channel + (block.valid() ? block.lane : 0);
    if (in.d && block.valid()) skip = in.d[channel];
    if (in.bias) bias = in.bias[channel];
    float largest = 1e-30f;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      const DecayRate<float> one = real_rate(in.a[channel * kStates + n]);
      // NaN wins, so that a chunk with one is clamped.
      largest = lane_abs(one.high) <= largest ? largest : lane_abs(one.high);
      if constexpr (Stage::kShared) {
        if (n % kWarps == block.warp) {
          float* to = stage.rates + (n * kWarp + block.lane) * 3;
          to[0] = one.a;
          to[1] = one.high;
          to[2] = one.low;
        }
      } else {
        rates[n] = one;
      }
    }
    reach = kExponentReach / largest;
    if constexpr (Stage::kShared) __syncthreads();
  }

  QMIR_DEVICE DecayRate<float> rate(int n) const {
    if constexpr (Stage::kShared) {
      const float* from = stage.rates + (n * kWarp + block.lane) * 3;
      return {from[0], from[1], from[2]};
    } else {
      return rates[n];
    }
  }

  QMIR_DEVICE bool real() const {
    return block.valid() && block.own.count > 0;
  }

  // Row `row` of `rows` of this lane and chunk in a tensor (batch, groups, slots, rows, per_group).
  QMIR_DEVICE int64_t carry_at(int row, int rows = kStates) const {
    const int64_t slot =
        (block.sample * in.size.groups + block.group) * in.size.slots + block.own.chunk;
    return (slot * rows + row) * in.size.per_group + block.channel + block.lane;
  }

  // First element of channel block.channel, in tensors with all groups and in those that an image
  // shares among its directions.
  QMIR_DEVICE int64_t own_plane() const {
    const int64_t group = block.sample * in.size.groups + block.group;
    return (group * in.size.per_group + block.channel) * in.size.length;
  }
  QMIR_DEVICE int64_t shared_plane() const {
    if constexpr (!kImage) return own_plane();
    return (block.sample * in.size.per_group + block.channel) * in.size.length;
  }

  QMIR_DEVICE void load_channels(int tile, const T* from, int to) const {
    block.template each<kWarp, kAhead>(tile, [&](int owner, int item, const Place& p) {
      // Lanes without a channel compute with zeros.
      stage.at(to, owner, item, p.t) =
          item < block.channels ? real_value(__ldg(from + item * in.size.length + p.at)) : 0.0f;
    });
  }

  QMIR_DEVICE void load_projection(int tile, const T* from, int to) const {
    const T* plane =
        from + (block.sample * in.size.groups + block.group) * kStates * in.size.length;
    Projection::template fill<1>(block, tile, stage.projection(to), [&](int n, int64_t at) {
      return real_value(__ldg(plane + n * in.size.length + at));
    });
  }

  // Makes time steps of the tile's delta, in place; returns whether one needs a clamp in the warp.
  template <bool kKeepRaw>
  QMIR_DEVICE bool make_time_steps(int steps) const {
    bool far = false;
    for (int t = 0; t < steps; ++t) {
      float& slot = stage.at(kDt, block.warp, block.lane, t);
      const float raw = slot + bias;
      if constexpr (kKeepRaw) stage.at(kRaw, block.warp, block.lane, t) = raw;
      slot = in.softplus ? softplus_lanes(raw) : raw;
      far |= !(lane_abs(slot) < reach);
    }
    return __any_sync(kAllLanes, far);
  }
};

// With kApply outputs; otherwise the chunk's last state from zero and the product of its decays,
// and with kReverse the gradient that it passes back to its start.
template <bool kImage, int kStates, int kWarps, int kSteps, class T, bool kApply, bool kReverse>
struct RealForward : RealChunk<kImage, kStates, kWarps, kSteps, T> {
  using Base = RealChunk<kImage, kStates, kWarps, kSteps, T>;
  using Base::block, Base::in, Base::skip, Base::stage;
  using Base::kDt, Base::kGrad, Base::kU;
  using typename Base::Block, typename Base::Projection;
  // The output takes the tile that the gradient has otherwise.
  static constexpr int kOut = Base::kGrad;

  float h[kStates];
  float product[kApply ? 1 : kStates];
  float passed[kReverse ? kStates : 1];

  QMIR_DEVICE RealForward(const RealScan<T>& in, const Block& block, float* shared)
      : Base(in, block, shared, kApply || kReverse ? 2 : 1) {
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      h[n] = kApply && in.end && this->real() ? in.end[this->carry_at(n)] : 0.0f;
      if constexpr (!kApply) product[n] = 1.0f;
      if constexpr (kReverse) passed[n] = 0.0f;
    }
  }

  template <bool kClamped>
  QMIR_DEVICE void advance(int steps) {
#pragma unroll 1
    for (int t = 0; t < steps; ++t) {
      const float u = stage.at(kU, block.warp, block.lane, t);
      const float dt = stage.at(kDt, block.warp, block.lane, t);
      const float gy = kReverse ? stage.at(kGrad, block.warp, block.lane, t) : 0.0f;
      const float dtu = dt * u;
      float sum[2] = {0.0f, 0.0f};  // of even and odd states: half the roundings in a row
#pragma unroll
      for (int quad = 0; quad < Projection::kQuads; ++quad) {
        float b[4], c[4];
        Projection::load(stage.projection(0), block.warp, t, quad, b);
        if constexpr (kApply || kReverse)
          Projection::load(stage.projection(1), block.warp, t, quad, c);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = 4 * quad + i;
          if (n >= kStates) break;
          const float decay = scan_step<kClamped>(h[n], dt, this->rate(n), dtu, b[i]);
          if constexpr (kApply) sum[n % 2] = fmadd(c[i], h[n], sum[n % 2]);
          if constexpr (!kApply) product[n] = product[n] * decay;
          if constexpr (kReverse) passed[n] = fmadd(gy * c[i], product[n], passed[n]);
        }
      }
      if constexpr (kApply)
        stage.at(kOut, block.warp, block.lane, t) = fmadd(skip, u, sum[0] + sum[1]);
    }
  }

  template <class Out>
  QMIR_DEVICE void run(Out* y) {
    for (int tile = 0; tile < block.tiles(); ++tile) {
      this->load_channels(tile, in.u + this->shared_plane(), kU);
      this->load_channels(tile, in.delta + this->own_plane(), kDt);
      this->load_projection(tile, in.b, 0);
      if constexpr (kApply || kReverse) this->load_projection(tile, in.c, 1);
      if constexpr (kReverse) this->load_channels(tile, in.grad + this->shared_plane(), kGrad);
      block.sync();
      const int steps = block.steps_in(block.own, tile);
      if (this->template make_time_steps<false>(steps))
        advance<true>(steps);
      else
        advance<false>(steps);
      block.sync();
      if constexpr (kApply) {
        Out* to = y + this->own_plane();
        block.template each<kWarp, Base::kAhead>(tile, [&](int owner, int item, const Place& p) {
          if (item < block.channels)
            set_real(to + item * in.size.length + p.at, stage.at(kOut, owner, item, p.t));
        });
      }
    }
    if constexpr (!kApply) {
      if (!this->real()) return;
#pragma unroll
      for (int n = 0; n < kStates; ++n) {
        in.end[this->carry_at(n)] = h[n];
        in.decay[this->carry_at(n)] = product[n];
        if constexpr (kReverse) in.reverse[this->carry_at(n)] = passed[n];
      }
    }
  }
};

template <bool kImage, int kStates, int kWarps, int kSteps, bool kApply, bool kReverse, class T,
          class Out>
QMIR_DEVICE void scan_real(const RealScan<T>& in, Out* y) {
  QMIR_DYNAMIC_SHARED(float, shared);
  const ScanBlock<kImage, kWarps, kSteps> block(in.size);
  if (block.idle()) return;
  RealForward<kImage, kStates, kWarps, kSteps, T, kApply, kReverse> chunk(in, block, shared);
  chunk.run(y);
}

}  // namespace qmir

// Parameters of kernels, in the order of backend/cuda/scan_real.py; `Real` is the operands' type.
#define QMIR_REAL_PARAMETERS                                                                      \
  const Real *u, const Real *delta, const float *a, const Real *b, const Real *c, const float *d, \
      const float *bias, long long softplus, QMIR_SCAN_SIZES, float *end, float *decay
#define QMIR_REAL_SCAN(grad, reverse)                                                    \
  qmir::RealScan<Real> {                                                                 \
    QMIR_SCAN_SIZE, u, delta, b, c, a, d, bias, grad, softplus != 0, end, decay, reverse \
  }
