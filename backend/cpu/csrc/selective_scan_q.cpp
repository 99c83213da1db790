// Selective scan of quantized operands. kLanes channels are the lanes of one task; the decays of a
// step are rows of a table, one per channel, picked by the code of delta and transposed four states
// at a time. The float32 operations follow the order of the reference, so the bytes agree.
#include <omp.h>

#include <algorithm>
#include <cstdlib>

#include "simd.h"
// After simd.h, whose overloads its templates use.
#include "directions.h"
#include "scan_q.cuh"

using namespace qmir;

namespace qmir {

// Mirrors the array that backend/cpu/selective_scan_q.py passes. A count of groups is 1 or `batch`.
struct ScanShape {
  int64_t batch, channels, groups, states, length, u_groups, table_groups, b_groups, c_groups,
      unsigned_u, unsigned_delta, unsigned_b, unsigned_c, code_min, code_count;
};

}  // namespace qmir

namespace {

constexpr int kSteps = kLanes;              // steps of one tile: a square of lanes
constexpr int64_t kParallelWork = 1 << 15;  // state updates below which one thread is faster
constexpr int kMaxWidth = 68;  // floats of a table row: delta and up to 64 states, in fours

struct Codes {
  Planes<const uint8_t> planes;
  int64_t is_unsigned;
  const float *step, *shift;
  int64_t groups;
};

// kQuads * 4 floats at base + offset[lane * pitch], transposed: out[i][lane] is float i of a lane.
template <int kQuads>
QMIR_FN void load_transposed(const float* base, const int32_t* offset, int64_t pitch, lanes* out) {
#if defined(__AVX512F__)
  __m512 part[kQuads][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const float* row[4];
    for (int i = 0; i < 4; ++i) row[i] = base + offset[(j + 4 * i) * pitch];
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q) {
      part[q][j] = _mm512_castps128_ps512(_mm_loadu_ps(row[0] + 4 * q));
      part[q][j] = _mm512_insertf32x4(part[q][j], _mm_loadu_ps(row[1] + 4 * q), 1);
      part[q][j] = _mm512_insertf32x4(part[q][j], _mm_loadu_ps(row[2] + 4 * q), 2);
      part[q][j] = _mm512_insertf32x4(part[q][j], _mm_loadu_ps(row[3] + 4 * q), 3);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQuads; ++q) {
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(part[q][0], part[q][1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(part[q][2], part[q][3]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(part[q][0], part[q][1]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(part[q][2], part[q][3]));
    out[4 * q] = (lanes)_mm512_unpacklo_pd(low01, low23);
    out[4 * q + 1] = (lanes)_mm512_unpackhi_pd(low01, low23);
    out[4 * q + 2] = (lanes)_mm512_unpacklo_pd(high01, high23);
    out[4 * q + 3] = (lanes)_mm512_unpackhi_pd(high01, high23);
  }
#elif defined(__AVX__)
  // Lanes j and j + 4 share a register, and four registers are transposed within their halves.
  for (int q = 0; q < kQuads; ++q) {
    __m256 part[4];
    for (int j = 0; j < 4; ++j)
      part[j] = _mm256_insertf128_ps(
          _mm256_castps128_ps256(_mm_loadu_ps(base + offset[j * pitch] + 4 * q)),
          _mm_loadu_ps(base + offset[(j + 4) * pitch] + 4 * q), 1);
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(part[0], part[1]));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(part[2], part[3]));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(part[0], part[1]));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(part[2], part[3]));
    out[4 * q] = (lanes)_mm256_unpacklo_pd(low01, low23);
    out[4 * q + 1] = (lanes)_mm256_unpackhi_pd(low01, low23);
    out[4 * q + 2] = (lanes)_mm256_unpacklo_pd(high01, high23);
    out[4 * q + 3] = (lanes)_mm256_unpackhi_pd(high01, high23);
  }
#else
  for (int i = 0; i < 4 * kQuads; ++i)
    for (int lane = 0; lane < kLanes; ++lane) out[i][lane] = base[offset[lane * pitch] + i];
#endif
}

