"""CUDA kernels of `qmir::ss2d_scan_q` and `ss2d_scan_q_moments` (cuda/ss2d_scan_q.cu).

Statistics of the result need another kernel for the sum of the four directions, which leaves those
of its tiles; cuda/moments.cu merges them.
"""

from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cuda import moments, scan_merge
from qmir_ao.backend.cuda.launch import Launcher
from qmir_ao.backend.cuda.outside import watched
from qmir_ao.backend.cuda.registration import cuda_kernel
from qmir_ao.backend.cuda.scan_chunks import images
from qmir_ao.backend.cuda.scan_q import (
    DECLARED,
    MAX_STATES,
    declare,
    make_table,
    run_chunks,
    variant_of,
)
from qmir_ao.ops._moments import split_offset
from qmir_ao.ops.selective_scan_q import ScanArgs
from qmir_ao.ops.ss2d_scan_q import (
    PARAMETERS,
    check_image_scan,
    ss2d_scan_q_moments_ref,
    ss2d_scan_q_ref,
)

OP = "ss2d_scan_q"
WITH_MOMENTS = "ss2d_scan_q_moments"
declare(OP, DECLARED)


def _run(
    launch: Launcher,
    scan: ScanArgs,
    room: moments.Room,
    y: Tensor,
    steps: int | None,
    table: Tensor | None,
) -> None:
    """Write the result to `y`, and parts of its statistics to `room` if they are wanted."""
    kind = variant_of(scan)
    batch, channels, height, width = scan.u.shape
    size = images(batch, channels, height, width, kind.warps, steps)
    table = make_table(launch, OP, scan, size, kind) if table is None else table
    with watched(OP, scan) as outside:
        directions = run_chunks(launch, OP, scan, size, kind, table, outside)
    if room.moments is None:
        scan_merge.merge(launch, OP, directions, y, kind.defines)
    else:
        scan_merge.merge_kept(launch, OP, directions, y, room, kind.defines)


def _room(scan: ScanArgs, wanted: bool, offset: Tensor | None) -> tuple[Tensor, moments.Room]:
    """Memory for the result and its statistics."""
    y = scan.u.new_empty(scan.u.shape, dtype=torch.float32)
    tiles = scan_merge.tiles(y)
    return y, moments.make_room(WITH_MOMENTS, wanted, offset, y, y.shape[1], tiles)


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
    y, room = _room(scan, False, None)
    if y.numel():
        _run(launch, scan, room, y, steps, table)
    return y


@cuda_kernel(WITH_MOMENTS, ss2d_scan_q_moments_ref)
def launch_ss2d_scan_q_moments(
    launch: Launcher, *args: Any, steps: int | None = None, table: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run `qmir::ss2d_scan_q_moments` through `launch`; `launch_ss2d_scan_q` has the arguments."""
    own, offset = split_offset(args, PARAMETERS)
    scan = ScanArgs(*own)
    check_image_scan(scan)
    if scan.A.shape[1] > MAX_STATES:
        return ss2d_scan_q_moments_ref(*args)
    y, room = _room(scan, True, offset)
    _run(launch, scan, room, y, steps, table)
    moments.merge(launch, room)
    return y, room.moments
