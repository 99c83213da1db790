// Layer norm, activation, gate and channel shift, the statistics of the result, and its codes: the
// float values in between live in registers, in a block of rows, or in the scratch of one group.
// A tensor is (batch, channels, pixels) with any strides. Codes lie channels last or channels first.
#include "activation_spans.h"
#include "directions.h"
#include "layer_norm.cuh"
#include "moments.h"

using namespace qmir;

namespace {

enum class Groups : int64_t { sample, token, tensor };

// Mirrors the array that backend/cpu/chain_quantize.py passes.
struct ChainShape {
  int64_t batch, channels, pixels;
  int64_t x_batch, x_channel, x_pixel;
  int64_t gate_batch, gate_channel, gate_pixel;
  int64_t channels_first;
  Groups groups;
  int64_t norm;
  Activation activation, gate_activation;
  int64_t quant_min, quant_max, cap;
  int64_t moments_chosen, moments_features;
};

struct ChainInput {
  const float *x, *norm_weight, *norm_bias, *gate, *offset;
  float eps;
};

// What the operator that made x found of its channels, and which of them x holds (all, where
// `channels` is null).
struct Given {
  const ChannelMoments* moments;
  const int64_t* channels;
  int64_t chosen, features;

  bool fits() const {
    for (int64_t i = 0; channels && i < chosen; ++i)
      if (channels[i] < 0 || channels[i] >= features) return false;
    return true;
  }

  Found predict(int64_t first_sample, int64_t samples, int64_t count,
                const Predictor& predictor) const {
    const double each = (double)count / (double)(samples * chosen);
    const auto at = [&](int64_t sample, int64_t i) {
      return moments[sample * features + (channels ? channels[i] : i)];
    };
    const ChannelMoments first = at(first_sample, 0);
    const float pivot = (float)first.mean;
    Moments all{0.0, 0.0, (float)first.low, (float)first.high};
    for (int64_t b = first_sample; b < first_sample + samples; ++b)
      for (int64_t i = 0; i < chosen; ++i) add_channel(all, pivot, at(b, i), each);
    const Prediction found = dls_predict(dls_statistics(all, pivot, count), predictor);
    return {found, dls_finite(all, found)};
  }
};

struct Strides {
  int64_t batch, channel, pixel;
};

constexpr int64_t kBlock = kLanes;  // pixels of one block of rows

int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

class Chain {
 public:
  Chain(const ChainShape& s, const ChainInput& in)
      : s_(s),
        in_(in),
        x_{s.x_batch, s.x_channel, s.x_pixel},
        gate_{s.gate_batch, s.gate_channel, s.gate_pixel} {}

  // Values of one group as they lie in memory, where there is nothing to compute.
  const float* direct(int64_t group) const {
    if (!plain() || in_.offset) return nullptr;
    const int64_t c = s_.channels, p = s_.pixels;
    const bool dense = s_.channels_first ? x_.pixel == 1 && (x_.channel == p || c == 1)
                                         : x_.channel == 1 && (x_.pixel == c || p == 1);
    const bool joined = s_.groups != Groups::tensor || s_.batch == 1 || x_.batch == c * p;
    return dense && joined ? in_.x + group * x_.batch : nullptr;
  }

  // Whether a value depends on nothing but x, the gate and the shift at its own place, and follows
  // its neighbour in memory: then values are made chunk by chunk, in the order of the statistics.
  bool by_chunk() const {
    return s_.channels_first && !s_.norm && x_.pixel == 1 && (!in_.gate || gate_.pixel == 1);
  }

  // Only a shift is added: cheaper to add it again than to keep the sum.
  bool plain() const {
    return !s_.norm && s_.activation == Activation::none && !in_.gate;
  }

  int64_t row_pitch() const { return padded(s_.channels); }

