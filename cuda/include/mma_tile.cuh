// Products of integer codes on the tensor cores. A sum over k does not depend on the order of k, so
// codes lie in memory in the order that makes them cheap to widen: eight neighbouring codes (an
// octet) are either two words of bytes, the even ones and the odd ones, or one word of nibbles.
// Both operands use it, and lane t of a quad holds octets t and t + 4 of a step of 64.
//
// Nibbles widen to 16 times their value by one mask, without sign extension: sums of products are
// then 16 times too large and still fit, since 16 * [-8, 7] lies in the range of a byte.
//
// Compute capability 8.x multiplies 4-bit operands by itself; elsewhere the instruction is emulated
// and slower than the 8-bit one. Tests choose with QMIR_NATIVE_S4.
#pragma once
#include "device.cuh"

#if !defined(QMIR_NATIVE_S4)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define QMIR_NATIVE_S4 1
#else
#define QMIR_NATIVE_S4 0
#endif
#endif

namespace qmir {

constexpr bool kNativeS4 = QMIR_NATIVE_S4 != 0;
// Codes of one step along k, and the octets they make.
constexpr int kStepCodes = 64;
constexpr int kStepOctets = kStepCodes / 8;
constexpr int32_t kOnes = 0x01010101;

struct Octet {
  uint32_t even, odd;
};

struct Nibbles {
  uint32_t word;
};

// Eight codes in their order, four to a word.
QMIR_DEVICE Octet octet_of(uint32_t first, uint32_t second) {
  return {__byte_perm(first, second, 0x6420), __byte_perm(first, second, 0x7531)};
}

QMIR_DEVICE Octet widen(Octet codes) {
  return codes;
}
QMIR_DEVICE Octet widen(Nibbles codes) {
  return {codes.word << 4 & 0xf0f0f0f0u, codes.word & 0xf0f0f0f0u};
}

// The low nibbles, all there is of codes for which `beyond_nibbles` is 0.
QMIR_DEVICE uint32_t narrow(Octet codes) {
  return (codes.even & 0x0f0f0f0fu) | (codes.odd & 0x0f0f0f0fu) << 4;
}
QMIR_DEVICE uint32_t narrow(Nibbles codes) {
  return codes.word;
}

// Not 0 where one of four codes lies outside [-8, 7]: where its bits 3 to 7 are not all equal.
QMIR_DEVICE uint32_t beyond_nibbles(uint32_t word) {
  return (word ^ word << 1) & 0xf0f0f0f0u;
}

// log2 of what `widen` multiplies the codes by.
template <class Codes>
constexpr int kWidenedBits = 0;
template <>
constexpr int kWidenedBits<Nibbles> = 4;

// Sum of the codes of an octet, times 2^kWidenedBits.
template <class Codes>
QMIR_DEVICE int32_t add_codes(Codes codes, int32_t sum) {
  const Octet wide = widen(codes);
  return __dp4a((int32_t)wide.even, kOnes, __dp4a((int32_t)wide.odd, kOnes, sum));
}

// d += a * b over 64 codes (32 where `halves` is 1), times 2^kWidenedBits of either operand. With
// g = lane / 4 and t = lane % 4, a holds the octets t of rows g and g + 8 and then t + 4 of both; b
// holds the octets t and t + 4 of column g.
template <class A, class B>
QMIR_DEVICE void multiply_s8(int32_t (&d)[4], const A (&a)[4], const B (&b)[2], int halves = 2) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (h >= halves) break;
    const Octet top = widen(a[2 * h]), bottom = widen(a[2 * h + 1]), column = widen(b[h]);
    const uint32_t rows[4] = {top.even, bottom.even, top.odd, bottom.odd};
    const uint32_t columns[2] = {column.even, column.odd};
    mma_s8_m16n8k32(d, rows, columns);
  }
}

// The same for codes that all fit 4 bits; products keep their size.
template <class A, class B>
QMIR_DEVICE void multiply_s4(int32_t (&d)[4], const A (&a)[4], const B (&b)[2]) {
  const uint32_t rows[4] = {narrow(a[0]), narrow(a[1]), narrow(a[2]), narrow(a[3])};
  const uint32_t columns[2] = {narrow(b[0]), narrow(b[1])};
  mma_s4_m16n8k64(d, rows, columns);
}

// Place of an octet in a tile of rows of 64 codes in shared memory, such that neither a fragment
// (four neighbouring rows, four octets) nor a column of 16 rows meets a bank twice.
QMIR_DEVICE int tile_place(int row, int octet, const Octet*) {
  return row * kStepOctets + (octet ^ ((row >> 1 & 1) << 2 | (row >> 2 & 3)));
}