QMIR_FN lanes_i load_codes(const uint8_t* p, int64_t is_unsigned) {
  const int32_t flip = is_unsigned ? 0 : 128;
#if defined(__AVX512F__)
  const lanes_i raw =
      (lanes_i)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  const lanes_i raw =
      (lanes_i)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  // A loop over memory: compilers take vector conversions between widths apart, lane by lane.
  int32_t wide[kSteps];
  for (int i = 0; i < kSteps; ++i) wide[i] = p[i];
  lanes_i raw;
  std::memcpy(&raw, wide, sizeof raw);
#endif
  return (raw ^ flip) - flip;
}

QMIR_FN lanes load_values(const uint8_t* p, int64_t is_unsigned, float step, float shift) {
  return __builtin_convertvector(load_codes(p, is_unsigned), lanes) * step - shift;
}

// Codes of `count` steps, from a copy where the row ends within the tile.
QMIR_FN const uint8_t* padded(const uint8_t* p, int64_t count, uint8_t (&copy)[kSteps]) {
  if (count >= kSteps) return p;
  std::memset(copy, 0, sizeof copy);
  std::memcpy(copy, p, count);
  return copy;
}

struct Scan {
  ScanShape s;
  Codes u, delta, b, c;
  const float *table, *d;
  Planes<float> y;
  Order order;
  int64_t width;  // floats of one table row
};

// One task: up to kLanes channels of one sample that share B and C.
struct Block {
  const Scan& in;
  int64_t sample, group, first, count;  // first channel of the block, number of real channels
  alignas(64) int32_t row[kLanes][kSteps];
  alignas(64) float u[kSteps][kLanes];
  alignas(64) float y[kSteps][kLanes];
  // Row n + 1 is state n. Columns that only fill a table row up meet zeros, which add nothing.
  alignas(64) float b[kMaxWidth][kSteps] = {};
  alignas(64) float c[kMaxWidth][kSteps] = {};
  const float* base;
  lanes_i all_outside = {};

  Block(const Scan& in, int64_t sample, int64_t group, int64_t first, int64_t count)
      : in(in), sample(sample), group(group), first(first), count(count) {
    const int64_t g = in.s.table_groups > 1 ? sample : 0;
    base = in.table + (g * in.s.channels + first) * in.s.code_count * in.width;
  }

  // Lanes beyond the last channel repeat it; they are never stored.
  int64_t channel(int lane) const {
    return first + std::min<int64_t>(lane, count - 1);
  }

  void load(int64_t t, int64_t steps) {
    alignas(64) float by_channel[kLanes][kSteps];
    const int64_t gu = in.u.groups > 1 ? sample : 0;
    const int32_t last = (int32_t)in.s.code_count - 1;
    lanes_i outside = {};
    const uint8_t* u_at = in.u.planes.at(sample, group);
    const uint8_t* delta_at = in.delta.planes.at(sample, group);
    const int64_t start = in.order.at(group, t, steps);
    for (int lane = 0; lane < kLanes; ++lane) {
      uint8_t copy[kSteps];
      const int64_t local = channel(lane) - group * (in.s.channels / in.s.groups);
      const int64_t at = local * in.s.length + start;
      store(by_channel[lane], load_values(tile_codes(u_at + at, steps, copy), in.u.is_unsigned,
                                          in.u.step[gu], in.u.shift[gu]));
      lanes_i code = load_codes(tile_codes(delta_at + at, steps, copy), in.delta.is_unsigned) -
                     (int32_t)in.s.code_min;
      outside |= (code < 0) | (code > last);
      code = code < 0 ? lanes_i{} : code;
      code = code > last ? lanes_i{} + last : code;
      code = (code + (int32_t)((channel(lane) - first) * in.s.code_count)) * (int32_t)in.width;
      std::memcpy(row[lane], &code, sizeof code);
    }
    all_outside |= outside;
    transpose(by_channel, u);
    for (int64_t n = 0; n < in.s.states; ++n) {
      load_state(in.b, n, t, steps, b[n + 1]);
      load_state(in.c, n, t, steps, c[n + 1]);
    }
  }

