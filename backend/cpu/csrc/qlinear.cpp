// Linear layer on int8 codes with packed weights. Output features are the lanes: the weight is
// unpacked once per call into unsigned bytes [K/4][O][4]; rows of x are broadcast as they lie.
#include <omp.h>

#include <algorithm>

#include "dot_tile.h"
#include "epilogue.h"
#include "moments.h"
#include "qlinear.cuh"

using namespace qmir;

namespace {

constexpr int64_t kRowBlock = 48;

struct Weight {
  int64_t features, inputs, padded, steps;
  bool narrow;
  uint32_t bias;  // of the codes in the lanes, which it makes unsigned and keeps narrow
  Scratch<uint8_t> lanes;
  Scratch<int32_t> sums;
  Scratch<int64_t> offset;

  Weight(const uint8_t* packed, int64_t bits, int64_t features, int64_t inputs)
      : features(features),
        inputs(inputs),
        padded(round_up(features, kDotLanes)),
        steps((inputs + 3) / 4),
        narrow(bits <= kNarrowBits),
        bias(narrow ? 1u << (kNarrowBits - 1) : kCodeBias),
        lanes(padded * steps * 4),
        sums(features),
        offset(steps) {
    Scratch<int8_t> codes(features * inputs);
    qmir_unpack(packed, codes.get(), features * inputs, bits);
    for (int64_t s = 0; s < steps; ++s) offset[s] = s * padded * 4;
#pragma omp parallel for if (features * inputs > 65536)
    for (int64_t o = 0; o < padded; ++o) fill(o, codes.get() + o * inputs);
  }

  int64_t lanes_size() const {
    return padded * steps * 4;
  }

  // Feature o of the panel; lanes beyond the last feature and codes beyond K meet zeros or are
  // never stored, but must not be read uninitialised.
  void fill(int64_t o, const int8_t* row) {
    const int64_t count = o < features ? inputs : 0;
    int32_t sum = 0;
    for (int64_t s = 0; s < steps; ++s) {
      uint32_t four = 0;
      std::memcpy(&four, row + 4 * s, count ? std::min<int64_t>(4, count - 4 * s) : 0);
      four = (four ^ kFourBiases) - 0x01010101u * (kCodeBias - bias);
      std::memcpy(&lanes[s * padded * 4 + o * 4], &four, 4);
    }
    for (int64_t k = 0; k < count; ++k) sum += row[k];
    if (o < features) sums[o] = sum;
  }
};

// Scales and constant of every (group, feature).
struct Affine {
  int64_t features;
  Scratch<float> acc_scale, sx_scale, constant;

  Affine(const Weight& w, int64_t groups, const float* x_step, const float* x_shift,
         int64_t w_steps, int64_t w_shifts, const float* w_step, const float* w_shift,
         const float* bias)
      : features(w.features),
        acc_scale(groups * features),
        sx_scale(groups * features),
        constant(groups * features) {
#pragma omp parallel for if (groups * features > 16384)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t o = 0; o < features; ++o) {
        const float step = w_step[w_steps > 1 ? o : 0], shift = w_shift[w_shifts > 1 ? o : 0];
        acc_scale[g * features + o] = x_step[g] * step;
        sx_scale[g * features + o] = x_step[g] * shift;
        constant[g * features + o] =
            affine_constant(w.inputs, w.sums[o], x_shift[g], step, shift, bias ? bias[o] : 0.0f);
      }
  }
};

// Sums of the codes of each row: a tile whose lanes all hold ones.
void row_sums(const int8_t* x, int64_t pitch, int64_t count, int64_t steps, int32_t* sums) {
  alignas(64) int32_t tile[kDotRows * kDotLanes];
  alignas(64) uint8_t ones[sizeof(dot_vec)];
  std::memset(ones, 1, sizeof ones);
  Scratch<int64_t> still(steps);
  std::fill_n(still.get(), steps, 0);
  for (int64_t r = 0; r < count; r += kDotRows) {
    const int64_t rows = std::min<int64_t>(kDotRows, count - r);
    dot_tiles(true).at[rows - 1][0](x + r * pitch, pitch, ones, still.get(), steps, tile);
    for (int64_t i = 0; i < rows; ++i) sums[r + i] = tile[i * kDotLanes];
  }
}

