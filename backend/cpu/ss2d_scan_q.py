"""CPU kernel of `qmir::ss2d_scan_q` (csrc/selective_scan_q.cpp)."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cpu.build import pointer
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.backend.cpu.selective_scan_q import MAX_STATES, scan_operands, scan_shape
from qmir_ao.ops._integer import require
from qmir_ao.ops.selective_scan_q import ScanArgs, delta_codes_error
from qmir_ao.ops.ss2d_scan_q import as_sequences, check_image_scan, ss2d_scan_q_ref


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
