"""Report codes of delta outside of their range, without waiting for the GPU.

Kernels read no memory beyond their table: from such a code on, the outputs of its channel are NaN,
and a flag is set. On a GPU the flag lies in pinned host memory, which has one address for both
(unified addressing); the kernels write to it in this case only, and the host looks at it when the
operator is called next: that call fails, and its message
says which one it means. Nothing is copied or waited for, also while a CUDA graph is captured (the
first call, which allocates the flag, must come before). On other devices the error is raised at
once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qmir_ao.ops._integer import require
from qmir_ao.ops.selective_scan_q import ScanArgs, delta_codes_error


class _Watch:
    """The flag of one operator on one device, and what to say where it is set."""

    def __init__(self, flag: Tensor) -> None:
        self.flag = flag
        self.message = ""

    def check(self, when: str = "") -> None:
        found = int(self.flag[0])
        if found:
            self.flag.zero_()
        require(not found, lambda: self.message + when)


_watches: dict[tuple[str, torch.device], _Watch] = {}


@contextmanager
def watched(op: str, scan: ScanArgs) -> Iterator[Tensor | int]:
    """Give the flag that the kernels of `op` set to 1: int32 (1,), on a GPU its address.

    Raises:
        RuntimeError: a code of delta was out of range: now, or on a GPU in an earlier call.
    """
    device = scan.u.device
    key = (op, device)
    on_gpu = device.type == "cuda"
    if not on_gpu or key not in _watches:
        flag = torch.zeros(1, dtype=torch.int32)
        _watches[key] = _Watch(flag.pin_memory() if on_gpu else flag)
    watch = _watches[key]
    watch.check(when=" (in an earlier call, whose result holds NaN)")
    watch.message = delta_codes_error(scan.delta_quant_min, scan.delta_quant_max, op)
    yield watch.flag.data_ptr() if on_gpu else watch.flag
    if not on_gpu:
        watch.check()
