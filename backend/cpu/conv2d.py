"""CPU kernels of `qmir::conv2d` and `qmir::conv2d_acc` (csrc/qconv2d.cpp, its depthwise form)."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cpu.build import pointer
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.ops._convolution import Geometry, check_convolution
from qmir_ao.ops._epilogue import Epilogue, image_format
from qmir_ao.ops._moments import check_moments_offset, check_some, empty_moments, split_offset
from qmir_ao.ops.conv2d import (
    PARAMETERS,
    check_conv2d,
    conv2d_acc_ref,
    conv2d_moments_ref,
    conv2d_ref,
)


def _shape(
    x: Tensor,
    geometry: Geometry,
    out: tuple[int, int],
    counts: tuple[int, int, int, int],
    written: tuple[int, int],
) -> object:
    """The C struct ConvShape, as an array of 64-bit integers in its order."""
    values = (
        *x.shape,
        geometry.weight_size[0],
        *geometry.weight_size[2:],
        *geometry.stride,
        *geometry.padding,
        *geometry.dilation,
        geometry.groups,
        *out,
        geometry.bits,
        *counts,
        *written,
    )
    return (ctypes.c_int64 * len(values))(*values)


@cpu_kernel("conv2d_acc", conv2d_acc_ref)
def _conv2d_acc(
    lib: ctypes.CDLL,
    x: Tensor,
    weight: Tensor,
    bits: int,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = Geometry(bits, weight_size, stride, padding, dilation, groups)
    out = check_convolution("conv2d_acc", x, weight, geometry)
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty((x.shape[0], weight_size[0], *out), dtype=torch.int32)
    if y.numel():
        shape = _shape(x, geometry, out, (1, 1, 1, 0), (0, 0))
        lib.qmir_conv2d_acc(pointer(x), pointer(weight), shape, pointer(y))
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
    x_offset: Tensor | None,
    bits: int,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor | None]:
    geometry = Geometry(bits, weight_size, stride, padding, dilation, groups)
    end = Epilogue(residual, residual_scale, activation)
    out = check_conv2d(x, x_step, x_shift, weight, w_step, w_shift, bias, x_offset, geometry, end)
    tensors = (x, x_step, x_shift, weight, w_step, w_shift, bias, x_offset, residual_scale)
    kept = [None if t is None else t.contiguous() for t in tensors]
    layout = image_format(residual)
    kept.append(None if residual is None else residual.contiguous(memory_format=layout))
    check_moments_offset("conv2d_moments", moments_offset, weight_size[0])
    kept.append(None if moments_offset is None else moments_offset.contiguous())
    size = (x.shape[0], weight_size[0], *out)
    y = torch.empty(size, dtype=torch.float32, memory_format=layout)
    moments = None
    if wants_moments:
        check_some("conv2d_moments", y)
        moments = empty_moments(y, weight_size[0])
    if y.numel():
        offsets = 0 if x_offset is None else x_offset.numel()
        counts = (x_step.numel(), w_step.numel(), w_shift.numel(), offsets)
        written = (int(layout is torch.channels_last), end.kind)
        shape = _shape(x, geometry, out, counts, written)
        lib.qmir_conv2d(*map(pointer, (*kept, moments)), shape, pointer(y))
    return y, moments


@cpu_kernel("conv2d", conv2d_ref)
def _conv2d(lib: ctypes.CDLL, *args: Any) -> Tensor:
    return _run(lib, False, None, *args)[0]


@cpu_kernel("conv2d_moments", conv2d_moments_ref)
def _conv2d_moments(lib: ctypes.CDLL, *args: Any) -> tuple[Tensor, Tensor | None]:
    own, offset = split_offset(args, PARAMETERS)
    return _run(lib, True, offset, *own)
