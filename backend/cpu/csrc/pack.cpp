// Packing of integer codes on the CPU: memory-bound, one thread.
#include "pack.cuh"

using namespace qmir;

namespace {

template <int kBits>
void pack_all(const int8_t* codes, uint8_t* packed, int64_t numel) {
  constexpr int kPerByte = 8 / kBits;
  const int64_t whole = numel / kPerByte;
  for (int64_t i = 0; i < whole; ++i) packed[i] = pack_byte<kBits>(codes + i * kPerByte);
  if (whole * kPerByte == numel) return;
  int8_t last[kPerByte] = {};
  for (int64_t i = whole * kPerByte; i < numel; ++i) last[i - whole * kPerByte] = codes[i];
  packed[whole] = pack_byte<kBits>(last);
}

template <int kBits>
void unpack_all(const uint8_t* packed, int8_t* codes, int64_t numel) {
  constexpr int kPerByte = 8 / kBits;
  const int64_t whole = numel / kPerByte;
  for (int64_t i = 0; i < whole; ++i)
    for (int j = 0; j < kPerByte; ++j) codes[i * kPerByte + j] = unpack_code<kBits>(packed[i], j);
  for (int64_t i = whole * kPerByte; i < numel; ++i)
    codes[i] = unpack_code<kBits>(packed[whole], (int)(i - whole * kPerByte));
}

}  // namespace

extern "C" {

void qmir_pack(const int8_t* codes, uint8_t* packed, int64_t numel, int64_t bits) {
  if (bits == 2) pack_all<2>(codes, packed, numel);
  if (bits == 4) pack_all<4>(codes, packed, numel);
  if (bits == 8) pack_all<8>(codes, packed, numel);
}

void qmir_unpack(const uint8_t* packed, int8_t* codes, int64_t numel, int64_t bits) {
  if (bits == 2) unpack_all<2>(packed, codes, numel);
  if (bits == 4) unpack_all<4>(packed, codes, numel);
  if (bits == 8) unpack_all<8>(packed, codes, numel);
}

}  // extern "C"
