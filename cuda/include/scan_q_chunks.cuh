// Selective scan of quantized operands in chunks, for sequences and images (scan_walk.cuh). The
// float32 operations within a chunk are those of qmir_ao/ops/selective_scan_q.py, in its order and
// each rounded on its own, so that a scan of one chunk gives the reference's bytes. A state that
// crosses a chunk is multiplied by one decay for the sum of the chunk's delta instead of by one
// after the other, which rounds less (tests/support/tolerances.py, scan_q_roundings).
//
// A lane is a channel. Where the decays of all codes of 32 channels fit into shared memory
// (QMIR_TABLE) a step reads its row there: lane l finds its values in its own banks, whatever the
// code. Otherwise (8-bit delta, many states) only delta is a table, and a decay is one 2^x.
#pragma once
#include "scan_q.cuh"
#include "scan_walk.cuh"

namespace qmir {

// 2^x to 2^-22 relative, subnormal results are zero; the test harness takes the C library's.
QMIR_DEVICE float fast_exp2(float x) {
#if defined(QMIR_CUDA_HOST)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Codes of one operand; groups of step and shift are 1 or the batch.
struct CodeSource {
  const uint8_t* at;
  const float *step, *shift;
  int64_t groups;
  int flip;  // 128 for int8, 0 for uint8

  QMIR_DEVICE int code(uint32_t byte) const {
    return (int)(byte ^ (uint32_t)flip) - flip;
  }
  QMIR_DEVICE float step_of(int64_t sample) const {
    return step[groups > 1 ? sample : 0];
  }
  QMIR_DEVICE float shift_of(int64_t sample) const {
    return shift[groups > 1 ? sample : 0];
  }
};

struct ScanQ {
  ScanSize size;
  CodeSource u, delta, b, c;
  const float *table, *d;  // d may be null
  int64_t table_groups;
  int code_min, code_count;
  float *end, *decay;  // (batch, groups, slots, states, per_group); null where there is one chunk
  float* y;            // (batch, groups, per_group, length)
  int* outside;        // set to 1 where a code of delta has no row in the table
};

// A row of the table of 32 channels: kRow values of each, in fours as far as they go.
template <int kRow>
QMIR_DEVICE int row_slot(int value, int lane) {
  const int quad = value / 4;
  return quad < kRow / 4 ? (quad * kWarp + lane) * 4 + value % 4 : value * kWarp + lane;
}

template <int kRow>
QMIR_DEVICE void load_row(const float* row, int lane, float (&values)[kRow]) {
#pragma unroll
  for (int quad = 0; quad < kRow / 4; ++quad) {
    const float4 four = *reinterpret_cast<const float4*>(row + row_slot<kRow>(4 * quad, lane));
    values[4 * quad] = four.x;
    values[4 * quad + 1] = four.y;
    values[4 * quad + 2] = four.z;
    values[4 * quad + 3] = four.w;
  }
#pragma unroll
  for (int i = kRow / 4 * 4; i < kRow; ++i) values[i] = row[row_slot<kRow>(i, lane)];
}

// Values of a table row: a decay per state and delta after them, or delta alone.
template <int kStates, bool kTable>
constexpr int scan_row = kTable ? kStates + 1 : 1;

// Blocks of (table group, group, 32 channels), each (codes, row). A thread makes one channel's row.
template <int kStates, bool kTable>
QMIR_DEVICE void make_scan_table(const float* step, const float* shift, const float* a,
                                 const float* bias, int64_t groups, int64_t per_group,
                                 int64_t table_groups, int code_min, int code_count, bool softplus,
                                 float* table) {
  constexpr int kRow = scan_row<kStates, kTable>;
  const int64_t blocks = (per_group + kWarp - 1) / kWarp;
  const int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
  if (row >= table_groups * groups * blocks * code_count) return;
  const int lane = lane_id();
  const int64_t block = row / code_count;
  const int64_t local = block % blocks * kWarp + lane;
  if (local >= per_group) return;
  const int64_t channel = block / blocks % groups * per_group + local;
  const int64_t g = block / blocks / groups;
  float delta = code_value(code_min + (int)(row % code_count), step[g], shift[g]);
  delta = delta + (bias ? bias[channel] : 0.0f);
  if (softplus && !(delta > 20.0f)) delta = log1pf(expf(delta));
  float* to = table + row * (kRow * kWarp);
  to[row_slot<kRow>(kRow - 1, lane)] = delta;
  if constexpr (kTable)
    for (int n = 0; n < kStates; ++n)
      to[row_slot<kRow>(n, lane)] = expf(delta * a[channel * kStates + n]);
}

// States whose rates, products and loads under way fit into registers together.
constexpr int kRegisterStates = 32;

// Shared memory of a block: the table, rates of the channels where they lie here, then of each warp
// codes, B, C and outputs.
template <int kStates, bool kTable, int kWarps>
struct ScanQStage {
  using Tile = ChannelTile<kWarps>;
  static constexpr int kRow = scan_row<kStates, kTable>;
  using Projection = ProjectionTile<kStates>;
  static constexpr int kCodePitch = kTile + 4;
  static constexpr int kCodes = 2 * kWarp * kCodePitch + 4;  // bytes of a warp
  // With many states their rates do not fit into registers.
  static constexpr int kRates = !kTable && kStates > kRegisterStates ? kStates * kWarp : 0;

  float *table, *rates, *b, *c, *y;
  uint8_t* codes;

  QMIR_DEVICE ScanQStage(float* shared, int code_count, bool apply) {
    table = shared;
    rates = table + code_count * kRow * kWarp;
    b = rates + kRates;
    c = b + kWarps * Projection::kFloats;
    y = c + (apply ? kWarps * Projection::kFloats : 0);
    codes = reinterpret_cast<uint8_t*>(y + (apply ? kWarps * Tile::kFloats : 0));
  }

  QMIR_DEVICE uint8_t* u_codes(int owner, int channel) const {
    return codes + owner * kCodes + channel * kCodePitch;
  }
  QMIR_DEVICE uint8_t* delta_codes(int owner, int channel) const {
    return u_codes(owner, channel) + kWarp * kCodePitch;
  }
};

// One warp's chunk: with kApply its outputs, from the state that was carried to it; otherwise the
// product of its decays and its last state, from zero.
template <bool kImage, int kStates, bool kTable, bool kApply, int kWarps>
struct ChunkQ {
  using Stage = ScanQStage<kStates, kTable, kWarps>;
  using Tile = typename Stage::Tile;
  using Projection = typename Stage::Projection;
  static constexpr int kRow = Stage::kRow;
  // Many states leave few registers for loads and steps under way.
  static constexpr bool kMany = kStates > kRegisterStates;
  static constexpr int kAhead = kTable && !kMany ? 4 : 2;

  const ScanQ& in;
  const ScanBlock<kImage, kWarps>& block;
  const float* a;
  Stage stage;
  float u_step, u_shift, skip;
  bool missed;
  float h[kStates];
  LongSum elapsed;                            // delta of all steps so far
  float rate[kTable || kMany ? 1 : kStates];  // A * log2(e)

  QMIR_DEVICE int64_t carry_at(int n) const {
    const int64_t slot =
        (block.sample * in.size.groups + block.group) * in.size.slots + block.own.chunk;
    return (slot * kStates + n) * in.size.per_group + block.channel + block.lane;
  }

  QMIR_DEVICE ChunkQ(const ScanQ& in, const ScanBlock<kImage, kWarps>& block, float* shared,
                     const float* a)
      : in(in),
        block(block),
        a(a),
        stage(shared, in.code_count, kApply),
        u_step(in.u.step_of(block.sample)),
        u_shift(in.u.shift_of(block.sample)),
        skip(0.0f),
        missed(false),
        elapsed{0.0f, 0.0f} {
    const bool real = block.valid() && block.own.count > 0;
    const int64_t channel =
        block.group * in.size.per_group + block.channel + (block.valid() ? block.lane : 0);
    if (in.d) skip = in.d[channel];
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      h[n] = kApply && in.end && real ? in.end[carry_at(n)] : 0.0f;
      if constexpr (!kTable && !kMany) rate[n] = rate_of(a[channel * kStates + n]);
    }
    if constexpr (!kTable && kMany)
      for (int n = block.warp; n < kStates; n += kWarps)
        stage.rates[n * kWarp + block.lane] = rate_of(a[channel * kStates + n]);
  }

  QMIR_DEVICE static float rate_of(float a) {
    return a * (float)1.4426950408889634;
  }

  QMIR_DEVICE void load_table() const {
    const int64_t blocks = ScanBlock<kImage, kWarps>::blocks(in.size);
    const int64_t g = in.table_groups > 1 ? block.sample : 0;
    const int64_t at = (g * in.size.groups + block.group) * blocks + block.channel / kWarp;
    const int quads = in.code_count * kRow * kWarp / 4;
    const float4* from = reinterpret_cast<const float4*>(in.table) + at * quads;
    float4* to = reinterpret_cast<float4*>(stage.table);
    for (int i = (int)threadIdx.x; i < quads; i += kWarps * kWarp) to[i] = from[i];
  }

  QMIR_DEVICE void load_projection(const CodeSource& from, float* base, int tile) const {
    const float step = from.step_of(block.sample), shift = from.shift_of(block.sample);
    const uint8_t* plane =
        from.at + (block.sample * in.size.groups + block.group) * kStates * in.size.length;
    Projection::template fill<kAhead / 2>(block, tile, base, [&](int n, int64_t at) {
      return code_value(from.code(__ldg(plane + n * in.size.length + at)), step, shift);
    });
  }

  QMIR_DEVICE void load(int tile) const {
    // An image is shared by its four directions.
    const int64_t groups = kImage ? 1 : in.size.groups;
    const int64_t group = kImage ? 0 : block.group;
    const int64_t first = (block.sample * groups + group) * in.size.per_group + block.channel;
    const int64_t own =
        (block.sample * in.size.groups + block.group) * in.size.per_group + block.channel;
    const uint8_t* u = in.u.at + first * in.size.length;
    const uint8_t* delta = in.delta.at + own * in.size.length;
    block.template each<kWarp, kAhead>(tile, [&](int owner, int item, const Place& p) {
      const int64_t at = min_of(item, block.channels - 1) * in.size.length + p.at;
      stage.u_codes(owner, item)[p.t] = __ldg(u + at);
      stage.delta_codes(owner, item)[p.t] = __ldg(delta + at);
    });
    load_projection(in.b, stage.b, tile);
    if constexpr (kApply) load_projection(in.c, stage.c, tile);
  }

  QMIR_DEVICE void step(int t, uint32_t u_byte, uint32_t delta_byte) {
    int index = in.delta.code(delta_byte) - in.code_min;
    const bool out = (uint32_t)index >= (uint32_t)in.code_count;
    if (out) index = 0;
    missed |= out;
    float entry[kRow];
    load_row<kRow>(stage.table + index * (kRow * kWarp), block.lane, entry);
    const float dt = entry[kRow - 1];
    const float value = code_value(in.u.code(u_byte), u_step, u_shift);
    // Without a row there is no result: from here on the channel's outputs are NaN.
    const float x = out ? NAN : dt * value;
    if constexpr (!kApply) elapsed.add(dt);
    float sum = 0.0f;
#pragma unroll
    for (int quad = 0; quad < Projection::kQuads; ++quad) {
      float b[4], c[4];
      Projection::load(stage.b, block.warp, t, quad, b);
      if constexpr (kApply) Projection::load(stage.c, block.warp, t, quad, c);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 4 * quad + i;
        if (n >= kStates) break;
        float decay;
        if constexpr (kTable)
          decay = entry[n];
        else if constexpr (kMany)
          decay = fast_exp2(dt * stage.rates[n * kWarp + block.lane]);
        else
          decay = fast_exp2(dt * rate[n]);
        if constexpr (kApply) {
          scan_state(h[n], sum, decay, x, b[i], c[i]);
        } else {
          h[n] = fmadd(decay, h[n], x * b[i]);
        }
      }
    }
    if constexpr (kApply)
      stage.y[block.warp * Tile::kFloats + Tile::slot(block.lane, t)] =
          in.d ? sum + skip * value : sum;
  }

