// Float lanes as one compiler vector of the widest register there is: 16 with AVX-512, 8 with AVX,
// 4 elsewhere. (g++ keeps a vector that is wider than the registers in memory, between any two
// operations.) The overloads here make the templates of cuda/include/*.cuh run on it; include
// this header before those, since templates find overloads of a builtin type only if declared first.
#pragma once
#include <cstdint>
#include <cstring>

#include "common.cuh"
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace qmir {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
// g++ 12 warns that the unmasked forms of some intrinsics read an undefined register.
constexpr uint16_t kAllLanes = 0xffff;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t lanes_i __attribute__((vector_size(4 * kLanes)));
typedef uint32_t lanes_u __attribute__((vector_size(4 * kLanes)));

QMIR_FN lanes load(const float* p) {
  lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

QMIR_FN void store(float* p, lanes v) { std::memcpy(p, &v, sizeof v); }

// lanes{} + x would add, since zero plus minus zero is another number.
QMIR_FN lanes broadcast(float x) {
#if defined(__AVX512F__)
  return (lanes)_mm512_set1_ps(x);
#elif defined(__AVX__)
  return (lanes)_mm256_set1_ps(x);
#else
  return lanes{x, x, x, x};
#endif
}

QMIR_FN lanes lane_abs(lanes a) { return (lanes)((lanes_i)a & 0x7fffffff); }

// The instructions return b where one is NaN, as the comparison does; g++ 12 makes two of it.
QMIR_FN lanes lane_max(lanes a, lanes b) {
#if defined(__AVX512F__)
  return (lanes)_mm512_maskz_max_ps(kAllLanes, (__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (lanes)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Largest magnitude; unlike lane_max it keeps a NaN, whose bits exceed those of infinity.
QMIR_FN lanes lane_max_abs(lanes largest, lanes x) {
  const lanes_i a = (lanes_i)largest, b = (lanes_i)lane_abs(x);
#if defined(__AVX512F__)
  return (lanes)_mm512_maskz_max_epi32(kAllLanes, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (lanes)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return (lanes)(a > b ? a : b);
#endif
}

QMIR_FN lanes lane_min(lanes a, lanes b) {
#if defined(__AVX512F__)
  return (lanes)_mm512_maskz_min_ps(kAllLanes, (__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (lanes)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

QMIR_FN lanes fmadd(lanes a, lanes b, lanes c) {
#if defined(__AVX512F__)
  return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

QMIR_FN lanes scale_by_magic(lanes value, lanes shifted) {
  return (lanes)((lanes_u)value + ((lanes_u)shifted << 23));
}

QMIR_FN bool all_of(lanes_i mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) == kAllLanes;
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)mask) == 0xff;
#else
  bool all = true;
  for (int j = 0; j < kLanes; ++j) all &= mask[j] != 0;
  return all;
#endif
}

// Sum of the lanes, always in the same tree order.
QMIR_FN float reduce_add(lanes v) {
  float x[kLanes];
  store(x, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

// Narrower vectors have half the registers, and unrolling spills them.
#if defined(__AVX512F__)
#define QMIR_UNROLL _Pragma("GCC unroll 16")
#else
#define QMIR_UNROLL
#endif

// Out of line: inlined at each use, these multiply the time to compile.
#define QMIR_OUTLINE static __attribute__((noinline, unused))

// Transpose a square of lanes in place.
#if defined(__AVX512F__)
// Four rounds of interleaving rows i and i + 8.
QMIR_OUTLINE void transpose(lanes (&r)[kLanes]) {
  constexpr lanes_i low{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr lanes_i high{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  lanes t[kLanes];
QMIR_UNROLL
  for (int round = 0; round < 4; ++round) {
QMIR_UNROLL
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = __builtin_shuffle(r[i], r[i + 8], low);
      t[2 * i + 1] = __builtin_shuffle(r[i], r[i + 8], high);
    }
    std::memcpy(r, t, sizeof t);
  }
}
#elif defined(__AVX__)
QMIR_OUTLINE void transpose(lanes (&r)[kLanes]) {
  __m256 t[kLanes], pair[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    pair[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    pair[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    pair[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    pair[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = (lanes)_mm256_permute2f128_ps(pair[i], pair[i + 4], 0x20);
    r[i + 4] = (lanes)_mm256_permute2f128_ps(pair[i], pair[i + 4], 0x31);
  }
}
#else
QMIR_OUTLINE void transpose(lanes (&r)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float kept = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = kept;
    }
}
#endif

// tile[j] = the `rows` values src[0 * stride + j] .. src[(rows - 1) * stride + j], lanes above
// `rows` and columns from `cols` on are zero.
QMIR_OUTLINE void load_tile(const float* src, int64_t stride, int rows, int cols,
                            lanes (&tile)[kLanes]) {
  if (cols == kLanes) {
    for (int i = 0; i < kLanes; ++i) tile[i] = i < rows ? load(src + i * stride) : lanes{};
  } else {
    float buffer[kLanes] = {};
    for (int i = 0; i < kLanes; ++i) {
      if (i < rows) std::memcpy(buffer, src + i * stride, cols * sizeof(float));
      tile[i] = i < rows ? load(buffer) : lanes{};
    }
  }
  transpose(tile);
}

// The inverse of load_tile: rows and columns beyond the given counts are not written.
QMIR_OUTLINE void store_tile(float* dst, int64_t stride, int rows, int cols, lanes (&tile)[kLanes]) {
  transpose(tile);
  for (int i = 0; i < rows; ++i) {
    if (cols == kLanes)
      store(dst + i * stride, tile[i]);
    else
      std::memcpy(dst + i * stride, &tile[i], cols * sizeof(float));
  }
}

}  // namespace qmir
