"""Launchers of `qmir::linear`, `linear_acc` and `linear_moments` (cuda/qlinear.cu).

Statistics of the result, and activations beyond none and relu, need a second kernel, which keeps
its tile in shared memory; cuda/moments.cu merges the statistics of tiles.
"""

import math
from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import Argument, Launcher, Size3, ceil_div, check_device, dense
from qmir_ao.backend.cuda.moments import make_room, merge
from qmir_ao.backend.cuda.registration import cuda_kernel
from qmir_ao.ops._activations import EXACT
from qmir_ao.ops._epilogue import Epilogue
from qmir_ao.ops._moments import split_offset
from qmir_ao.ops.linear import (
    PARAMETERS,
    check_linear,
    check_linear_acc,
    linear_acc_ref,
    linear_moments_ref,
    linear_ref,
)

TILE = 64
BLOCK = (128, 1, 1)


def _grid(rows: int, features: int) -> Size3:
    return ceil_div(rows, TILE) * ceil_div(features, TILE), 1, 1


@cuda_kernel("linear_acc", linear_acc_ref)
def launch_linear_acc(
    launch: Launcher, x: Tensor, weight: Tensor, bits: int, out_features: int
) -> Tensor:
    """Start the kernel of `qmir::linear_acc`; arguments and result are those of the operator."""
    check_linear_acc("linear_acc", x, weight, bits, out_features)
    device = check_device("linear_acc", x, weight)
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.int32, device=device)
    rows = math.prod(x.shape[:-1])
    if rows:
        args = (dense(x), dense(weight), bits, rows, x.shape[-1], out_features, y)
        launch(
            "qlinear",
            f"qmir_linear_acc_w{max(bits, 4)}",
            _grid(rows, out_features),
            BLOCK,
            args,
        )
    return y


def _run(
    launch: Launcher,
    wants_moments: bool,
    moments_offset: Tensor | None,
    x: Tensor,
    x_step: Tensor,
    x_shift: Tensor,
    weight: Tensor,
    w_step: Tensor,
    w_shift: Tensor,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor | None]:
    end = Epilogue(residual, residual_scale, activation)
    check_linear(x, x_step, x_shift, weight, w_step, w_shift, bias, bits, out_features, end)
    tensors = (x, x_step, x_shift, weight, w_step, w_shift, bias, residual, residual_scale)
    device = check_device("linear", *tensors, moments_offset)
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32, device=device)
    rows = math.prod(x.shape[:-1])
    samples = x.shape[0] if wants_moments and x.dim() > 1 else 1
    rows_per_sample = rows // max(samples, 1)
    tiles = ceil_div(rows_per_sample, TILE)
    room = make_room("linear_moments", wants_moments, moments_offset, y, out_features, tiles)
    if rows:
        sizes = (bits, rows, rows // x_step.numel(), x.shape[-1], out_features)
        kept = [None if t is None else dense(t) for t in tensors]
        operands = (*kept, *sizes, w_step.numel(), w_shift.numel(), end.kind)
        more: tuple[Argument, ...] = ()
        if wants_moments or activation not in EXACT:
            more = (rows_per_sample, *room.arguments)
        blocks = samples * tiles * ceil_div(out_features, TILE)
        name = f"qmir_linear{'_kept' if more else ''}_w{max(bits, 4)}"
        launch("qlinear", name, (blocks, 1, 1), BLOCK, (*operands, *more, y))
    merge(launch, room)
    return y, room.moments


@cuda_kernel("linear", linear_ref)
def launch_linear(launch: Launcher, *args: Any) -> Tensor:
    """Start the kernel of `qmir::linear`; arguments and result are those of the operator."""
    return _run(launch, False, None, *args)[0]


@cuda_kernel("linear_moments", linear_moments_ref)
def launch_linear_moments(launch: Launcher, *args: Any) -> tuple[Tensor, Tensor | None]:
    """Start the kernels of `qmir::linear_moments`; arguments and results are the operator's."""
    own, offset = split_offset(args, PARAMETERS)
    return _run(launch, True, offset, *own)
