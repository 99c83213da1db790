"""CPU kernels of `qmir::selective_scan` and its backward (csrc/selective_scan.cpp)."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cpu.build import pointer
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.ops.selective_scan import (
    check_operands,
    selective_scan_backward_ref,
    selective_scan_ref,
)

MAX_STATES = 64


def fits(*tensors: Tensor | None) -> bool:
    """Whether all tensors have the type that the kernels read."""
    return all(x is None or x.dtype == torch.float32 for x in tensors)


def _sizes(u: Tensor, A: Tensor, B: Tensor) -> list[ctypes.c_int64]:
    sizes = (u.shape[0], u.shape[1], B.shape[1], A.shape[1], u.shape[2])
    return [ctypes.c_int64(size) for size in sizes]


@cpu_kernel("selective_scan", selective_scan_ref)
def _selective_scan(lib: ctypes.CDLL, *args: Any) -> Tensor:
    *tensors, softplus = args
    u, _, A, B, *_ = tensors
    check_operands(*tensors)
    if not fits(*tensors) or A.shape[1] > MAX_STATES:
        return selective_scan_ref(*args)
    kept = [None if x is None else x.contiguous() for x in tensors]
    y = torch.empty(u.shape)
    if u.numel():
        lib.qmir_selective_scan(
            *map(pointer, kept), ctypes.c_int(softplus), *_sizes(u, A, B), pointer(y)
        )
    return y


@cpu_kernel("selective_scan_backward", selective_scan_backward_ref)
def _selective_scan_backward(lib: ctypes.CDLL, *args: Any) -> tuple[Tensor, ...]:
    *tensors, softplus = args
    _, u, _, A, B, *_ = tensors
    check_operands(*tensors[1:])
    if not fits(*tensors) or A.shape[1] > MAX_STATES or not u.numel():
        return selective_scan_backward_ref(*args)
    kept = [None if x is None else x.contiguous() for x in tensors]
    # Absent operands (D, delta_bias) get an empty gradient.
    outputs = [u.new_empty(0) if x is None else torch.empty(x.shape) for x in tensors[1:]]
    lib.qmir_selective_scan_backward(
        *map(pointer, kept), ctypes.c_int(softplus), *_sizes(u, A, B), *map(pointer, outputs)
    )
    return tuple(outputs)
