"""CPU kernels of `qmir::linear` and `qmir::linear_acc` (csrc/qlinear.cpp)."""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cpu.build import pointer
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.ops._epilogue import Epilogue
from qmir_ao.ops._moments import check_moments_offset, check_some, empty_moments, split_offset
from qmir_ao.ops.linear import (
    PARAMETERS,
    check_linear,
    check_linear_acc,
    linear_acc_ref,
    linear_moments_ref,
    linear_ref,
)


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


def _run(
    lib: ctypes.CDLL,
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
    check_moments_offset("linear_moments", moments_offset, out_features)
    tensors = (
        x, x_step, x_shift, weight, w_step, w_shift, bias, residual, residual_scale, moments_offset
    )  # fmt: skip
    *kept, offset = [None if t is None else t.contiguous() for t in tensors]
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32)
    rows, groups = math.prod(x.shape[:-1]), x_step.numel()
    moments = None
    if wants_moments:
        check_some("linear_moments", y)
        moments = empty_moments(y, out_features)
    if rows:
        steps, shifts = w_step.numel(), w_shift.numel()
        samples = x.shape[0] if x.dim() > 1 else 1
        of_groups = groups, rows // groups
        sizes = (
            bits, *of_groups, x.shape[-1], out_features, steps, shifts, end.kind, samples
        )  # fmt: skip
        results = map(pointer, (offset, moments, y))
        lib.qmir_linear(*map(pointer, kept), *map(ctypes.c_int64, sizes), *results)
    return y, moments


@cpu_kernel("linear", linear_ref)
def _linear(lib: ctypes.CDLL, *args: Any) -> Tensor:
    return _run(lib, False, None, *args)[0]


@cpu_kernel("linear_moments", linear_moments_ref)
def _linear_moments(lib: ctypes.CDLL, *args: Any) -> tuple[Tensor, Tensor | None]:
    own, offset = split_offset(args, PARAMETERS)
    return _run(lib, True, offset, *own)
