"""Codes packed into bytes: four 2-bit, two 4-bit or one 8-bit code per byte.

Fields are two's complement and lie little end first: code i of a byte occupies bits
[i * bits, (i + 1) * bits). The last byte is filled up with zero codes.

Source: the common layout of packed integer weights; one flat stream, no row padding.

Shape letters: N = codes, P = ceil(N * bits / 8) bytes.
"""

import torch

from qmir_ao.ops._library import define

CONTAINERS = (2, 4, 8)
"""Container widths. A 3-bit code travels in 4 bits, 5 to 7 bits in 8."""


def check_container(op: str, bits: int) -> None:
    """Refuse widths that do not divide a byte."""
    torch._check(
        bits in CONTAINERS, lambda: f"qmir::{op}: bits must be a container of 2, 4 or 8, got {bits}"
    )


def packed_bytes(numel: int, bits: int) -> int:
    """Bytes that `numel` codes of `bits` take."""
    return (numel * bits + 7) // 8


def pack_ref(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Reference of `qmir::pack`."""
    check_container("pack", bits)
    per_byte = 8 // bits
    codes = q.reshape(-1)
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % per_byte))
    fields = (codes.to(torch.int32) & ((1 << bits) - 1)).reshape(-1, per_byte)
    places = torch.arange(per_byte, device=q.device, dtype=torch.int32) * bits
    return (fields << places).sum(dim=1, dtype=torch.int32).to(torch.uint8)


def unpack_ref(packed: torch.Tensor, bits: int, numel: int) -> torch.Tensor:
    """Reference of `qmir::unpack`."""
    check_container("unpack", bits)
    check_length(packed, bits, numel)
    per_byte = 8 // bits
    places = torch.arange(per_byte, device=packed.device, dtype=torch.int32) * bits
    fields = (packed.reshape(-1, 1).to(torch.int32) >> places) & ((1 << bits) - 1)
    sign = 1 << (bits - 1)
    return ((fields ^ sign) - sign).reshape(-1)[:numel].to(torch.int8)


def check_length(packed: torch.Tensor, bits: int, numel: int) -> None:
    """Refuse a packed tensor that does not hold `numel` codes."""
    torch._check(
        packed.numel() == packed_bytes(numel, bits),
        lambda: (
            f"qmir::unpack: {numel} codes of {bits} bits take {packed_bytes(numel, bits)} bytes, "
            f"got {packed.numel()}"
        ),
    )


def _pack_fake(q: torch.Tensor, bits: int) -> torch.Tensor:
    check_container("pack", bits)
    torch._check(
        q.dtype in (torch.int8, torch.uint8),
        lambda: f"qmir::pack: codes must be int8 or uint8, got {q.dtype}",
    )
    return q.new_empty((packed_bytes(q.numel(), bits),), dtype=torch.uint8)


def _unpack_fake(packed: torch.Tensor, bits: int, numel: int) -> torch.Tensor:
    check_container("unpack", bits)
    check_length(packed, bits, numel)
    return packed.new_empty((numel,), dtype=torch.int8)


_pack = define("pack(Tensor q, int bits) -> Tensor", reference=pack_ref, fake=_pack_fake)
_unpack = define(
    "unpack(Tensor packed, int bits, int numel) -> Tensor", reference=unpack_ref, fake=_unpack_fake
)


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integer codes into bytes.

    Args:
        q: int8 codes of any shape, each within [-2**(bits-1), 2**(bits-1) - 1]; higher bits are
            cut off.
        bits: container width, 2, 4 or 8.

    Returns:
        uint8, flat.

    Shape:
        q of N codes -> (ceil(N * bits / 8),).

    Raises:
        RuntimeError: a container width other than 2, 4 and 8.

    Source: little-endian bit fields, two's complement.
    """
    result: torch.Tensor = _pack(q, bits)
    return result


def unpack(packed: torch.Tensor, bits: int, numel: int) -> torch.Tensor:
    """Unpack bytes into integer codes, the inverse of `pack`.

    Args:
        packed: uint8, flat.
        bits: container width, 2, 4 or 8.
        numel: number of codes.

    Returns:
        int8 codes, flat.

    Shape:
        (ceil(numel * bits / 8),) -> (numel,).

    Raises:
        RuntimeError: a container width other than 2, 4 and 8, or a length that does not match.

    Source: little-endian bit fields, two's complement.
    """
    result: torch.Tensor = _unpack(packed, bits, numel)
    return result
