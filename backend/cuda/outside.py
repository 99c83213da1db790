"""Report codes of delta outside of their range, without waiting for the GPU.

Kernels read no memory beyond their table: from such a code on, the outputs of its channel are NaN,
and a flag is set. On a GPU the flag lies in pinned memory that the kernels write to, only in this
case, and that the host looks at when the operator is called next: an error then names the operator.
Nothing is copied or waited for, also while a CUDA graph is captured (the first call, which
allocates the flag, must come before). On other devices the error is raised at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qmir_ao.ops._integer import require
from qmir_ao.ops.selective_scan_q import ScanArgs, delta_codes_error

_flags: dict[tuple[str, torch.device], Tensor] = {}


def _raise_if_set(op: str, flag: Tensor, scan: ScanArgs, when: str = "") -> None:
    found = int(flag[0])
    flag.zero_()
    message = delta_codes_error(scan.delta_quant_min, scan.delta_quant_max, op)
    require(not found, lambda: f"{message}{when}")


@contextmanager
def watched(op: str, scan: ScanArgs) -> Iterator[Tensor]:
    """Give the flag, int32 (1,), that the kernels of `op` set to 1.

    Raises:
        RuntimeError: a code of delta was out of range: now, or on a GPU in an earlier call.
    """
    device = scan.u.device
    if device.type != "cuda":
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        yield flag
        _raise_if_set(op, flag, scan)
        return
    if (op, device) not in _flags:
        _flags[op, device] = torch.zeros(1, dtype=torch.int32).pin_memory()
    flag = _flags[op, device]
    _raise_if_set(op, flag, scan, when=" (found in an earlier call, whose result holds NaN)")
    yield flag
