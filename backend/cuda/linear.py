"""Launchers of `qmir::linear` and `qmir::linear_acc` (cuda/qlinear.cu)."""

import math

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import Launcher, Size3, ceil_div, check_device, dense
from qmir_ao.backend.cuda.registration import cuda_kernel
from qmir_ao.ops._epilogue import Epilogue
from qmir_ao.ops.linear import check_linear, check_linear_acc, linear_acc_ref, linear_ref

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


@cuda_kernel("linear", linear_ref)
def launch_linear(
    launch: Launcher,
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
) -> Tensor:
    """Start the kernel of `qmir::linear`; arguments and result are those of the operator."""
    end = Epilogue(residual, residual_scale, activation)
    check_linear(x, x_step, x_shift, weight, w_step, w_shift, bias, bits, out_features, end)
    tensors = (x, x_step, x_shift, weight, w_step, w_shift, bias, residual, residual_scale)
    device = check_device("linear", *tensors)
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32, device=device)
    rows = math.prod(x.shape[:-1])
    if rows:
        sizes = (bits, rows, rows // x_step.numel(), x.shape[-1], out_features)
        kept = [None if t is None else dense(t) for t in tensors]
        launch(
            "qlinear",
            f"qmir_linear_w{max(bits, 4)}",
            _grid(rows, out_features),
            BLOCK,
            (*kept, *sizes, w_step.numel(), w_shift.numel(), end.kind, y),
        )
    return y
