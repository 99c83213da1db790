"""CPU kernel of `qmir::ss2d_scan_q` (csrc/selective_scan_q.cpp)."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cpu.build import pointer
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.backend.cpu.selective_scan_q import MAX_STATES, scan_operands, scan_shape
from qmir_ao.ops._integer import require
from qmir_ao.ops._moments import check_moments_offset, check_some, empty_moments, split_offset
from qmir_ao.ops.selective_scan_q import ScanArgs, delta_codes_error
from qmir_ao.ops.ss2d_scan_q import (
    PARAMETERS,
    as_sequences,
    check_image_scan,
    ss2d_scan_q_moments_ref,
    ss2d_scan_q_ref,
)


@cpu_kernel("ss2d_scan_q", ss2d_scan_q_ref)
def _ss2d_scan_q(lib: ctypes.CDLL, *args: Any) -> Tensor:
    scan = ScanArgs(*args)
    check_image_scan(scan)
    if scan.A.shape[1] > MAX_STATES:
        return ss2d_scan_q_ref(*args)
    y = torch.empty(scan.u.shape, dtype=torch.float32)
    if not y.numel():
        return y
    kept = scan_operands(scan)
    size = [ctypes.c_int64(side) for side in scan.u.shape[2:]]
    shape = scan_shape(as_sequences(scan))
    outside = lib.qmir_ss2d_scan_q(*map(pointer, kept), shape, *size, pointer(y))
    low, high = scan.delta_quant_min, scan.delta_quant_max
    require(not outside, lambda: delta_codes_error(low, high, "ss2d_scan_q"))
    return y


@cpu_kernel("ss2d_scan_q_moments", ss2d_scan_q_moments_ref)
def _ss2d_scan_q_moments(lib: ctypes.CDLL, *args: Any) -> tuple[Tensor, Tensor]:
    own, offset = split_offset(args, PARAMETERS)
    y = _ss2d_scan_q(lib, *own)
    batch, channels, height, width = y.shape
    check_moments_offset("ss2d_scan_q_moments", offset, channels)
    check_some("ss2d_scan_q_moments", y)
    moments = empty_moments(y, channels)
    offset = None if offset is None else offset.contiguous()
    sizes = map(ctypes.c_int64, (batch, channels, height * width))
    lib.qmir_channel_moments(pointer(y), pointer(offset), *sizes, pointer(moments))
    return y, moments
