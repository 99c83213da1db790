"""CPU kernels of `qmir::linear` and `qmir::linear_acc` (csrc/qlinear.cpp)."""

import ctypes
import math

import torch
from torch import Tensor

from qmir_ao.backend.cpu.build import pointer
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.ops._epilogue import Epilogue
from qmir_ao.ops.linear import check_linear, check_linear_acc, linear_acc_ref, linear_ref


@cpu_kernel("linear_acc", linear_acc_ref)
def _linear_acc(
    lib: ctypes.CDLL, x: Tensor, weight: Tensor, bits: int, out_features: int
) -> Tensor:
    check_linear_acc("linear_acc", x, weight, bits, out_features)
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.int32)
    rows = math.prod(x.shape[:-1])
    sizes = (bits, rows, x.shape[-1], out_features)
    if rows:
        lib.qmir_linear_acc(pointer(x), pointer(weight), *map(ctypes.c_int64, sizes), pointer(y))
    return y


@cpu_kernel("linear", linear_ref)
def _linear(
    lib: ctypes.CDLL,
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
    end = Epilogue(residual, residual_scale, activation)
    check_linear(x, x_step, x_shift, weight, w_step, w_shift, bias, bits, out_features, end)
    tensors = (x, x_step, x_shift, weight, w_step, w_shift, bias, residual, residual_scale)
    kept = [None if t is None else t.contiguous() for t in tensors]
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32)
    rows, groups = math.prod(x.shape[:-1]), x_step.numel()
    if rows:
        steps, shifts = w_step.numel(), w_shift.numel()
        sizes = (bits, groups, rows // groups, x.shape[-1], out_features, steps, shifts, end.kind)
        lib.qmir_linear(*map(pointer, kept), *map(ctypes.c_int64, sizes), pointer(y))
    return y