  QMIR_DEVICE void advance(int tile) {
    const int steps = block.steps_in(block.own, tile);
    const uint8_t* u = stage.u_codes(block.warp, block.lane);
    const uint8_t* delta = stage.delta_codes(block.warp, block.lane);
#pragma unroll kMany ? 1 : kAhead
    for (int t = 0; t < steps; ++t) step(t, u[t], delta[t]);
  }

  QMIR_DEVICE void store(int tile) const {
    const int64_t first =
        (block.sample * in.size.groups + block.group) * in.size.per_group + block.channel;
    float* y = in.y + first * in.size.length;
    block.template each<kWarp, kAhead>(tile, [&](int owner, int item, const Place& p) {
      if (item < block.channels)
        y[item * in.size.length + p.at] = stage.y[owner * Tile::kFloats + Tile::slot(item, p.t)];
    });
  }

  QMIR_DEVICE void run() {
    load_table();
    __syncthreads();
    for (int tile = 0; tile < block.tiles(); ++tile) {
      load(tile);
      block.sync();
      advance(tile);
      block.sync();
      // The next tile overwrites other memory than this one's outputs, and meets a barrier before
      // it writes outputs of its own.
      if constexpr (kApply) store(tile);
    }
    if (!block.valid() || block.own.count == 0) return;
    if (missed) *in.outside = 1;
    if constexpr (!kApply) {
      const float* rates =
          a + (block.group * in.size.per_group + block.channel + block.lane) * kStates;
      const float total = elapsed.total();
#pragma unroll
      for (int n = 0; n < kStates; ++n) {
        const DecayRate<float> rate = real_rate(rates[n]);
        in.end[carry_at(n)] = h[n];
        in.decay[carry_at(n)] = exp2_product<true>(total, rate.high, rate.low);
      }
    }
  }
};

