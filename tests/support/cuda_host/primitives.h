// Barriers, shuffles, votes, tensor-core products and asynchronous copies, on the threads of
// block.h. Fragment layouts are those of the PTX manual for mma.m16n8k32 and mma.m16n8k64.
#pragma once
#include "block.h"

// Filled in where a function is called, so that errors name that line.
#define QMIR_HERE qmir_host::Place place = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(QMIR_HERE) { qmir_host::barrier("__syncthreads", 0, place); }

inline int __syncthreads_count(int predicate, QMIR_HERE) {
  return qmir_host::barrier("__syncthreads_count", predicate, place);
}

inline int __syncthreads_or(int predicate, QMIR_HERE) {
  return qmir_host::barrier("__syncthreads_or", predicate, place) != 0;
}

inline int __syncthreads_and(int predicate, QMIR_HERE) {
  return qmir_host::barrier("__syncthreads_and", !predicate, place) == 0;
}

namespace qmir_host {

template <class T>
struct Shuffle {
  T value;
  int source;
};

template <class T>
T shuffle(const char* kind, unsigned mask, T value, int source, Place place) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  return collective<Shuffle<T>, T>(kind, mask, {value, source}, place, [&](Thread** lanes) {
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      const int from = input<Shuffle<T>>(lanes[i]).source;
      if (!lanes[from])
        fail("%s at line %d: lane %d reads lane %d, which is not in the mask %08x", kind,
             place.line, i, from, mask);
      answer(lanes[i], input<Shuffle<T>>(lanes[from]).value);
    }
  });
}

// First lane of the segment of `width` lanes.
inline int segment(int width) { return lane() / width * width; }

