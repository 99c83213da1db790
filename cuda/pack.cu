// Packing of integer codes: 16 of them for each thread, and the last, partial 16 one by one.
#include "vectors.cuh"

using namespace qmir;

namespace {

constexpr int kCodes = 16;

QMIR_DEVICE int64_t first_code() {
  return ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * kCodes;
}

template <int kBits>
QMIR_DEVICE void pack(const int8_t* codes, uint8_t* packed, int64_t numel) {
  const int64_t at = first_code();
  if (at >= numel) return;
  int8_t mine[kCodes] = {};
  uint8_t* to = packed + at * kBits / 8;
  if (at + kCodes <= numel) {
    load_values(mine, codes + at);
    pack_store<kBits>(to, mine);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCodes; ++i)
    if (at + i < numel) mine[i] = codes[at + i];
#pragma unroll
  for (int i = 0; i < kCodes; i += 8 / kBits)
    if (at + i < numel) to[i * kBits / 8] = pack_byte<kBits>(mine + i);
}

template <int kBits>
QMIR_DEVICE void unpack(const uint8_t* packed, int8_t* codes, int64_t numel) {
  const int64_t at = first_code();
  if (at >= numel) return;
  const uint8_t* from = packed + at * kBits / 8;
  uint8_t bytes[kCodes * kBits / 8];
  int8_t mine[kCodes];
  const auto widen = [&] {
#pragma unroll
    for (int i = 0; i < kCodes; ++i)
      mine[i] = unpack_code<kBits>(bytes[i * kBits / 8], i % (8 / kBits));
  };
  if (at + kCodes <= numel) {
    load_values(bytes, from);
    widen();
    store_values(codes + at, mine);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCodes * kBits / 8; ++i)
    bytes[i] = at + i * (8 / kBits) < numel ? from[i] : (uint8_t)0;
  widen();
#pragma unroll
  for (int i = 0; i < kCodes; ++i)
    if (at + i < numel) codes[at + i] = mine[i];
}

}  // namespace

#define QMIR_PACK(bits)                                                                \
  extern "C" __global__ void qmir_pack_b##bits(const int8_t* codes, uint8_t* packed,   \
                                               int64_t numel) {                        \
    pack<bits>(codes, packed, numel);                                                  \
  }                                                                                    \
  extern "C" __global__ void qmir_unpack_b##bits(const uint8_t* packed, int8_t* codes, \
                                                 int64_t numel) {                      \
    unpack<bits>(packed, codes, numel);                                                \
  }

QMIR_PACK(2)
QMIR_PACK(4)
QMIR_PACK(8)
