"""Launchers of `qmir::pack` and `qmir::unpack` (cuda/pack.cu)."""

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import Launcher, ceil_div, dense
from qmir_ao.backend.cuda.registration import cuda_kernel
from qmir_ao.ops.pack import check_container, check_length, pack_ref, packed_bytes, unpack_ref

CODES = 16
THREADS = 256


def _start(launch: Launcher, kernel: str, source: Tensor, result: Tensor, numel: int) -> None:
    if numel:
        blocks = ceil_div(ceil_div(numel, CODES), THREADS)
        launch("pack", kernel, (blocks, 1, 1), (THREADS, 1, 1), (dense(source), result, numel))


@cuda_kernel("pack", pack_ref)
def launch_pack(launch: Launcher, q: Tensor, bits: int) -> Tensor:
    """Start the kernel of `qmir::pack`; codes of other types than 8-bit ones run the reference."""
    if q.dtype not in (torch.int8, torch.uint8):
        return pack_ref(q, bits)
    check_container("pack", bits)
    packed = torch.empty(packed_bytes(q.numel(), bits), dtype=torch.uint8, device=q.device)
    _start(launch, f"qmir_pack_b{bits}", q, packed, q.numel())
    return packed


@cuda_kernel("unpack", unpack_ref)
def launch_unpack(launch: Launcher, packed: Tensor, bits: int, numel: int) -> Tensor:
    """Start the kernel of `qmir::unpack`; arguments and result are those of the operator."""
    check_container("unpack", bits)
    check_length(packed, bits, numel)
    codes = torch.empty(numel, dtype=torch.int8, device=packed.device)
    _start(launch, f"qmir_unpack_b{bits}", packed, codes, numel)
    return codes
