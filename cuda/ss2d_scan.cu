// Selective scan of an image in four directions: end state of each chunk, states carried from chunk
// to chunk, outputs of each chunk, and the sum of the directions. See scan_real.cuh.
// Compiled for QMIR_STATES states, QMIR_WARPS warps, and QMIR_BF16 1 for bf16 operands.
#include "scan_real.cuh"

#if QMIR_BF16
using Real = uint16_t;
#else
using Real = float;
#endif
constexpr int kStates = QMIR_STATES;
constexpr int kWarps = QMIR_WARPS;
constexpr int kSteps = qmir::kTile;

extern "C" __global__ void __launch_bounds__(32 * QMIR_WARPS, QMIR_STATES <= 12 ? 2 : 1)
    qmir_ss2d_scan_local(QMIR_REAL_PARAMETERS, float*) {
  qmir::scan_real<true, kStates, kWarps, kSteps, false, false>(QMIR_REAL_SCAN(nullptr, nullptr),
                                                               (float*)nullptr);
}

extern "C" __global__ void __launch_bounds__(256)
    qmir_ss2d_scan_carry(const float* decay, float* end, long long states, QMIR_SCAN_SIZES) {
  qmir::carry_scan<true, false>(QMIR_SCAN_SIZE, (int)states, decay, end);
}

extern "C" __global__ void __launch_bounds__(32 * QMIR_WARPS, QMIR_STATES <= 16 ? 2 : 1)
    qmir_ss2d_scan_apply(QMIR_REAL_PARAMETERS, float* parts) {
  qmir::scan_real<true, kStates, kWarps, kSteps, true, false>(QMIR_REAL_SCAN(nullptr, nullptr),
                                                              parts);
}

extern "C" __global__ void __launch_bounds__(256)
    qmir_ss2d_scan_merge(const float* parts, Real* y, long long batch, long long plane) {
  qmir::merge_directions(parts, y, batch, plane);
}
