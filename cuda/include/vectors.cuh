// Several neighbouring values for each thread, moved in as few accesses as their bytes allow;
// memory is aligned to the bytes of one access.
#pragma once
#include "device.cuh"
#include "pack.cuh"

namespace qmir {

template <int kBytes>
struct WordOf {
  using type = uint8_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

template <int kBytes>
using Word = typename WordOf<kBytes % 16 == 0 ? 16 : kBytes>::type;

template <int kCount, class T>
QMIR_DEVICE void load_values(T (&values)[kCount], const T* from) {
  using Access = Word<(int)sizeof(T) * kCount>;
  constexpr int kEach = sizeof(Access) < sizeof(T) ? 0 : (int)(sizeof(Access) / sizeof(T));
  if constexpr (kEach <= 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = from[i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += kEach) {
      const Access word = *reinterpret_cast<const Access*>(from + i);
      memcpy(&values[i], &word, sizeof word);
    }
  }
}

template <int kCount, class T>
QMIR_DEVICE void store_values(T* to, const T (&values)[kCount]) {
  using Access = Word<(int)sizeof(T) * kCount>;
  constexpr int kEach = sizeof(Access) < sizeof(T) ? 0 : (int)(sizeof(Access) / sizeof(T));
  if constexpr (kEach <= 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = values[i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += kEach) {
      Access word;
      memcpy(&word, &values[i], sizeof word);
      *reinterpret_cast<Access*>(to + i) = word;
    }
  }
}

// kCount codes, whole bytes of them, packed.
template <int kBits, int kCount>
QMIR_DEVICE void pack_store(uint8_t* to, const int8_t (&codes)[kCount]) {
  constexpr int kPerByte = 8 / kBits, kBytes = kCount / kPerByte;
  uint8_t packed[kBytes];
#pragma unroll
  for (int i = 0; i < kBytes; ++i) packed[i] = pack_byte<kBits>(codes + i * kPerByte);
  store_values(to, packed);
}

}  // namespace qmir
