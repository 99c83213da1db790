"""RFA: the weight quantizer that rounds by learned thresholds onto a uniform integer grid.

    c     = clip((w + shift) / step, quant_min, quant_max)
    i     = number of midpoints (T[j-1] + T[j]) / 2 that c exceeds strictly
    w_hat = step * (quant_min + i) - shift

Thresholds out of order act as in the published code: the last midpoint exceeded wins. The
differentiable form for training is `rfa_fake_quant.py`.

Source: Q-MambaIR (arXiv 2503.21970), equations 7 and 8 and algorithm 1, with the scale, shift and
clip of the published code.

Shape letters: G = groups (1 per tensor, or one per output channel), N = weights of one group,
T = 2**bits thresholds. w is viewed as (G, N). The shift has one element for all groups, or G.
"""

from typing import NamedTuple

import torch

from qmir_ao.ops._affine import as_rows, check_finite, check_range, column, compute_dtype
from qmir_ao.ops._library import define
from qmir_ao.ops.pack import pack, packed_bytes, unpack


def quant_max_of(thresholds: torch.Tensor, quant_min: int) -> int:
    """Largest code: one level per threshold."""
    return quant_min + thresholds.shape[0] - 1


def ascending(values: torch.Tensor) -> torch.Tensor:
    """Suffix minima: equal to sorted values, and makes "last one exceeded" a count otherwise."""
    return torch.cummin(values.flip(0), dim=0).values.flip(0)


class Rounding(NamedTuple):
    """A weight in units of steps: (G, N) before and after the clip, and its integer levels."""

    ratio: torch.Tensor
    clipped: torch.Tensor
    level: torch.Tensor


def check_weight(
    op: str,
    w: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    thresholds: torch.Tensor,
    quant_min: int,
) -> None:
    """Refuse thresholds and steps that do not belong to the weight."""
    torch._check(
        thresholds.dim() == 1,
        lambda: f"qmir::{op}: thresholds must be 1-D, got {thresholds.dim()}-D",
    )
    check_range(op, quant_min, quant_max_of(thresholds, quant_min))
    groups = step.numel()
    torch._check(
        shift.numel() in (1, groups) and groups > 0 and w.numel() % groups == 0,
        lambda: (
            f"qmir::{op}: step must have 1 element or one per output channel, and shift 1 or as "
            f"many as step; got {step.numel()} and {shift.numel()} for a weight of shape "
            f"{tuple(w.shape)}"
        ),
    )


def round_weight(
    w: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    thresholds: torch.Tensor,
    quant_min: int,
) -> Rounding:
    """Clip and round a weight by its thresholds."""
    rows = as_rows(w, step.numel()).to(compute_dtype(w))
    ratio = (rows + column(shift)) / column(step)
    check_finite("rfa", "the weight", ratio)
    clipped = torch.clamp(ratio, quant_min, quant_max_of(thresholds, quant_min))
    middles = ascending((thresholds[:-1] + thresholds[1:]) * 0.5).to(rows.dtype)
    return Rounding(ratio, clipped, torch.searchsorted(middles, clipped) + quant_min)


def rfa_quantize_ref(
    w: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    thresholds: torch.Tensor,
    quant_min: int,
) -> torch.Tensor:
    """Reference of `qmir::rfa_quantize`."""
    check_weight("rfa_quantize", w, step, shift, thresholds, quant_min)
    return round_weight(w, step, shift, thresholds, quant_min).level.to(torch.int8).reshape(w.shape)


def rfa_dequantize_ref(
    packed: torch.Tensor, step: torch.Tensor, shift: torch.Tensor, size: list[int], bits: int
) -> torch.Tensor:
    """Reference of `qmir::rfa_dequantize`."""
    count = torch.Size(size).numel()
    codes = unpack(packed, bits, count)
    rows = as_rows(codes, step.numel()).to(step.dtype)
    return (column(step) * rows - column(shift)).reshape(size)


def _quantize_fake(
    w: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    thresholds: torch.Tensor,
    quant_min: int,
) -> torch.Tensor:
    check_weight("rfa_quantize", w, step, shift, thresholds, quant_min)
    torch._check(
        quant_max_of(thresholds, quant_min) <= 127,
        lambda: "qmir::rfa_quantize: weight codes are int8, use a signed range such as [-128, 127]",
    )
    return w.new_empty(w.shape, dtype=torch.int8)


def _dequantize_fake(
    packed: torch.Tensor, step: torch.Tensor, shift: torch.Tensor, size: list[int], bits: int
) -> torch.Tensor:
    count = torch.Size(size).numel()
    torch._check(
        packed.numel() == packed_bytes(count, bits) and count % max(step.numel(), 1) == 0,
        lambda: (
            f"qmir::rfa_dequantize: {list(size)} weights of {bits} bits take "
            f"{packed_bytes(count, bits)} bytes, got {packed.numel()} (and {step.numel()} steps)"
        ),
    )
    torch._check(
        step.numel() > 0 and shift.numel() in (1, step.numel()),
        lambda: (
            f"qmir::rfa_dequantize: shift must have 1 element or as many as step, got "
            f"{shift.numel()} and {step.numel()}"
        ),
    )
    return step.new_empty(size)


_rfa_quantize = define(
    "rfa_quantize(Tensor w, Tensor step, Tensor shift, Tensor thresholds, int quant_min) -> Tensor",
    reference=rfa_quantize_ref,
    fake=_quantize_fake,
)
_rfa_dequantize = define(
    "rfa_dequantize(Tensor packed, Tensor step, Tensor shift, int[] size, int bits) -> Tensor",
    reference=rfa_dequantize_ref,
    fake=_dequantize_fake,
)


def rfa_quantize(
    w: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    thresholds: torch.Tensor,
    quant_min: int = -8,
) -> torch.Tensor:
    """Integer codes of a weight, rounded by learned thresholds.

    Args:
        w: weight; with G steps it is viewed as G rows.
        step: one element, or one per output channel, positive.
        shift: one element, or as many as `step`.
        thresholds: 2**bits ascending values, in units of codes.
        quant_min: smallest code.

    Returns:
        int8 codes of the shape of w.

    Shape:
        w (O, ...) -> (O, ...).

    Raises:
        RuntimeError: thresholds that do not belong to 2..8 bits, or steps that do not divide w.

    Source: arXiv 2503.21970, equation 7.
    """
    result: torch.Tensor = _rfa_quantize(w, step, shift, thresholds, quant_min)
    return result


def rfa_dequantize(
    packed: torch.Tensor, step: torch.Tensor, shift: torch.Tensor, size: list[int], bits: int
) -> torch.Tensor:
    """Float weight step * code - shift from packed codes.

    Args:
        packed: codes packed by `pack`, flat.
        step: one element, or one per output channel.
        shift: one element, or as many as `step`.
        size: shape of the weight.
        bits: container width, 2, 4 or 8.

    Returns:
        float32 weight.

    Shape:
        (ceil(N * bits / 8),) -> size.

    Raises:
        RuntimeError: a packed length that does not match `size`.

    Source: arXiv 2503.21970, equation 7.
    """
    result: torch.Tensor = _rfa_dequantize(packed, step, shift, size, bits)
    return result


def rfa_pack(
    w: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    thresholds: torch.Tensor,
    quant_min: int,
    bits: int,
) -> torch.Tensor:
    """Quantize a weight and pack its codes: `pack(rfa_quantize(...), bits)`."""
    return pack(rfa_quantize(w, step, shift, thresholds, quant_min), bits)