  // `count` values from position `at` of the samples from `first_sample` on, channels first.
  // `out` has kLanes floats to spare.
  void chunk(int64_t first_sample, int64_t at, int64_t count, float* out) const {
    alignas(64) float gate[kChunk + kLanes];
    for (int64_t done = 0; done < count;) {
      const int64_t plane = (at + done) / s_.pixels, p = (at + done) % s_.pixels;
      const int64_t b = first_sample + plane / s_.channels, c = plane % s_.channels;
      const int64_t n = std::min(count - done, s_.pixels - p);
      float* to = out + done;
      std::memcpy(to, in_.x + b * x_.batch + c * x_.channel + p, n * sizeof(float));
      pad(to, n);
      activate_span(s_.activation, to, n);
      if (in_.gate) {
        std::memcpy(gate, in_.gate + b * gate_.batch + c * gate_.channel + p, n * sizeof(float));
        pad(gate, n);
        activate_span(s_.gate_activation, gate, n);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] *= gate[i];
      }
      if (in_.offset) {
        const float offset = in_.offset[c];
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] += offset;
      }
      done += n;
    }
  }

  // `count` <= kBlock pixels from p on of one sample as rows of row_pitch() floats; `spare` holds
  // as many.
  void rows(int64_t b, int64_t p, int64_t count, float* out, float* spare) const {
    const int64_t pitch = row_pitch(), c = s_.channels;
    gather(in_.x + b * x_.batch + p * x_.pixel, x_, count, out);
    if (in_.gate) {
      gather(in_.gate + b * gate_.batch + p * gate_.pixel, gate_, count, spare);
      activate_span(s_.gate_activation, spare, count * pitch);
    }
    for (int64_t i = 0; i < count; ++i) {
      float* row = out + i * pitch;
      if (s_.norm) normalize(row);
      activate_span(s_.activation, row, c);
      const float* gate = spare + i * pitch;
      if (in_.gate) {
#pragma omp simd
        for (int64_t j = 0; j < c; ++j) row[j] *= gate[j];
      }
      if (in_.offset) {
#pragma omp simd
        for (int64_t j = 0; j < c; ++j) row[j] += in_.offset[j];
      }
    }
  }

  // The rows into their places of a group's values.
  void place(const float* from, int64_t p, int64_t count, float* sample) const {
    const int64_t pitch = row_pitch(), c = s_.channels;
    if (!s_.channels_first) {
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(sample + (p + i) * c, from + i * pitch, c * sizeof(float));
      return;
    }
    lanes tile[kLanes];
    for (int64_t first = 0; first < c; first += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i)
        tile[i] = i < count ? load(from + i * pitch + first) : lanes{};
      store_tile(sample + first * s_.pixels + p, s_.pixels,
                 (int)std::min<int64_t>(kLanes, c - first), (int)count, tile);
    }
  }

 private:
  static void pad(float* v, int64_t count) {
    std::memset(v + count, 0, (padded(count) - count) * sizeof(float));
  }

  // Pixels as rows, padded with zeros.
  void gather(const float* from, const Strides& by, int64_t count, float* out) const {
    const int64_t pitch = row_pitch(), c = s_.channels;
    if (by.channel == 1) {
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(out + i * pitch, from + i * by.pixel, c * sizeof(float));
        pad(out + i * pitch, c);
      }
    } else if (by.pixel == 1) {
      lanes tile[kLanes];
      for (int64_t first = 0; first < c; first += kLanes) {
        load_tile(from + first * by.channel, by.channel,
                  (int)std::min<int64_t>(kLanes, c - first), (int)count, tile);
        for (int64_t i = 0; i < count; ++i) store(out + i * pitch + first, tile[i]);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < c; ++j)
          out[i * pitch + j] = from[i * by.pixel + j * by.channel];
        pad(out + i * pitch, c);
      }
    }
  }

  void normalize(float* row) const {
    const int64_t c = s_.channels;
    const Moments m = moments_of(row, c, row[0]);
    const RowNorm norm = row_norm(m.sum, m.squares, row[0], c, in_.eps);
    const float *w = in_.norm_weight, *b = in_.norm_bias;
    if (w && b) {
      // Here the compiler knows of both that they are there, and makes vectors of it.
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) row[j] = norm_value(row[j], norm, w, b, j);
    } else {
      for (int64_t j = 0; j < c; ++j) row[j] = norm_value(row[j], norm, w, b, j);
    }
  }

  const ChainShape& s_;
  const ChainInput& in_;
  Strides x_, gate_;
};

