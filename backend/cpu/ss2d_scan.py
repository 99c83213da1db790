"""CPU kernels of `qmir::ss2d_scan` and its backward (csrc/selective_scan.cpp)."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cpu.build import pointer
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.backend.cpu.selective_scan import MAX_STATES, fits
from qmir_ao.ops.ss2d_scan import check_images, ss2d_scan_backward_ref, ss2d_scan_ref


def _sizes(u: Tensor, A: Tensor) -> list[ctypes.c_int64]:
    sizes = (u.shape[0], u.shape[1], A.shape[1], u.shape[2], u.shape[3])
    return [ctypes.c_int64(size) for size in sizes]


@cpu_kernel("ss2d_scan", ss2d_scan_ref)
def _ss2d_scan(lib: ctypes.CDLL, *args: Any) -> Tensor:
    *tensors, softplus = args
    u, _, A, *_ = tensors
    check_images(*tensors)
    if not fits(*tensors) or A.shape[1] > MAX_STATES:
        return ss2d_scan_ref(*args)
    kept = [None if x is None else x.contiguous() for x in tensors]
    y = torch.empty(u.shape)
    if u.numel():
        lib.qmir_ss2d_scan(*map(pointer, kept), ctypes.c_int(softplus), *_sizes(u, A), pointer(y))
    return y


@cpu_kernel("ss2d_scan_backward", ss2d_scan_backward_ref)
def _ss2d_scan_backward(lib: ctypes.CDLL, *args: Any) -> tuple[Tensor, ...]:
    *tensors, softplus = args
    _, u, _, A, *_ = tensors
    check_images(*tensors[1:])
    if not fits(*tensors) or A.shape[1] > MAX_STATES or not u.numel():
        return ss2d_scan_backward_ref(*args)
    kept = [None if x is None else x.contiguous() for x in tensors]
    # Absent operands (D, delta_bias) get an empty gradient.
    outputs = [u.new_empty(0) if x is None else torch.empty(x.shape) for x in tensors[1:]]
    lib.qmir_ss2d_scan_backward(
        *map(pointer, kept), ctypes.c_int(softplus), *_sizes(u, A), *map(pointer, outputs)
    )
    return tuple(outputs)
