"""What the integer operators share: argument checks, packed sizes, the float epilogue.

Both operands lie on uniform grids, x_hat = alpha * q_x - beta and w_hat = step * q_w - shift, so a
sum of products over K taps needs integers only:

    sum x_hat * w_hat = alpha * step * acc - alpha * shift * sx
                        - beta * step * sw + K * beta * shift
    acc = sum q_x * q_w,  sx = sum q_x,  sw = sum q_w

A shift of each channel, x_hat - offset[c], becomes a multiple of one power of two, offset = unit *
q_o, so that what it takes needs integers as well: sum offset * w_hat = step * unit * sum q_w * q_o
- shift * unit * sum q_o, in any order of summation.

Shape letters: G = groups of the activation (samples, or 1), O = output channels, C = input
channels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qmir_ao.ops.pack import CONTAINERS, packed_bytes

MAX_TAPS = (2**31 - 1) // (128 * 128)
"""Longest dot product of 8-bit codes whose int32 accumulator cannot overflow."""
OFFSET_BITS = 38
"""Bits of the largest offset: MAX_TAPS products of its code and an 8-bit one stay below 2**62."""


def require(condition: bool, message: Callable[[], str]) -> None:
    """`torch._check`, at no cost where a plain condition holds: operators check on every call."""
    if condition is not True:
        torch._check(condition, message)


def check_codes(op: str, name: str, codes: Tensor) -> None:
    """Refuse anything but int8 codes."""
    require(
        codes.dtype == torch.int8,
        lambda: (
            f"qmir::{op}: {name} must hold int8 codes, got {codes.dtype}; quantize it with "
            "qmir::dls_quantize (unsigned 8-bit codes: subtract 128, and 128 * step from the shift)"
        ),
    )


def check_weight(op: str, weight: Tensor, count: int, bits: int) -> None:
    """Refuse a packed weight whose container or length does not fit `count` codes."""
    require(
        bits in CONTAINERS, lambda: f"qmir::{op}: bits must be the container 2, 4 or 8, got {bits}"
    )
    expected = packed_bytes(count, bits)
    require(
        weight.dtype == torch.uint8 and weight.dim() == 1 and weight.shape[0] == expected,
        lambda: (
            f"qmir::{op}: weight must be {expected} packed bytes ({count} codes of {bits} bits) "
            f"as uint8, got {tuple(weight.shape)} {weight.dtype}; make it with qmir::pack"
        ),
    )


def check_taps(op: str, taps: int) -> None:
    """Refuse a dot product that could overflow int32."""
    require(
        taps <= MAX_TAPS,
        lambda: f"qmir::{op}: at most {MAX_TAPS} products fit an int32 accumulator, got {taps}",
    )


def _check_per(op: str, name: str, tensor: Tensor, count: int) -> None:
    require(
        tensor.dtype == torch.float32
        and tensor.dim() <= 1
        and (tensor.numel() == count or tensor.numel() == 1),
        lambda: (
            f"qmir::{op}: {name} must be float32 of 1 or {count} values, "
            f"got {tuple(tensor.shape)} {tensor.dtype}"
        ),
    )


def check_grid(op: str, name: str, step: Tensor, shift: Tensor, count: int) -> None:
    """Refuse a step or shift that is not float32 with one value, or `count` values."""
    _check_per(op, f"{name}_step", step, count)
    _check_per(op, f"{name}_shift", shift, count)
    require(
        step.numel() == shift.numel(),
        lambda: (
            f"qmir::{op}: {name}_step and {name}_shift must have equal length, "
            f"got {step.numel()} and {shift.numel()}"
        ),
    )


def check_weight_grid(op: str, step: Tensor, shift: Tensor, features: int) -> None:
    """Refuse a weight's step or shift that is not float32 with one value or one per feature.

    One shift may serve the steps of all features.
    """
    _check_per(op, "w_step", step, features)
    _check_per(op, "w_shift", shift, features)
    require(
        shift.numel() == 1 or shift.numel() == step.numel(),
        lambda: (
            f"qmir::{op}: w_shift must have 1 value or as many as w_step, "
            f"got {shift.numel()} and {step.numel()}"
        ),
    )


def check_bias(op: str, bias: Tensor | None, count: int) -> None:
    """Refuse a bias that is not float32 of `count` values."""
    if bias is not None:
        require(
            bias.dtype == torch.float32 and tuple(bias.shape) == (count,),
            lambda: (
                f"qmir::{op}: bias must be float32 of shape ({count},), "
                f"got {tuple(bias.shape)} {bias.dtype}"
            ),
        )


def check_offset(op: str, offset: Tensor | None, channels: int) -> None:
    """Refuse an offset that is not float32 with one value or one per channel, in any shape."""
    if offset is not None:
        require(
            offset.dtype == torch.float32 and (offset.numel() == channels or offset.numel() == 1),
            lambda: (
                f"qmir::{op}: x_offset must be float32 of 1 or {channels} values (one per input "
                f"channel), got {tuple(offset.shape)} {offset.dtype}"
            ),
        )


def fixed_point(offset: Tensor) -> tuple[Tensor, float]:
    """Offsets as int64 multiples of a power of two, and that unit.

    Zeros and a unit of NaN where an offset is not finite.
    """
    largest = float(offset.abs().max())
    if not math.isfinite(largest):
        return torch.zeros_like(offset, dtype=torch.int64), math.nan
    unit = math.ldexp(1.0, math.frexp(largest)[1] - OFFSET_BITS)
    return torch.round(offset.double() / unit).long(), unit


def epilogue(
    acc: Tensor,
    sx: Tensor,
    sw: Tensor,
    taps: Tensor | int,
    x_grid: tuple[Tensor, Tensor],
    w_grid: tuple[Tensor, Tensor],
    bias: Tensor | None,
    x_offset: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Float32 result of an integer sum of products; the kernels repeat this order to the byte.

    All operands broadcast to the shape of `acc`.

    Args:
        acc: int32 sums of products of codes.
        sx: int32 sums of the activation codes over the same taps.
        sw: integer sums of the weight codes over the same taps.
        taps: their number.
        x_grid: alpha and beta of the activation, float32.
        w_grid: step and shift of the weight, float32.
        bias: float32, or None.
        x_offset: int64 sums of q_w * q_o and of q_o over the same taps, and the unit of q_o.
    """
    alpha, beta = x_grid
    step, shift = w_grid
    offset = beta.double()
    constant = (offset * taps) * shift.double() - (offset * step.double()) * sw.double()
    constant = constant + (0.0 if bias is None else bias.double())
    if x_offset is not None:
        qo, so, unit = x_offset
        lost = (step.double() * unit) * qo.double() - (shift.double() * unit) * so.double()
        constant = constant - lost
    y: Tensor = ((alpha * step) * acc.float() - (alpha * shift) * sx.float()) + constant.float()
    return y