template <class In, class Fold>
In vote(const char* kind, unsigned mask, In in, Place place, const Fold& fold) {
  return collective<In, In>(kind, mask, in, place, [&](Thread** lanes) {
    bool first = true;
    In all{};
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      all = first ? input<In>(lanes[i]) : fold(all, input<In>(lanes[i]));
      first = false;
    }
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) answer(lanes[i], all);
  });
}

}  // namespace qmir_host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, QMIR_HERE) {
  const int from = qmir_host::segment(width) + (source & (width - 1));
  return qmir_host::shuffle("__shfl_sync", mask, value, from, place);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, QMIR_HERE) {
  const int from = qmir_host::lane() ^ bits;
  const bool beyond = from >= qmir_host::segment(width) + width;
  return qmir_host::shuffle("__shfl_xor_sync", mask, value, beyond ? qmir_host::lane() : from,
                            place);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, QMIR_HERE) {
  const int from = qmir_host::lane() - (int)delta;
  const bool beyond = from < qmir_host::segment(width);
  return qmir_host::shuffle("__shfl_up_sync", mask, value, beyond ? qmir_host::lane() : from,
                            place);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, QMIR_HERE) {
  const int from = qmir_host::lane() + (int)delta;
  const bool beyond = from >= qmir_host::segment(width) + width;
  return qmir_host::shuffle("__shfl_down_sync", mask, value, beyond ? qmir_host::lane() : from,
                            place);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, QMIR_HERE) {
  qmir_host::vote("__syncwarp", mask, 0, place, [](int a, int) { return a; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, QMIR_HERE) {
  const unsigned mine = predicate ? 1u << qmir_host::lane() : 0u;
  return qmir_host::vote("__ballot_sync", mask, mine, place,
                         [](unsigned a, unsigned b) { return a | b; });
}

inline int __any_sync(unsigned mask, int predicate, QMIR_HERE) {
  return qmir_host::vote("__any_sync", mask, (int)(predicate != 0), place,
                         [](int a, int b) { return a | b; });
}

inline int __all_sync(unsigned mask, int predicate, QMIR_HERE) {
  return qmir_host::vote("__all_sync", mask, (int)(predicate != 0), place,
                         [](int a, int b) { return a & b; });
}

#define QMIR_REDUCE(name, expression)                                                    \
  template <class T>                                                                     \
  T name(unsigned mask, T value, QMIR_HERE) {                                            \
    static_assert(std::is_integral_v<T> && sizeof(T) == 4);                              \
    return qmir_host::vote(#name, mask, value, place, [](T a, T b) { return expression; }); \
  }

QMIR_REDUCE(__reduce_add_sync, (T)((unsigned)a + (unsigned)b))
QMIR_REDUCE(__reduce_min_sync, std::min(a, b))
QMIR_REDUCE(__reduce_max_sync, std::max(a, b))

namespace qmir_host {

struct MmaIn {
  uint32_t a[4], b[2];
  int32_t d[4];
};

struct Words {
  uint32_t at[4];
};

template <int kBits>
int32_t field(uint32_t word, int i) {
  return (int32_t)(word << (32 - kBits * (i + 1))) >> (32 - kBits);
}

// kDepth = 32 for 8 bits, 64 for 4: in both cases a register holds kDepth / 8 elements.
template <int kBits>
void multiply(const char* kind, int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              Place place) {
  constexpr int kEach = 32 / kBits, kDepth = 8 * kEach;
  MmaIn in;
  std::memcpy(in.a, a, sizeof in.a);
  std::memcpy(in.b, b, sizeof in.b);
  std::memcpy(in.d, d, sizeof in.d);
  const auto out = collective<MmaIn, Words>(kind, 0xffffffffu, in, place, [&](Thread** lanes) {
    int32_t left[16][kDepth], right[kDepth][8];
    for (int i = 0; i < 32; ++i) {
      if (lanes[i]->place.line != place.line) fail("%s: lanes are at different calls", kind);
      const auto& from = input<MmaIn>(lanes[i]);
      const int group = i / 4, rank = i % 4;
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < kEach; ++e)
          left[group + 8 * (r % 2)][rank * kEach + e + kDepth / 2 * (r / 2)] =
              field<kBits>(from.a[r], e);
      for (int r = 0; r < 2; ++r)
        for (int e = 0; e < kEach; ++e)
          right[rank * kEach + e + kDepth / 2 * r][group] = field<kBits>(from.b[r], e);
    }
    for (int i = 0; i < 32; ++i) {
      Words result;
      for (int r = 0; r < 4; ++r) {
        const int row = i / 4 + 8 * (r / 2), column = i % 4 * 2 + r % 2;
        uint32_t sum = (uint32_t)input<MmaIn>(lanes[i]).d[r];
        for (int k = 0; k < kDepth; ++k) sum += (uint32_t)(left[row][k] * right[k][column]);
        result.at[r] = sum;
      }
      answer(lanes[i], result);
    }
  });
  std::memcpy(d, out.at, sizeof d);
}

template <int kMatrices>
void load_matrix(const char* kind, uint32_t* r, const void* row, Place place) {
  const auto out =
      collective<const void*, Words>(kind, 0xffffffffu, row, place, [&](Thread** lanes) {
        for (int i = 0; i < 32; ++i) {
          Words words{};
          for (int m = 0; m < kMatrices; ++m) {
            const auto* from =
                static_cast<const unsigned char*>(input<const void*>(lanes[8 * m + i / 4]));
            if ((uintptr_t)from % 16) fail("%s: row of lane %d is misaligned", kind, 8 * m + i / 4);
            std::memcpy(&words.at[m], from + i % 4 * 4, 4);
          }
          answer(lanes[i], words);
        }
      });
  std::memcpy(r, out.at, 4 * kMatrices);
}

}  // namespace qmir_host

#define QMIR_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(qmir_host::machine.dynamic_shared)

namespace qmir {

inline void mma_s8_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            QMIR_HERE) {
  qmir_host::multiply<8>("mma_s8_m16n8k32", d, a, b, place);
}

inline void mma_s4_m16n8k64(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            QMIR_HERE) {
  qmir_host::multiply<4>("mma_s4_m16n8k64", d, a, b, place);
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* row, QMIR_HERE) {
  qmir_host::load_matrix<4>("load_matrix_x4", r, row, place);
}

inline void load_matrix_x2(uint32_t (&r)[2], const void* row, QMIR_HERE) {
  qmir_host::load_matrix<2>("load_matrix_x2", r, row, place);
}

// Copies happen as late as CUDA allows, when they are waited for: whoever reads earlier sees the
// garbage that was there before.
template <int kBytes>
void copy_async(void* shared, const void* global, int valid = kBytes, QMIR_HERE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if ((uintptr_t)shared % kBytes || (uintptr_t)global % kBytes)
    qmir_host::fail("copy_async at line %d: an address is not a multiple of %d", place.line, kBytes);
  if (valid < 0 || valid > kBytes)
    qmir_host::fail("copy_async at line %d: %d of %d bytes are valid", place.line, valid, kBytes);
  qmir_host::self().copies.back().push_back({shared, global, kBytes, valid});
}

inline void commit_copies() { qmir_host::self().copies.emplace_back(); }

template <int kPending>
void wait_copies() {
  auto& groups = qmir_host::self().copies;  // the last one is open and not waited for
  while ((int)groups.size() - 1 > kPending) {
    for (const qmir_host::Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(static_cast<unsigned char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
    }
    groups.erase(groups.begin());
  }
}

inline float bf16_to_float(uint16_t bits) { return __uint_as_float((unsigned)bits << 16); }

inline uint16_t float_to_bf16(float x) {
  if (x != x) return 0x7fff;
  const unsigned bits = __float_as_uint(x);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace qmir
