"""CUDA kernels of `qmir::selective_scan_q` (cuda/selective_scan_q.cu)."""

from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import Launcher
from qmir_ao.backend.cuda.outside import watched
from qmir_ao.backend.cuda.registration import cuda_kernel
from qmir_ao.backend.cuda.scan_chunks import sequences
from qmir_ao.backend.cuda.scan_q import (
    DECLARED,
    MAX_STATES,
    declare,
    make_table,
    run_chunks,
    variant_of,
)
from qmir_ao.ops.selective_scan_q import ScanArgs, check_scan, selective_scan_q_ref

OP = "selective_scan_q"
# The source differs from that of images in leaving out columns: one variant tells.
declare(OP, DECLARED[-1:])


@cuda_kernel(OP, selective_scan_q_ref)
def launch_selective_scan_q(
    launch: Launcher, *args: Any, steps: int | None = None, table: Tensor | None = None
) -> Tensor:
    """Run `qmir::selective_scan_q` through `launch`.

    With a single chunk and the reference's table the result has the reference's bytes.

    Args:
        launch: starts the kernels.
        args: operands of the operator.
        steps: steps of a chunk; by default from the shape.
        table: delta and decays in the kernels' layout; by default they are computed.
    """
    scan = ScanArgs(*args)
    if scan.A.dim() == 2 and scan.A.shape[1] > MAX_STATES:
        return selective_scan_q_ref(*args)
    check_scan(scan)
    if not scan.u.numel():
        return scan.u.new_empty(scan.u.shape, dtype=torch.float32)
    kind = variant_of(scan)
    batch, channels, length = scan.u.shape
    groups = scan.B.shape[1]
    size = sequences(batch, groups, channels // groups, length, kind.warps, steps)
    table = make_table(launch, OP, scan, size, kind) if table is None else table
    with watched(OP, scan) as outside:
        y = run_chunks(launch, OP, scan, size, kind, table, outside)
    return y.view(scan.u.shape)