// Calls finish(row, first feature, number of features, biased sums) for each row of each tile of
// `count` rows of x.
template <class Finish>
void multiply(const int8_t* x, int64_t pitch, int64_t count, const Weight& w, int64_t first,
              int64_t last, const Finish& finish) {
  alignas(64) int32_t tile[kDotRows * kDotWidth];
  const DotTiles& products = dot_tiles(w.narrow);
  const int64_t all = (last - first + kDotLanes - 1) / kDotLanes;
  // Tiles of equal width: a narrow one at the end would cost almost as much as a full one.
  const int64_t tiles = (all + kDotVecs - 1) / kDotVecs, vecs = (all + tiles - 1) / tiles;
  for (int64_t o = first; o < last; o += vecs * kDotLanes) {
    const int64_t used = std::min(vecs, (last - o + kDotLanes - 1) / kDotLanes);
    const int64_t width = used * kDotLanes, n = std::min(width, last - o);
    for (int64_t r = 0; r < count; r += kDotRows) {
      const int64_t rows = std::min<int64_t>(kDotRows, count - r);
      products.at[rows - 1][used - 1](x + r * pitch, pitch, w.lanes.get() + o * 4, w.offset.get(),
                                      w.steps, tile);
      for (int64_t i = 0; i < rows; ++i) finish(r + i, o, n, tile + i * width);
    }
  }
}

// Rows in blocks that begin anew with each sample, where samples are told apart.
struct Rows {
  int64_t samples, of_sample;

  int64_t all() const {
    return samples * of_sample;
  }
  int64_t blocks() const {
    return (of_sample + kRowBlock - 1) / kRowBlock;
  }
};

// Blocks of rows, and of features where there are few rows, in parallel. Rows whose length is no
// multiple of 4 are copied with a tail of zeros, which a tile may read.
template <class Body>
void for_blocks(const int8_t* x, const Rows& rows, const Weight& w, const Body& body) {
  const int64_t row_blocks = rows.samples * rows.blocks();
  const int64_t splits = row_blocks < omp_get_max_threads() ? omp_get_max_threads() : 1;
  const int64_t width = round_up((w.features + splits - 1) / splits, kDotWidth);
  const int64_t column_blocks = (w.features + width - 1) / width;
#pragma omp parallel for collapse(2) schedule(static) if (rows.all() * w.lanes_size() > kParallelWork)
  for (int64_t rb = 0; rb < row_blocks; ++rb)
    for (int64_t cb = 0; cb < column_blocks; ++cb) {
      const int64_t in_sample = rb % rows.blocks() * kRowBlock;
      const int64_t first = rb / rows.blocks() * rows.of_sample + in_sample;
      const int64_t count = std::min(kRowBlock, rows.of_sample - in_sample);
      const int8_t* block = x + first * w.inputs;
      const int64_t pitch = w.steps * 4;
      Scratch<int8_t> copy(pitch == w.inputs ? 0 : count * pitch);
      if (pitch != w.inputs) {
        std::memset(copy.get(), 0, count * pitch);
        for (int64_t r = 0; r < count; ++r)
          std::memcpy(copy.get() + r * pitch, block + r * w.inputs, w.inputs);
        block = copy.get();
      }
      int32_t sums[kRowBlock];
      row_sums(block, pitch, count, w.steps, sums);
      body(block, pitch, first, count, cb * width, std::min(w.features, (cb + 1) * width), sums);
    }
}

}  // namespace

