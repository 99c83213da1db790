"""CUDA kernels of `qmir::ss2d_scan` and its backward (cuda/ss2d_scan.cu, ss2d_scan_backward.cu)."""

from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import Launcher, ceil_div, dense
from qmir_ao.backend.cuda.registration import cuda_kernel, declare_shared, declare_variants
from qmir_ao.backend.cuda.scan_chunks import WARP, images
from qmir_ao.backend.cuda.scan_merge import merge
from qmir_ao.backend.cuda.scan_real import (
    BACKWARD_TILE,
    MOST_BLOCKS,
    backward_variant,
    carries,
    forward_variant,
    operands,
    runs,
    start_chunks,
    start_threads,
)
from qmir_ao.ops.ss2d_scan import check_images, ss2d_scan_backward_ref, ss2d_scan_ref

FORWARD = "ss2d_scan"
BACKWARD = "ss2d_scan_backward"
# MambaIR's numbers of states; others compile on their first run.
_DECLARED = ((10, torch.float32), (16, torch.bfloat16))

declare_variants(FORWARD, [forward_variant(*kind).defines for kind in _DECLARED])
declare_variants(BACKWARD, [backward_variant(*kind).defines for kind in _DECLARED])
for _kind in _DECLARED:
    _forward, _backward = forward_variant(*_kind), backward_variant(*_kind)
    declare_shared("qmir_ss2d_scan_local", _forward.defines, _forward.shared(2, 1))
    declare_shared("qmir_ss2d_scan_apply", _forward.defines, _forward.shared(3, 2))
    declare_shared("qmir_ss2d_scan_backward_local", _backward.defines, _backward.shared(3, 2))
    _bytes = _backward.shared(4, 2, history=True)
    declare_shared("qmir_ss2d_scan_backward_chunks", _backward.defines, _bytes)


@cuda_kernel(FORWARD, ss2d_scan_ref)
def launch_ss2d_scan(launch: Launcher, *args: Any, steps: int | None = None) -> Tensor:
    """Run `qmir::ss2d_scan` through `launch`; in float32 inside, also for bf16 operands.

    Args:
        launch: starts the kernels.
        args: operands of the operator.
        steps: steps of a chunk; by default from the shape.
    """
    *tensors, softplus = args
    u, _, A, *_ = tensors
    check_images(*tensors)
    if not runs(tensors):
        return ss2d_scan_ref(*args)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if not y.numel():
        return y
    kind = forward_variant(A.shape[1], u.dtype)
    batch, channels, height, width = u.shape
    size = images(batch, channels, height, width, kind.warps, steps)
    given = operands(tensors, softplus, size)
    end, decay = carries(size, kind, 2, u.device) if size.slots > 1 else (None, None)
    if end is not None:
        start_chunks(launch, FORWARD, "local", size, kind, [*given, end, decay, None],
                     kind.shared(2, 1))  # fmt: skip
        start_threads(launch, FORWARD, "carry", end[:, :, 0].numel(), kind,
                      [decay, end, kind.states, *size])  # fmt: skip
    parts = torch.empty(u.shape[0], size.groups, *u.shape[1:], dtype=torch.float32, device=u.device)
    start_chunks(launch, FORWARD, "apply", size, kind, [*given, end, decay, parts],
                 kind.shared(3, 2))  # fmt: skip
    merge(launch, FORWARD, parts, y, kind.defines)
    return y


@cuda_kernel(BACKWARD, ss2d_scan_backward_ref)
def launch_ss2d_scan_backward(
    launch: Launcher, *args: Any, steps: int | None = None
) -> tuple[Tensor, ...]:
    """Run `qmir::ss2d_scan_backward` through `launch`; in float32 inside.

    Args:
        launch: starts the kernels.
        args: operands of the operator.
        steps: steps of a chunk; by default from the shape.
    """
    grad, *tensors, softplus = args
    u, delta, A, B, C, D, bias = tensors
    check_images(*tensors)
    if not runs(tensors, grad) or not u.numel():
        return ss2d_scan_backward_ref(*args)
    kind = backward_variant(A.shape[1], u.dtype)
    batch, channels, height, width = u.shape
    size = images(batch, channels, height, width, kind.warps, steps)
    real = {"dtype": u.dtype, "device": u.device}
    wide = {"dtype": torch.float32, "device": u.device}
    given = operands(tensors, softplus, size)
    end, decay, reverse = carries(size, kind, 3, u.device)
    grad = dense(grad)

    start_chunks(launch, BACKWARD, "local", size, kind, [*given, end, decay, grad, reverse],
                 kind.shared(3, 2))  # fmt: skip
    start_threads(launch, BACKWARD, "carry", end[:, :, 0].numel(), kind,
                  [decay, end, reverse, kind.states, *size])  # fmt: skip

    blocks = ceil_div(size.per_group, WARP)
    tiles = ceil_div(max(size.row_steps, size.column_steps), BACKWARD_TILE)
    per_chunk = (size.batch, size.groups, size.slots)
    du = torch.empty(size.batch, size.groups, size.per_group, size.length, **wide)
    ddelta = torch.empty(delta.shape, **real)
    states = torch.empty(*per_chunk, tiles, kind.states, size.per_group, **wide)
    parameters = torch.empty(*per_chunk, kind.states + 2, size.per_group, **wide)
    projections = torch.empty(2, size.batch, size.groups, blocks, kind.states, size.length, **wide)
    start_chunks(
        launch, BACKWARD, "chunks", size, kind,
        [*given, end, decay, grad, reverse, du, ddelta, states, parameters, projections],
        kind.shared(4, 2, history=True),
    )  # fmt: skip

    dB, dC = (torch.empty(x.shape, **real) for x in (B, C))
    dA = torch.empty(A.shape, **wide)
    # Absent operands (D, delta_bias) get an empty gradient.
    dD, dbias = (torch.empty(0 if x is None else x.shape, **wide) for x in (D, bias))
    start_threads(
        launch, BACKWARD, "projections", B.numel(), kind,
        [projections, dB, dC, size.batch * size.groups, blocks, kind.states * size.length],
        MOST_BLOCKS,
    )  # fmt: skip
    start_threads(
        launch, BACKWARD, "parameters", parameters[0, :, 0].numel(), kind,
        [
            *(parameters, dA, None if D is None else dD, None if bias is None else dbias),
            *(kind.states, *size),
        ],
    )  # fmt: skip
    du_image = torch.empty(u.shape, **real)
    merge(launch, BACKWARD, du, du_image, kind.defines)
    narrow = (
        g.to(u.dtype if x is None else x.dtype)
        for g, x in zip((dA, dD, dbias), (A, D, bias), strict=True)
    )
    dA, dD, dbias = narrow
    return du_image, ddelta, dA, dB, dC, dD, dbias