  void load_state(const Codes& codes, int64_t n, int64_t t, int64_t steps, float* out) const {
    uint8_t copy[kSteps];
    const uint8_t* at = codes.planes.at(sample, group) + n * in.s.length +
                        in.order.at(group, t, steps);
    const int64_t g = codes.groups > 1 ? sample : 0;
    store(out, load_values(tile_codes(at, steps, copy), codes.is_unsigned, codes.step[g],
                           codes.shift[g]));
  }

  // Codes of `count` steps in the order of the scan, from a copy where memory has them otherwise.
  const uint8_t* tile_codes(const uint8_t* p, int64_t count, uint8_t (&copy)[kSteps]) const {
    if (!in.order.back(group)) return padded(p, count, copy);
    std::memset(copy, 0, sizeof copy);
    for (int64_t i = 0; i < count; ++i) copy[i] = p[count - 1 - i];
    return copy;
  }

  static void transpose(const float (&from)[kLanes][kSteps], float (&to)[kSteps][kLanes]) {
    int32_t offset[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) offset[lane] = lane * kSteps;
    for (int i = 0; i < kSteps; i += 4) {
      lanes part[4];
      load_transposed<1>(&from[0][i], offset, 1, part);
      for (int j = 0; j < 4; ++j) store(to[i + j], part[j]);
    }
  }

  void store_result(int64_t t, int64_t steps) const {
    alignas(64) float by_channel[kLanes][kSteps];
    transpose(y, by_channel);
    const int64_t local = first - group * (in.s.channels / in.s.groups);
    float* to = in.y.at(sample, group) + local * in.s.length + in.order.at(group, t, steps);
    for (int64_t lane = 0; lane < count; ++lane) {
      float* row_at = to + lane * in.s.length;
      if (in.order.back(group))
        std::reverse_copy(by_channel[lane], by_channel[lane] + steps, row_at);
      else
        std::memcpy(row_at, by_channel[lane], steps * sizeof(float));
    }
  }

  // Columns first_quad * 4 and on of the table rows of step i: one decay per state.
  template <int kQuads>
  QMIR_FN void states(int64_t first_quad, int i, lanes* h, lanes& x, lanes& sum, lanes value) {
    lanes decay[4 * kQuads];
    load_transposed<kQuads>(base + 4 * first_quad, &row[0][i], kSteps, decay);
    const int64_t skipped = first_quad == 0;  // column 0 is delta
    if (skipped) x = decay[0] * value;
#pragma GCC unroll 16
    for (int64_t j = 0; j < 4 * kQuads; ++j) {
      const int64_t n = 4 * first_quad + j;
      if (j >= skipped) scan_state(h[n], sum, decay[j], x, b[n][i], c[n][i]);
    }
  }

  // kQuads > 0 fixes the width of a table row (in fours), so that the state stays in registers.
  template <int kQuads>
  bool run() {
    constexpr int kHead = kQuads > 3 ? 3 : kQuads;
    lanes h[kQuads ? 4 * kQuads : kMaxWidth] = {};
    lanes skip = {};
    for (int lane = 0; in.d && lane < kLanes; ++lane) skip[lane] = in.d[channel(lane)];
    for (int64_t t = 0; t < in.s.length; t += kSteps) {
      const int64_t steps = std::min<int64_t>(kSteps, in.s.length - t);
      load(t, steps);
      for (int i = 0; i < steps; ++i) {
        lanes x, value = qmir::load(u[i]), sum = {};
        if constexpr (kQuads > 0) {
          states<kHead>(0, i, h, x, sum, value);
          if constexpr (kQuads > kHead) states<kQuads - kHead>(kHead, i, h, x, sum, value);
        } else {
          for (int64_t q = 0; q < in.width / 4; ++q) states<1>(q, i, h, x, sum, value);
        }
        store(y[i], in.d ? sum + skip * value : sum);
      }
      store_result(t, steps);
    }
    for (int i = 0; i < kSteps; ++i)
      if (all_outside[i]) return false;
    return true;
  }
};

bool run_block(const Scan& in, int64_t sample, int64_t group, int64_t first, int64_t count) {
  Block block(in, sample, group, first, count);
  switch (in.width / 4) {
    case 1:
      return block.run<1>();
    case 2:
      return block.run<2>();
    case 3:
      return block.run<3>();
    case 4:
      return block.run<4>();
    case 5:
      return block.run<5>();
    default:
      return block.run<0>();
  }
}