template <bool kImage, int kStates, bool kTable, bool kApply, int kWarps>
QMIR_DEVICE void scan_q_chunks(const ScanQ& in, const float* a) {
  QMIR_DYNAMIC_SHARED(float, shared);
  const ScanBlock<kImage, kWarps> block(in.size);
  if (block.idle()) return;
  ChunkQ<kImage, kStates, kTable, kApply, kWarps> chunk(in, block, shared, a);
  chunk.run();
}

}  // namespace qmir

// Parameters of the kernels, in the order of backend/cuda/scan_q.py.
#define QMIR_SCAN_Q_PARAMETERS                                                                \
  const uint8_t *u, const float *u_step, const float *u_shift, const uint8_t *delta,          \
      const uint8_t *b, const float *b_step, const float *b_shift, const uint8_t *c,          \
      const float *c_step, const float *c_shift, const float *a, const float *d,              \
      const float *table, QMIR_SCAN_SIZES, long long u_groups, long long table_groups,        \
      long long b_groups, long long c_groups, long long unsigned_u, long long unsigned_delta, \
      long long unsigned_b, long long unsigned_c, long long code_min, long long code_count,   \
      float *end, float *decay, float *y, int *outside
#define QMIR_SCAN_Q                                                                   \
  qmir::ScanQ {                                                                       \
    QMIR_SCAN_SIZE, {u, u_step, u_shift, u_groups, unsigned_u ? 0 : 128},             \
        {delta, nullptr, nullptr, 1, unsigned_delta ? 0 : 128},                       \
        {b, b_step, b_shift, b_groups, unsigned_b ? 0 : 128},                         \
        {c, c_step, c_shift, c_groups, unsigned_c ? 0 : 128}, table, d, table_groups, \
        (int)code_min, (int)code_count, end, decay, y, outside                        \
  }
#define QMIR_SCAN_TABLE_PARAMETERS                                                            \
  const float *step, const float *shift, const float *a, const float *bias, long long groups, \
      long long per_group, long long table_groups, long long code_min, long long code_count,  \
      long long softplus, float *table