struct Output {
  void* codes;
  float *step, *shift;
  bool wide;  // uint8 codes
  float low, high;

  void write(const float* v, int64_t at, int64_t count, const Prediction& found) const {
    const Grid grid{found.step, found.shift, low, high};
    if (wide)
      quantize(v, (uint8_t*)codes + at, count, grid);
    else
      quantize(v, (int8_t*)codes + at, count, grid);
  }
};

// A group for each row: everything about a row happens while it lies in the first-level cache.
void run_tokens(const ChainShape& s, const Chain& chain, const Predictor& predictor,
                const Output& out, std::vector<char>& finite) {
  const int64_t blocks = (s.pixels + kBlock - 1) / kBlock, pitch = chain.row_pitch();
  const int64_t chunks = chunks_of(s.channels);
#pragma omp parallel if (s.batch * s.channels * s.pixels >= kParallelFrom)
  {
    const auto rows = scratch<float>(2 * kBlock * pitch);
    std::vector<Moments> parts(chunks);
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t p = block * kBlock, count = std::min(kBlock, s.pixels - p);
        chain.rows(b, p, count, rows.get(), rows.get() + kBlock * pitch);
        for (int64_t i = 0; i < count; ++i) {
          const float* row = rows.get() + i * pitch;
          for (int64_t c = 0; c < chunks; ++c)
            parts[c] = moments_of(row + c * kChunk, min_of(kChunk, s.channels - c * kChunk), row[0]);
          const Found found = predict_group(parts.data(), s.channels, row[0], predictor);
          const int64_t token = b * s.pixels + p + i;
          out.step[token] = found.prediction.step;
          out.shift[token] = found.prediction.shift;
          finite[token] = found.finite;
          out.write(row, token * s.channels, s.channels, found.prediction);
        }
      }
  }
}

// The values of one group, made by the threads of a team.
class GroupValues {
 public:
  GroupValues(const ChainShape& s, const Chain& chain, int64_t samples, float* kept)
      : s_(s), chain_(chain), samples_(samples), kept_(kept) {}

  // Fills `kept` by blocks of pixels, where values cannot be made chunk by chunk.
  void fill(int64_t group, const Team& team) const {
    if (chain_.direct(group) || chain_.by_chunk()) return;
    const int64_t pitch = chain_.row_pitch();
    const auto rows = scratch<float>(2 * kBlock * pitch);
    const int64_t blocks = (s_.pixels + kBlock - 1) / kBlock, all = samples_ * blocks;
    for (int64_t i = all * team.rank / team.size; i < all * (team.rank + 1) / team.size; ++i) {
      const int64_t sample = group * samples_ + i / blocks, p = i % blocks * kBlock;
      const int64_t count = std::min(kBlock, s_.pixels - p);
      chain_.rows(sample, p, count, rows.get(), rows.get() + kBlock * pitch);
      chain_.place(rows.get(), p, count, kept_ + sample * s_.channels * s_.pixels);
    }
    team.meet();
  }

  // Values from position `at` of a group on; `local` holds a chunk. They are made on the first of
  // two visits, and on the second one where that is cheaper than to keep them.
  const float* chunk(int64_t group, int64_t at, int64_t count, bool again, float* local) const {
    if (const float* there = chain_.direct(group)) return there + at;
    const int64_t first = group * samples_;
    float* place = kept_ + first * s_.channels * s_.pixels + at;
    if (!chain_.by_chunk() || (again && !chain_.plain())) return place;
    chain_.chunk(first, at, count, local);
    if (chain_.plain()) return local;
    std::memcpy(place, local, count * sizeof(float));
    return place;
  }

