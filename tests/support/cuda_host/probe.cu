// The primitives of device.cuh by themselves, for the tests of the harness and of the compilers.
#include "device.cuh"

using namespace qmir;

// d (16x8) += a (16 x 32) * b (32 x 8, columns first), bytes in memory as the fragments name them.
extern "C" __global__ void qmir_probe_s8(const uint32_t* a, const uint32_t* b, int32_t* d) {
  const int group = threadIdx.x / 4, rank = threadIdx.x % 4;
  const uint32_t left[4] = {a[group * 8 + rank], a[(group + 8) * 8 + rank],
                            a[group * 8 + rank + 4], a[(group + 8) * 8 + rank + 4]};
  const uint32_t right[2] = {b[group * 8 + rank], b[group * 8 + rank + 4]};
  int32_t* const rows[2] = {d + group * 8 + 2 * rank, d + (group + 8) * 8 + 2 * rank};
  int32_t sums[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
  mma_s8_m16n8k32(sums, left, right);
  for (int i = 0; i < 4; ++i) rows[i / 2][i % 2] = sums[i];
}

// The same with 16 x 64 and 64 x 8 elements of 4 bits; the words lie where they do with bytes.
extern "C" __global__ void qmir_probe_s4(const uint32_t* a, const uint32_t* b, int32_t* d) {
  __shared__ __align__(16) uint32_t tile[16 * 8];
  for (int i = threadIdx.x; i < 16 * 8 / 4; i += kWarp) copy_async<16>(tile + 4 * i, a + 4 * i);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  const int group = threadIdx.x / 4, rank = threadIdx.x % 4;
  uint32_t left[4];
  // Matrices 0, 1 are the rows 0..7 and 8..15 of the first 16 bytes, 2 and 3 of the others.
  load_matrix_x4(left, tile + (threadIdx.x % 16) * 8 + threadIdx.x / 16 * 4);
  const uint32_t right[2] = {b[group * 8 + rank], b[group * 8 + rank + 4]};
  int32_t* const rows[2] = {d + group * 8 + 2 * rank, d + (group + 8) * 8 + 2 * rank};
  int32_t sums[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
  mma_s4_m16n8k64(sums, left, right);
  for (int i = 0; i < 4; ++i) rows[i / 2][i % 2] = sums[i];
}

// Block sums of x, and x through bf16, of 128 threads a block.
extern "C" __global__ void __launch_bounds__(128)
    qmir_probe_sums(const float* x, double* sums, float* low, float* high, uint16_t* half,
                    float* back, int64_t n) {
  __shared__ double scratch[4];
  const int64_t at = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  const float value = at < n ? x[at] : 0.0f;
  const double total = block_sum<128>((double)value, scratch);
  const float smallest = warp_min(value), largest = warp_max(value);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
  if (lane_id() == 0) {
    low[blockIdx.x * 4 + warp_id()] = smallest;
    high[blockIdx.x * 4 + warp_id()] = largest;
  }
  if (at < n) {
    half[at] = float_to_bf16(value);
    back[at] = bf16_to_float(half[at]);
  }
}
