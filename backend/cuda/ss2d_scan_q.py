"""CUDA kernels of `qmir::ss2d_scan_q` (cuda/ss2d_scan_q.cu)."""

from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import Launcher
from qmir_ao.backend.cuda.outside import watched
from qmir_ao.backend.cuda.registration import cuda_kernel
from qmir_ao.backend.cuda.scan_chunks import images
from qmir_ao.backend.cuda.scan_merge import merge
from qmir_ao.backend.cuda.scan_q import (
    DECLARED,
    MAX_STATES,
    declare,
    make_table,
    run_chunks,
    variant_of,
)
from qmir_ao.ops.selective_scan_q import ScanArgs
from qmir_ao.ops.ss2d_scan_q import check_image_scan, ss2d_scan_q_ref

OP = "ss2d_scan_q"
declare(OP, DECLARED)


@cuda_kernel(OP, ss2d_scan_q_ref)
def launch_ss2d_scan_q(
    launch: Launcher, *args: Any, steps: int | None = None, table: Tensor | None = None
) -> Tensor:
    """Run `qmir::ss2d_scan_q` through `launch`.

    Where both rows and columns are a single chunk, and with the reference's table, the result has
    the reference's bytes.

    Args:
        launch: starts the kernels.
        args: operands of the operator.
        steps: steps of a chunk; by default from the shape.
        table: delta and decays in the kernels' layout; by default they are computed.
    """
    scan = ScanArgs(*args)
    check_image_scan(scan)
    if scan.A.shape[1] > MAX_STATES:
        return ss2d_scan_q_ref(*args)
    y = scan.u.new_empty(scan.u.shape, dtype=torch.float32)
    if not y.numel():
        return y
    kind = variant_of(scan)
    batch, channels, height, width = scan.u.shape
    size = images(batch, channels, height, width, kind.warps, steps)
    table = make_table(launch, OP, scan, size, kind) if table is None else table
    with watched(OP, scan) as outside:
        parts = run_chunks(launch, OP, scan, size, kind, table, outside)
    merge(launch, OP, parts, y, kind.defines)
    return y