  float first_value(int64_t group, float* local) const {
    if (chain_.direct(group) || !chain_.by_chunk()) return chunk(group, 0, 1, true, local)[0];
    chain_.chunk(group * samples_, 0, 1, local);
    return local[0];
  }

 private:
  const ChainShape& s_;
  const Chain& chain_;
  int64_t samples_;
  float* kept_;
};

void run_groups(const ChainShape& s, const Chain& chain, const Predictor& predictor,
                const Given& given, const Output& out, std::vector<char>& finite) {
  const int64_t groups = finite.size(), samples = s.batch / groups;
  const int64_t count = samples * s.channels * s.pixels, chunks = chunks_of(count);
  const bool keeps = !chain.direct(0) && !(chain.by_chunk() && chain.plain());
  const auto kept = scratch<float>(keeps ? groups * count : 0);
  std::vector<Moments> parts(given.moments ? 0 : groups * chunks);
  const GroupValues values(s, chain, samples, kept.get());
  for_groups(groups, count, [&](int64_t group, const Team& team) {
    alignas(64) float local[kChunk + kLanes];
    values.fill(group, team);
    const auto read_values = [&] {
      const float pivot = values.first_value(group, local);
      Moments* mine = parts.data() + group * chunks;
      team.share(count, [&](int64_t c, int64_t at, int64_t size) {
        mine[c] = moments_of(values.chunk(group, at, size, false, local), size, pivot);
      });
      team.meet();
      return predict_group(mine, count, pivot, predictor);
    };
    const Found found = given.moments
                            ? given.predict(group * samples, samples, count, predictor)
                            : read_values();
    if (team.rank == 0) {
      finite[group] = found.finite;
      out.step[group] = found.prediction.step;
      out.shift[group] = found.prediction.shift;
    }
    team.share(count, [&](int64_t, int64_t at, int64_t size) {
      out.write(values.chunk(group, at, size, true, local), group * count + at, size,
                found.prediction);
    });
  });
}

}  // namespace

extern "C" {

// Codes, step and shift. Any of norm_weight, norm_bias, gate and offset may be null; weights and
// offset have one value for each channel. `moments`, of `features` channels of each sample, stand for
// statistics where they are not null; `moments_channels` may be. Returns the first group that holds
// NaN or infinity, -1, or -2 where a channel is none of the features.
int64_t qmir_chain_quantize(const float* x, const float* norm_weight, const float* norm_bias,
                            const float* gate, const float* offset, const float* w, const float* v,
                            const double* moments, const int64_t* moments_channels,
                            const ChainShape* shape, double eps, void* codes, float* step,
                            float* shift) {
  const ChainShape& s = *shape;
  const ChainInput in{x, norm_weight, norm_bias, gate, offset, (float)eps};
  const Chain chain(s, in);
  const Predictor predictor{w, v, s.cap ? (float)(s.quant_max - s.quant_min + 1) : 0.0f};
  const Output out{codes, step, shift, s.quant_max > 127, (float)s.quant_min, (float)s.quant_max};
  const Given given{reinterpret_cast<const ChannelMoments*>(moments), moments_channels,
                    s.moments_chosen, s.moments_features};
  if (!given.fits()) return -2;
  const int64_t tokens = s.batch * s.pixels;
  std::vector<char> finite(s.groups == Groups::token    ? tokens
                           : s.groups == Groups::sample ? s.batch
                                                        : 1);
  if (s.groups == Groups::token)
    run_tokens(s, chain, predictor, out, finite);
  else
    run_groups(s, chain, predictor, given, out, finite);
  return first_bad(finite);
}

}  // extern "C"
