"""CPU kernels of `qmir::pack` and `qmir::unpack` (csrc/pack.cpp)."""

import ctypes

import torch
from torch import Tensor

from qmir_ao.backend.cpu.binding import bind
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.ops.pack import check_container, check_length, pack_ref, packed_bytes, unpack_ref


@cpu_kernel("pack", pack_ref)
def _pack(lib: ctypes.CDLL, q: Tensor, bits: int) -> Tensor:
    if q.dtype not in (torch.int8, torch.uint8):
        return pack_ref(q, bits)
    check_container("pack", bits)
    q = q.contiguous()
    packed = torch.empty(packed_bytes(q.numel(), bits), dtype=torch.uint8)
    bind(lib, "qmir_pack", "ppii")(q.data_ptr(), packed.data_ptr(), q.numel(), bits)
    return packed


@cpu_kernel("unpack", unpack_ref)
def _unpack(lib: ctypes.CDLL, packed: Tensor, bits: int, numel: int) -> Tensor:
    check_container("unpack", bits)
    check_length(packed, bits, numel)
    packed = packed.contiguous()
    codes = torch.empty(numel, dtype=torch.int8)
    bind(lib, "qmir_unpack", "ppii")(packed.data_ptr(), codes.data_ptr(), numel, bits)
    return codes
