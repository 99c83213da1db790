// Register-blocked int8 dot products. One operand ("rows") is signed and is broadcast four codes at
// a time; the other ("lanes") holds code + 128 as unsigned bytes, [step][lane][4], so that one
// instruction (AVX-512 VNNI, AVX-VNNI) adds four products to each int32 lane. The caller takes the
// 128 * sum(rows) off again; all sums are modulo 2^32, so the true result is exact. Operands whose
// products in pairs stay below 2^15 ("narrow": one of them has at most 4 bits) need a third of the
// instructions where there is no VNNI.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

extern "C" void qmir_unpack(const uint8_t* packed, int8_t* codes, int64_t numel, int64_t bits);

namespace qmir {

constexpr int kDotRows = 6;
constexpr int kCodeBias = 128;
constexpr uint32_t kFourBiases = 0x80808080u;
constexpr int64_t kNarrowBits = 4;
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
constexpr bool kNarrowHelps = true;
#else
constexpr bool kNarrowHelps = false;
#endif
constexpr int64_t kParallelWork = 1 << 18;  // products below which one thread is faster

#if defined(__AVX512VNNI__)
typedef __m512i dot_vec;
constexpr int kDotVecs = 4;
static inline dot_vec dot_splat(int32_t four) {
  return _mm512_set1_epi32(four);
}
template <bool kNarrow>
static inline dot_vec dot4(dot_vec acc, dot_vec lanes, dot_vec row) {
  return _mm512_dpbusd_epi32(acc, lanes, row);
}
#elif defined(__AVX2__)
typedef __m256i dot_vec;
constexpr int kDotVecs = 2;
static inline dot_vec dot_splat(int32_t four) {
  return _mm256_set1_epi32(four);
}
template <bool kNarrow>
static inline dot_vec dot4(dot_vec acc, dot_vec lanes, dot_vec row) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(acc, lanes, row);
#else
  if constexpr (kNarrow)
    return _mm256_add_epi32(
        acc, _mm256_madd_epi16(_mm256_maddubs_epi16(lanes, row), _mm256_set1_epi16(1)));
  // maddubs would saturate: even and odd bytes apart, each pair of 16-bit products is exact.
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(lanes, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(row, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(lanes, 8), _mm256_srai_epi16(row, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
#endif
}
#else
typedef int32_t dot_vec __attribute__((vector_size(16)));
constexpr int kDotVecs = 2;
static inline dot_vec dot_splat(int32_t four) {
  return dot_vec{} + four;
}
template <bool kNarrow>
static inline dot_vec dot4(dot_vec acc, dot_vec lanes, dot_vec row) {
  acc += (lanes & 255) * ((row << 24) >> 24);
  acc += ((lanes >> 8) & 255) * ((row << 16) >> 24);
  acc += ((lanes >> 16) & 255) * ((row << 8) >> 24);
  return acc + ((lanes >> 24) & 255) * (row >> 24);
}
#endif

constexpr int kDotLanes = sizeof(dot_vec) / sizeof(int32_t);
constexpr int kDotWidth = kDotVecs * kDotLanes;  // lanes of the widest tile

static inline dot_vec dot_load(const uint8_t* p) {
  dot_vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// out[r][lane] = sum over steps and the four codes of each of lanes * rows. Step s reads the four
// codes at rows + r * pitch + 4 * s and kVecs vectors at lanes + offset[s].
template <bool kNarrow, int kRows, int kVecs>
void dot_tile(const int8_t* rows, int64_t pitch, const uint8_t* lanes, const int64_t* offset,
              int64_t steps, int32_t* out) {
  dot_vec acc[kRows][kVecs] = {};
  for (int64_t s = 0; s < steps; ++s) {
    const uint8_t* base = lanes + offset[s];
    dot_vec v[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) v[j] = dot_load(base + j * sizeof(dot_vec));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      std::memcpy(&four, rows + r * pitch + 4 * s, sizeof four);
      const dot_vec row = dot_splat(four);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) acc[r][j] = dot4<kNarrow>(acc[r][j], v[j], row);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j)
      std::memcpy(out + (r * kVecs + j) * kDotLanes, &acc[r][j], sizeof(dot_vec));
}

typedef void (*DotTile)(const int8_t*, int64_t, const uint8_t*, const int64_t*, int64_t, int32_t*);

struct DotTiles {
  DotTile at[kDotRows][kDotVecs];
};

template <bool kNarrow, int... kIndex>
constexpr DotTiles make_dot_tiles(std::integer_sequence<int, kIndex...>) {
  DotTiles tiles{};
  ((tiles.at[kIndex / kDotVecs][kIndex % kDotVecs] =
        dot_tile<kNarrow, kIndex / kDotVecs + 1, kIndex % kDotVecs + 1>),
   ...);
  return tiles;
}

template <bool kNarrow>
constexpr DotTiles kDotTiles =
    make_dot_tiles<kNarrow>(std::make_integer_sequence<int, kDotRows * kDotVecs>{});

static inline const DotTiles& dot_tiles(bool narrow) {
  return narrow ? kDotTiles<kNarrowHelps> : kDotTiles<false>;
}

// Uninitialised memory on a cache line, freed at the end of the scope.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {}
  ~Scratch() {
    std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const {
    return data_;
  }
  T& operator[](int64_t i) const {
    return data_[i];
  }

 private:
  T* data_;
};

static inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace qmir
