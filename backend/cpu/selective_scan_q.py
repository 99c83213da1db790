"""CPU kernel of `qmir::selective_scan_q` (csrc/selective_scan_q.cpp)."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cpu.build import pointer
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.ops._integer import require
from qmir_ao.ops.selective_scan_q import (
    ScanArgs,
    check_scan,
    delta_codes_error,
    scan_table,
    selective_scan_q_ref,
)

MAX_STATES = 64


def scan_shape(scan: ScanArgs) -> object:
    """The C struct ScanShape, as an array of 64-bit integers in its order."""
    batch, channels, length = scan.u.shape
    codes = (scan.u, scan.delta, scan.B, scan.C)
    steps = (scan.u_step, scan.delta_step, scan.B_step, scan.C_step)
    values = (
        *(batch, channels, scan.B.shape[1], scan.A.shape[1], length),
        *(step.numel() for step in steps),
        *(tensor.dtype == torch.uint8 for tensor in codes),
        scan.delta_quant_min,
        scan.delta_quant_max - scan.delta_quant_min + 1,
    )
    return (ctypes.c_int64 * len(values))(*values)


def scan_operands(scan: ScanArgs) -> list[Tensor | None]:
    """What the C functions read, contiguous, in their order."""
    tensors = (
        *(scan.u, scan.u_step, scan.u_shift, scan.delta),
        *(scan.B, scan.B_step, scan.B_shift),
        *(scan.C, scan.C_step, scan.C_shift),
        *(scan_table(scan), scan.D),
    )
    return [None if t is None else t.contiguous() for t in tensors]


@cpu_kernel("selective_scan_q", selective_scan_q_ref)
def _selective_scan_q(lib: ctypes.CDLL, *args: Any) -> Tensor:
    scan = ScanArgs(*args)
    if scan.A.dim() == 2 and scan.A.shape[1] > MAX_STATES:
        return selective_scan_q_ref(*args)
    check_scan(scan)
    y = torch.empty(scan.u.shape, dtype=torch.float32)
    if not y.numel():
        return y
    kept = scan_operands(scan)
    outside = lib.qmir_selective_scan_q(*map(pointer, kept), scan_shape(scan), pointer(y))
    require(not outside, lambda: delta_codes_error(scan.delta_quant_min, scan.delta_quant_max))
    return y
