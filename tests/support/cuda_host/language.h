// CUDA's language on the host: qualifiers, vector types, built-in variables and scalar functions.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define QMIR_CUDA_HOST 1
#define QMIR_DEVICE inline __attribute__((always_inline))

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block runs at a time, so that shared memory is static: all of .bss, which is filled with
// garbage before every block. What must outlive a block is kept in a section of its own.
#define __shared__ static
#define QMIR_STATE static __attribute__((section("qmir_state")))
// Read from the preprocessed text.
#define __launch_bounds__(...) __attribute__((qmir_launch_bounds(__VA_ARGS__)))

#define QMIR_VECTOR_TYPE(name, T, bytes2, bytes4)         \
  struct alignas(bytes2) name##2 { T x, y; };             \
  struct alignas(bytes4) name##4 { T x, y, z, w; };       \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

QMIR_VECTOR_TYPE(char, signed char, 2, 4)
QMIR_VECTOR_TYPE(uchar, unsigned char, 2, 4)
QMIR_VECTOR_TYPE(short, short, 4, 8)
QMIR_VECTOR_TYPE(ushort, unsigned short, 4, 8)
QMIR_VECTOR_TYPE(int, int, 8, 16)
QMIR_VECTOR_TYPE(uint, unsigned, 8, 16)
QMIR_VECTOR_TYPE(float, float, 8, 16)
QMIR_VECTOR_TYPE(longlong, long long, 16, 16)
QMIR_VECTOR_TYPE(double, double, 16, 16)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

QMIR_STATE uint3 threadIdx, blockIdx;
QMIR_STATE dim3 blockDim, gridDim;
constexpr int warpSize = 32;

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline float __int2float_rn(int x) { return (float)x; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __mul24(int a, int b) { return a * b; }
inline int __mulhi(int a, int b) { return (int)(((long long)a * b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }

// Byte i of the result is byte (selector nibble i) of {y, x}; the sign mode is not offered.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = ((uint64_t)y << 32) | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= (unsigned)((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  return result;
}

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += (int8_t)(a >> (8 * i)) * (int8_t)(b >> (8 * i));
  return c;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}

template <class T>
T __ldcs(const T* p) {
  return *p;
}

template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

// Integer atomics. Those of floats are left out on purpose: their sums depend on the order.
template <class T, class Change>
T atomic_update(T* p, Change change) {
  static_assert(std::is_integral_v<T>, "float atomics make results depend on timing");
  const T old = *p;
  *p = change(old);
  return old;
}

#define QMIR_ATOMIC(name, expression)                             \
  template <class T>                                              \
  T name(T* p, std::type_identity_t<T> value) {                   \
    return atomic_update(p, [=](T old) -> T { return expression; }); \
  }

QMIR_ATOMIC(atomicAdd, (T)(old + value))
QMIR_ATOMIC(atomicSub, (T)(old - value))
QMIR_ATOMIC(atomicMax, std::max(old, value))
QMIR_ATOMIC(atomicMin, std::min(old, value))
QMIR_ATOMIC(atomicOr, old | value)
QMIR_ATOMIC(atomicAnd, old & value)
QMIR_ATOMIC(atomicExch, value)
QMIR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)

template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return atomic_update(p, [=](T old) { return old == expected ? value : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}
