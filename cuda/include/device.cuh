// What kernels use beyond C++: dynamic shared memory, warp collectives, tensor-core products,
// asynchronous copies and sums in a fixed order. NVRTC compiles the PTX below; the test harness
// (tests/support/cuda_host) defines QMIR_CUDA_HOST and brings its own version of each primitive.
//
// Every primitive is for whole warps of blocks whose size is a multiple of 32.
#pragma once
#include "common.cuh"

namespace qmir {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace qmir

#if !defined(QMIR_CUDA_HOST)

#define QMIR_DEVICE __device__ __forceinline__

// Declares `name`, a pointer to the dynamic shared memory of the launch, aligned to 16 bytes. All
// such pointers of a kernel are the same memory.
#define QMIR_DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(16) unsigned char qmir_dynamic[];  \
  type* const name = reinterpret_cast<type*>(qmir_dynamic)

namespace qmir {

// d += a * b for a 16x32 (row-major) and b 32x8 (column-major) of int8, d 16x8 of int32; fragments
// as in the PTX manual, "Matrix Fragments for mma.m16n8k32". With g = lane / 4, t = lane % 4:
//   a[0], a[1], a[2], a[3]: rows g, g + 8, g, g + 8; columns 4t..4t+3, the same, and 16 more twice
//   b[0], b[1]: column g; rows 4t..4t+3 and 16 more
//   d[0], d[1] and d[2], d[3]: rows g and g + 8; columns 2t, 2t + 1
QMIR_DEVICE void mma_s8_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for int4, eight to a register with the first in the low bits: a 16x64, b 64x8. Columns
// of a and rows of b are 8t..8t+7, and 32 more.
QMIR_DEVICE void mma_s4_m16n8k64(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

QMIR_DEVICE unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Four 8x8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of
// matrix l / 8 (16 bytes, aligned) and gets bytes 4 * (l % 4).. of row l / 4 of matrix i in r[i].
QMIR_DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

QMIR_DEVICE void load_matrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// Starts a copy of kBytes (4, 8 or 16, both sides aligned to it) from global to shared memory, of
// which the first `valid` are read and the rest is zero. It is there after wait_copies, for other
// threads after a barrier as well.
template <int kBytes>
QMIR_DEVICE void copy_async(void* shared, const void* global, int valid = kBytes) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(valid)
                 : "memory");
}

// Closes the group of the copies started so far by this thread.
QMIR_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are still under way.
template <int kPending>
QMIR_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

QMIR_DEVICE float bf16_to_float(uint16_t bits) { return __int_as_float((int)bits << 16); }

QMIR_DEVICE uint16_t float_to_bf16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

}  // namespace qmir

#endif

namespace qmir {

// Elements in memory: float, or bf16 with float arithmetic.
struct Bf16 {
  uint16_t bits;
};

QMIR_DEVICE float load_float(const float* p) { return *p; }
QMIR_DEVICE float load_float(const Bf16* p) { return bf16_to_float(p->bits); }
QMIR_DEVICE void store_float(float* p, float x) { *p = x; }
QMIR_DEVICE void store_float(Bf16* p, float x) { p->bits = float_to_bf16(x); }

// Four neighbours at once, from an address that is a multiple of their size.
QMIR_DEVICE void load_four(const float* p, float (&x)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(p);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

QMIR_DEVICE void load_four(const Bf16* p, float (&x)[4]) {
  const ushort4 v = *reinterpret_cast<const ushort4*>(p);
  x[0] = bf16_to_float(v.x), x[1] = bf16_to_float(v.y);
  x[2] = bf16_to_float(v.z), x[3] = bf16_to_float(v.w);
}

QMIR_DEVICE void store_four(float* p, const float (&x)[4]) {
  *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
}

QMIR_DEVICE void store_four(Bf16* p, const float (&x)[4]) {
  *reinterpret_cast<ushort4*>(p) = make_ushort4(float_to_bf16(x[0]), float_to_bf16(x[1]),
                                                float_to_bf16(x[2]), float_to_bf16(x[3]));
}

QMIR_DEVICE int lane_id() { return (int)(threadIdx.x % kWarp); }
QMIR_DEVICE int warp_id() { return (int)(threadIdx.x / kWarp); }

// Sums over a warp, in every lane: a fixed tree, so that the result never depends on timing.
template <class T>
QMIR_DEVICE T warp_sum(T x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

template <class T>
QMIR_DEVICE T warp_min(T x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x = min_of(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

template <class T>
QMIR_DEVICE T warp_max(T x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x = max_of(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// Sum over a one-dimensional block of kThreads, in every thread; warps are added in their order.
// `scratch` is shared memory of kThreads / 32 elements, free again after the next barrier.
template <int kThreads, class T>
QMIR_DEVICE T block_sum(T x, T* scratch) {
  x = warp_sum(x);
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  T total = scratch[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) total += scratch[warp];
  return total;
}

}  // namespace qmir