// The same for a fragment of nibbles: eight rows, four octets.
QMIR_DEVICE int tile_place(int row, int octet, const Nibbles*) {
  return row * kStepOctets + (octet ^ (row >> 2 & 1) << 2);
}

template <class Codes>
QMIR_DEVICE void load_column(Codes (&b)[2], const Codes* tile, int row, int t) {
  const int place = tile_place(row, t, tile);
  b[0] = tile[place];
  b[1] = tile[place ^ 4];
}

template <class Codes>
QMIR_DEVICE void load_rows(Codes (&a)[4], const Codes* tile, int row, int t) {
  const int top = tile_place(row, t, tile), bottom = tile_place(row + 8, t, tile);
  a[0] = tile[top];
  a[1] = tile[bottom];
  a[2] = tile[top ^ 4];
  a[3] = tile[bottom ^ 4];
}

// Whether the products of a block are still those of 4-bit operands. Once a step holds a code that
// does not fit, the sums so far take the scale of the 8-bit products, and the block stays there.
template <class Codes>
struct Precision {
  bool narrow = kNativeS4 && kWidenedBits<Codes> > 0;

  // Every thread of the block meets here; `beyond` is what it has seen of the next step.
  template <int kCount>
  QMIR_DEVICE void meet(uint32_t beyond, int32_t (&acc)[kCount][4]) {
    if (!narrow) {
      __syncthreads();
      return;
    }
    if (!__syncthreads_or(beyond != 0)) return;
    narrow = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] = acc[i][j] * (1 << kWidenedBits<Codes>);
  }

  QMIR_DEVICE int32_t sum(int32_t acc) const {
    return narrow ? acc : acc >> kWidenedBits<Codes>;
  }
};

// A stream of packed codes: bits from any position, zeros beyond its end. The start is aligned.
struct Stream {
  const uint8_t* data;
  int64_t bytes;

  QMIR_DEVICE uint32_t word(int64_t at) const {
    if (4 * at + 4 <= bytes) return reinterpret_cast<const uint32_t*>(data)[at];
    uint32_t found = 0;
#pragma unroll 1
    for (int64_t i = 4 * at; i < bytes; ++i) found |= (uint32_t)data[i] << 8 * (int)(i - 4 * at);
    return found;
  }

  // `count` <= 32 bits from position `bit` on, in the low bits; what lies above them is undefined.
  QMIR_DEVICE uint32_t bits(int64_t bit, int count) const {
    const int shift = (int)(bit & 31);
    const uint32_t low = word(bit >> 5) >> shift;
    return shift + count <= 32 ? low : low | word((bit >> 5) + 1) << (32 - shift);
  }
};

// 2-bit codes in the low half of a word as nibbles, sign-extended.
QMIR_DEVICE uint32_t widen_pairs(uint32_t word) {
  word = (word | word << 8) & 0x00ff00ffu;
  word = (word | word << 4) & 0x0f0f0f0fu;
  word = (word | word << 2) & 0x33333333u;
  const uint32_t sign = word & 0x22222222u;
  return word | sign << 1 | sign << 2;
}

// The bits of the first `count` of `word`'s fields.
QMIR_DEVICE uint32_t first_fields(uint32_t word, int count, int width) {
  const int bits = count * width;
  return bits >= 32 ? word : bits <= 0 ? 0u : word & ((1u << bits) - 1);
}

// Eight codes of `bits` (8, or 2 or 4 for nibbles) from index `at` of a stream, of which `count`
// count and the rest is 0.
template <class Codes>
QMIR_DEVICE Codes load_codes(const Stream& stream, int bits, int64_t at, int count) {
  if (count <= 0) return Codes{};
  const int64_t bit = at * bits;
  if constexpr (kWidenedBits<Codes> == 0) {
    const uint32_t first = first_fields(stream.bits(bit, 32), count, 8);
    const uint32_t second = count > 4 ? first_fields(stream.bits(bit + 32, 32), count - 4, 8) : 0u;
    return octet_of(first, second);
  } else {
    const uint32_t fields = first_fields(stream.bits(bit, 8 * bits), min_of(count, 8), bits);
    return Nibbles{bits == 4 ? fields : widen_pairs(fields)};
  }
}

// Two neighbouring results, for one store.
QMIR_DEVICE int2 pair_of(int32_t a, int32_t b) {
  return make_int2(a, b);
}
QMIR_DEVICE float2 pair_of(float a, float b) {
  return make_float2(a, b);
}

}  // namespace qmir
