// Selective scan of quantized operands over images: table, end state of each chunk, states carried
// from chunk to chunk, outputs of each chunk; then the sum of the four directions, also with
// statistics of it. See scan_q_chunks.cuh. Compiled for QMIR_STATES states, QMIR_TABLE 1 where the decays are a table,
// QMIR_WARPS warps.
#include "scan_merge.cuh"
#include "scan_merge_tile.cuh"
#include "scan_q_chunks.cuh"

constexpr bool kImage = true;
constexpr int kStates = QMIR_STATES;
constexpr bool kTable = QMIR_TABLE != 0;
constexpr int kWarps = QMIR_WARPS;

extern "C" __global__ void __launch_bounds__(256)
    qmir_ss2d_scan_q_table(QMIR_SCAN_TABLE_PARAMETERS) {
  qmir::make_scan_table<kStates, kTable>(step, shift, a, bias, groups, per_group, table_groups,
                                         (int)code_min, (int)code_count, softplus != 0, table);
}

extern "C" __global__ void __launch_bounds__(32 * QMIR_WARPS, QMIR_STATES <= 16 ? 2 : 1)
    qmir_ss2d_scan_q_local(QMIR_SCAN_Q_PARAMETERS) {
  qmir::scan_q_chunks<kImage, kStates, kTable, false, kWarps>(QMIR_SCAN_Q, a);
}

extern "C" __global__ void __launch_bounds__(256)
    qmir_ss2d_scan_q_carry(const float* decay, float* end, QMIR_SCAN_SIZES) {
  qmir::carry_scan<kImage, false>(QMIR_SCAN_SIZE, kStates, decay, end);
}

extern "C" __global__ void __launch_bounds__(32 * QMIR_WARPS, QMIR_STATES <= 16 ? 2 : 1)
    qmir_ss2d_scan_q_apply(QMIR_SCAN_Q_PARAMETERS) {
  qmir::scan_q_chunks<kImage, kStates, kTable, true, kWarps>(QMIR_SCAN_Q, a);
}

extern "C" __global__ void __launch_bounds__(256)
    qmir_ss2d_scan_q_merge(const float* parts, float* y, long long batch, long long plane) {
  qmir::merge_directions(parts, y, batch, plane);
}

// A tile of 1024 pixels of one channel for each block, which leaves a part of its statistics.
extern "C" __global__ void __launch_bounds__(128)
    qmir_ss2d_scan_q_merge_kept(const float* directions, float* y, long long length,
                                QMIR_PARTS_ROOM) {
  using namespace qmir;
  merge_tile<1024, 128>(directions, y, length, QMIR_PARTS_ROOM_OF);
}
