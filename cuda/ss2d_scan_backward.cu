// Gradients of the selective scan of an image in four directions: states and what they pass back,
// of each chunk and carried between them; gradients of each chunk; and their sums over directions,
// channels and time. See scan_real_backward.cuh.
// Compiled for QMIR_STATES states, QMIR_WARPS warps, and QMIR_BF16 1 for bf16 operands.
#include "scan_real_backward.cuh"

#if QMIR_BF16
using Real = uint16_t;
#else
using Real = float;
#endif
constexpr int kStates = QMIR_STATES;
constexpr int kWarps = QMIR_WARPS;
constexpr int kSteps = 8;  // whose states fit into shared memory

extern "C" __global__ void __launch_bounds__(32 * QMIR_WARPS)
    qmir_ss2d_scan_backward_local(QMIR_REAL_PARAMETERS, const Real* grad, float* reverse) {
  qmir::scan_real<true, kStates, kWarps, kSteps, false, true>(QMIR_REAL_SCAN(grad, reverse),
                                                              (float*)nullptr);
}

extern "C" __global__ void __launch_bounds__(256)
    qmir_ss2d_scan_backward_carry(const float* decay, float* end, float* reverse, long long states,
                                  QMIR_SCAN_SIZES) {
  qmir::carry_scan<true, false>(QMIR_SCAN_SIZE, (int)states, decay, end);
  qmir::carry_scan<true, true>(QMIR_SCAN_SIZE, (int)states, decay, reverse);
}

extern "C" __global__ void __launch_bounds__(32 * QMIR_WARPS)
    qmir_ss2d_scan_backward_chunks(QMIR_REAL_PARAMETERS, const Real* grad, float* reverse,
                                   float* du, Real* ddelta, float* states, float* parameters,
                                   float* projections) {
  const qmir::RealGradients<Real> out{du, ddelta, states, parameters, projections};
  qmir::scan_real_backward<true, kStates, kWarps, kSteps>(QMIR_REAL_SCAN(grad, reverse), out);
}

extern "C" __global__ void __launch_bounds__(256)
    qmir_ss2d_scan_backward_projections(const float* parts, Real* db, Real* dc, long long groups,
                                        long long blocks, long long plane) {
  qmir::sum_projections(parts, db, dc, groups, blocks, plane);
}

extern "C" __global__ void __launch_bounds__(256)
    qmir_ss2d_scan_backward_parameters(const float* parts, float* da, float* dd, float* dbias,
                                       long long states, QMIR_SCAN_SIZES) {
  qmir::sum_parameters<true>(QMIR_SCAN_SIZE, (int)states, parts, da, dd, dbias);
}

extern "C" __global__ void __launch_bounds__(256)
    qmir_ss2d_scan_backward_merge(const float* parts, Real* y, long long batch, long long plane) {
  qmir::merge_directions(parts, y, batch, plane);
}