extern "C" {

void qmir_linear_acc(const int8_t* x, const uint8_t* weight, int64_t bits, int64_t rows,
                     int64_t inputs, int64_t features, int32_t* y) {
  const Weight w(weight, bits, features, inputs);
  for_blocks(x, {1, rows}, w,
             [&](const int8_t* block, int64_t pitch, int64_t row0, int64_t count, int64_t first,
                 int64_t last, const int32_t* sums) {
               multiply(block, pitch, count, w, first, last,
                        [&](int64_t r, int64_t o, int64_t n, const int32_t* acc) {
                          const uint32_t bias = w.bias * (uint32_t)sums[r];
                          int32_t* out = y + (row0 + r) * features + o;
                          for (int64_t j = 0; j < n; ++j)
                            out[j] = (int32_t)((uint32_t)acc[j] - bias);
                        });
             });
}

// rows = groups * rows_per_group; w_steps and w_shifts are 1 or `features`; bias, residual and
// residual_scale may be null. One group for each row (tokens with statistics of their own) computes
// its constants where it uses them: a table would be three times as large as the result. `moments`,
// of each feature in each of `samples`, may be null, and so may their offset.
void qmir_linear(const int8_t* x, const float* x_step, const float* x_shift, const uint8_t* weight,
                 const float* w_step, const float* w_shift, const float* bias,
                 const float* residual, const float* residual_scale, int64_t bits, int64_t groups,
                 int64_t rows_per_group, int64_t inputs, int64_t features, int64_t w_steps,
                 int64_t w_shifts, int64_t activation, int64_t samples, const float* moments_offset,
                 double* moments, float* y) {
  const Epilogue end{residual, residual_scale, (Activation)activation};
  const int64_t all = groups * rows_per_group;
  const Rows rows = moments ? Rows{samples, all / samples} : Rows{1, all};
  const MomentParts parts(rows.samples, features, rows.blocks(), moments_offset, moments);
  const Weight w(weight, bits, features, inputs);
  const bool per_row = rows_per_group == 1;
  const Affine affine(w, per_row ? 0 : groups, x_step, x_shift, w_steps, w_shifts, w_step, w_shift,
                      bias);
  for_blocks(
      x, rows, w,
      [&](const int8_t* block, int64_t pitch, int64_t row0, int64_t count, int64_t first,
          int64_t last, const int32_t* sums) {
        if (last - first == features)
          fetch_residuals(end, row0 * features, count * features);
        multiply(block, pitch, count, w, first, last,
                 [&](int64_t r, int64_t o, int64_t n, const int32_t* acc) {
                   const float sx = (float)sums[r];
                   const uint32_t bias_sum = w.bias * (uint32_t)sums[r];
                   const int64_t place = (row0 + r) * features + o;
                   float* out = y + place;
                   if (per_row) {
                     const float step = x_step[row0 + r], shift = x_shift[row0 + r];
                     for (int64_t j = 0; j < n; ++j) {
                       const float ws = w_step[w_steps > 1 ? o + j : 0];
                       const float wb = w_shift[w_shifts > 1 ? o + j : 0];
                       const float constant = affine_constant(inputs, w.sums[o + j], shift, ws, wb,
                                                              bias ? bias[o + j] : 0.0f);
                       out[j] = affine_result((int32_t)((uint32_t)acc[j] - bias_sum), sx, step * ws,
                                              step * wb, constant);
                     }
                     finish_channels(end, out, place, o, n);
                     return;
                   }
                   const int64_t at = (row0 + r) / rows_per_group * features + o;
                   const float *scale = &affine.acc_scale[at], *sx_scale = &affine.sx_scale[at];
                   const float* constant = &affine.constant[at];
#pragma omp simd
                   for (int64_t j = 0; j < n; ++j)
                     out[j] = affine_result((int32_t)((uint32_t)acc[j] - bias_sum), sx, scale[j],
                                            sx_scale[j], constant[j]);
                   finish_channels(end, out, place, o, n);
                 });
        if (parts.wanted())
          parts.add_rows(row0 / rows.of_sample, row0 % rows.of_sample / kRowBlock,
                         y + row0 * features, features, count, first, last);
      });
  parts.finish();
}

}  // extern "C"