// Returns 1 where a code of delta lies outside the table, else 0.
int run(const Scan& in) {
  const ScanShape& s = in.s;
  const int64_t per_group = s.channels / s.groups, blocks = (per_group + kLanes - 1) / kLanes;
  int outside = 0;
  const int64_t work = s.batch * s.channels * s.states * s.length;
#pragma omp parallel for collapse(3) schedule(dynamic) \
    reduction(| : outside) if (work > kParallelWork)
  for (int64_t sample = 0; sample < s.batch; ++sample)
    for (int64_t group = 0; group < s.groups; ++group)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = group * per_group + block * kLanes;
        const int64_t count = std::min<int64_t>(kLanes, (group + 1) * per_group - first);
        outside |= !run_block(in, sample, group, first, count);
      }
  return outside;
}

}  // namespace

extern "C" {

// Grids are step and shift of u, B and C; that of delta is in the table already. Returns 0, or 1
// where a code of delta lies outside the table (y is then of no use). At most 64 states.
int qmir_selective_scan_q(const uint8_t* u, const float* u_step, const float* u_shift,
                          const uint8_t* delta, const uint8_t* b, const float* b_step,
                          const float* b_shift, const uint8_t* c, const float* c_step,
                          const float* c_shift, const float* table, const float* d,
                          const ScanShape* shape, float* y) {
  const ScanShape& s = *shape;
  const int64_t rows = s.channels / s.groups * s.length, states = s.states * s.length;
  const auto planes = [&](const uint8_t* p, int64_t group) {
    return Planes<const uint8_t>{p, nullptr, s.groups * group, group};
  };
  return run({s,
              {planes(u, rows), s.unsigned_u, u_step, u_shift, s.u_groups},
              {planes(delta, rows), s.unsigned_delta, nullptr, nullptr, s.table_groups},
              {planes(b, states), s.unsigned_b, b_step, b_shift, s.b_groups},
              {planes(c, states), s.unsigned_c, c_step, c_shift, s.c_groups},
              table,
              d,
              {y, nullptr, s.groups * rows, rows},
              Order{s.length, false},
              scan_row_width(s.states)});
}

// The four directions of images: u, y (batch, channels / 4, height, width), delta (batch, channels,
// ..), B and C (batch, 4, states, ..), where channels counts all directions.
int qmir_ss2d_scan_q(const uint8_t* u, const float* u_step, const float* u_shift,
                     const uint8_t* delta, const uint8_t* b, const float* b_step,
                     const float* b_shift, const uint8_t* c, const float* c_step,
                     const float* c_shift, const float* table, const float* d,
                     const ScanShape* shape, int64_t height, int64_t width, float* y) {
  const ScanShape& s = *shape;
  const int64_t channels = s.channels / kDirections;
  const int64_t rows = channels * s.length, states = s.states * s.length;
  std::unique_ptr<uint8_t[]> kept[4];
  const auto planes = [&](int slot, const uint8_t* p, int64_t groups, int64_t group) {
    kept[slot] = scratch<uint8_t>(s.batch * groups * group);
    transpose_columns(p, kept[slot].get(), s.batch, groups, group / s.length, height, width);
    return Planes<const uint8_t>{p, kept[slot].get(), groups * group, groups == 1 ? 0 : group};
  };
  const auto parts = scratch<float>(s.batch * kDirections * rows);
  const Scan in{s,
                {planes(0, u, 1, rows), s.unsigned_u, u_step, u_shift, s.u_groups},
                {planes(1, delta, 4, rows), s.unsigned_delta, nullptr, nullptr, s.table_groups},
                {planes(2, b, 4, states), s.unsigned_b, b_step, b_shift, s.b_groups},
                {planes(3, c, 4, states), s.unsigned_c, c_step, c_shift, s.c_groups},
                table,
                d,
                {parts.get(), nullptr, kDirections * rows, rows},
                Order{s.length, true},
                scan_row_width(s.states)};
  const int outside = run(in);
  merge_directions(parts.get(), y, s.batch, channels, height, width);
  return outside;
}

}  // extern "C"
