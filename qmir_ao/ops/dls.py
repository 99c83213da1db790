"""DLS: the activation quantizer whose step and shift are predicted from the input's statistics.

    shift = v . (mean, std, min, max)(x)
    step  = max(|w . (|mean|, std, min, max)(x + shift)|, eps)
    codes = round_half_even(clip((x + shift) / step, quant_min, quant_max))
    x_hat = step * codes - shift

Source: Q-MambaIR (arXiv 2503.21970), equations 5, 6, 9 and 10, in the form of the published code
(a step to divide by, where the paper prints a scale to multiply by).

The differentiable form for training is `dls_fake_quant.py`.

Shape letters: G = groups (samples of dim 0, or 1 per tensor), N = elements of one group.
The four learned scalars `w` (scale_weights) and `v` (shift_weights) have shape (4,).
"""

import math
from typing import NamedTuple

import torch

from qmir_ao.ops._affine import (
    as_rows,
    check_range,
    code_dtype,
    column,
    compute_dtype,
    group_count,
    non_finite,
    round_to_grid,
)
from qmir_ao.ops._library import define

STEP_EPS = 1e-6
"""Smallest step: a constant tensor has no spread, and must not be divided by zero."""


class Prediction(NamedTuple):
    """Statistics and grid of each group, all (G,) in the arithmetic's type."""

    mean: torch.Tensor
    std: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    raw: torch.Tensor
    cap: torch.Tensor | None
    step: torch.Tensor
    shift: torch.Tensor

    def shifted(self) -> tuple[torch.Tensor, ...]:
        """The features that the scale weights multiply: statistics of x + shift."""
        centre = (self.mean + self.shift).abs()
        return centre, self.std, self.low + self.shift, self.high + self.shift


def _statistics(op: str, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    count = rows.shape[1]
    if count == 0:
        zero = rows.new_zeros(rows.shape[0])
        return zero, zero, zero, zero
    finite = torch.isfinite(rows).all(dim=1)
    if not bool(finite.all()):
        raise non_finite(op, f"sample {int((~finite).nonzero()[0])} of x")
    pivot = rows[:, :1].double()
    # Deviations from the first element: a constant group gets a spread of exactly zero.
    deviation = rows.double() - pivot
    offset = deviation.mean(dim=1, keepdim=True)
    mean = (pivot + offset).squeeze(1)
    std = (deviation - offset).square().sum(dim=1).div(max(count - 1, 1)).sqrt()
    low, high = torch.aminmax(rows, dim=1)
    return mean.to(rows.dtype), std.to(rows.dtype), low, high


def predict(
    op: str,
    rows: torch.Tensor,
    scale_weights: torch.Tensor,
    shift_weights: torch.Tensor,
    levels: int,
    cap: bool,
) -> Prediction:
    """Statistics, step and shift of each row of `rows` (G, N)."""
    check_scalars(op, scale_weights, shift_weights)
    return predict_from(op, _statistics(op, rows), scale_weights, shift_weights, levels, cap)


def predict_from(
    op: str,
    statistics: tuple[torch.Tensor, ...],
    scale_weights: torch.Tensor,
    shift_weights: torch.Tensor,
    levels: int,
    cap: bool,
) -> Prediction:
    """Step and shift from mean, std, min and max of each group (G,), in their type."""
    mean, std, low, high = statistics
    w, v = scale_weights.to(mean.dtype), shift_weights.to(mean.dtype)
    shift = v[0] * mean + v[1] * std + v[2] * low + v[3] * high
    raw = w[0] * (mean + shift).abs() + w[1] * std + w[2] * (low + shift) + w[3] * (high + shift)
    finite = torch.isfinite(raw) & torch.isfinite(shift)
    if not bool(finite.all()):
        raise non_finite(op, f"sample {int((~finite).nonzero()[0])} of x")
    limit = (high - low) / levels if cap else None
    step = raw.abs() if limit is None else torch.minimum(raw.abs(), limit)
    return Prediction(mean, std, low, high, raw, limit, step.clamp(min=STEP_EPS), shift)


def dls_qparams_ref(
    x: torch.Tensor,
    scale_weights: torch.Tensor,
    shift_weights: torch.Tensor,
    quant_min: int,
    quant_max: int,
    per_tensor: bool,
    cap: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `qmir::dls_qparams`."""
    check_range("dls_qparams", quant_min, quant_max)
    rows = as_rows(x, group_count(x, per_tensor)).to(compute_dtype(x))
    levels = quant_max - quant_min + 1
    found = predict("dls_qparams", rows, scale_weights, shift_weights, levels, cap)
    return found.step, found.shift


def _dls_qparams_fake(
    x: torch.Tensor,
    scale_weights: torch.Tensor,
    shift_weights: torch.Tensor,
    quant_min: int,
    quant_max: int,
    per_tensor: bool,
    cap: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_scalars("dls_qparams", scale_weights, shift_weights)
    check_range("dls_qparams", quant_min, quant_max)
    groups = group_count(x, per_tensor)
    return (
        x.new_empty((groups,), dtype=compute_dtype(x)),
        x.new_empty((groups,), dtype=compute_dtype(x)),
    )


def check_scalars(op: str, scale_weights: torch.Tensor, shift_weights: torch.Tensor) -> None:
    """Refuse anything but four scale weights and four shift weights."""
    torch._check(
        scale_weights.shape == (4,) and shift_weights.shape == (4,),
        lambda: (
            f"qmir::{op}: scale_weights and shift_weights must have shape (4,), got "
            f"{tuple(scale_weights.shape)} and {tuple(shift_weights.shape)}"
        ),
    )


def check_groups(op: str, x: torch.Tensor, step: torch.Tensor, shift: torch.Tensor) -> None:
    """Refuse steps that are neither one per tensor, nor per sample, nor per token."""
    groups = step.shape[0] if step.dim() == 1 else -1
    torch._check(
        # Samples first: with a symbolic batch that is known without a guard on its size.
        step.shape == shift.shape
        and (step.shape == x.shape[:1] or groups == 1 or groups == math.prod(x.shape[:-1])),
        lambda: (
            f"qmir::{op}: step and shift must have shape (1,), (samples,) or (tokens,), where the "
            f"last dimension is that of a token; got {tuple(step.shape)} and "
            f"{tuple(shift.shape)} for a tensor of {tuple(x.shape)}"
        ),
    )


def dls_quantize_ref(
    x: torch.Tensor, step: torch.Tensor, shift: torch.Tensor, quant_min: int, quant_max: int
) -> torch.Tensor:
    """Reference of `qmir::dls_quantize`."""
    check_range("dls_quantize", quant_min, quant_max)
    check_groups("dls_quantize", x, step, shift)
    rows = as_rows(x, step.numel()).to(compute_dtype(x))
    ratio = (rows + column(shift)) / column(step)
    codes = round_to_grid(ratio, quant_min, quant_max)
    return codes.to(code_dtype(quant_max)).reshape(x.shape)


def _dls_quantize_fake(
    x: torch.Tensor, step: torch.Tensor, shift: torch.Tensor, quant_min: int, quant_max: int
) -> torch.Tensor:
    check_range("dls_quantize", quant_min, quant_max)
    check_groups("dls_quantize", x, step, shift)
    return x.new_empty(x.shape, dtype=code_dtype(quant_max))


def dls_dequantize_ref(q: torch.Tensor, step: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Reference of `qmir::dls_dequantize`."""
    check_groups("dls_dequantize", q, step, shift)
    rows = as_rows(q, step.numel()).to(step.dtype)
    return (column(step) * rows - column(shift)).reshape(q.shape)


def _dls_dequantize_fake(q: torch.Tensor, step: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    check_groups("dls_dequantize", q, step, shift)
    return q.new_empty(q.shape, dtype=step.dtype)


_dls_qparams = define(
    "dls_qparams(Tensor x, Tensor scale_weights, Tensor shift_weights, int quant_min, "
    "int quant_max, bool per_tensor, bool cap) -> (Tensor, Tensor)",
    reference=dls_qparams_ref,
    fake=_dls_qparams_fake,
)
_dls_quantize = define(
    "dls_quantize(Tensor x, Tensor step, Tensor shift, int quant_min, int quant_max) -> Tensor",
    reference=dls_quantize_ref,
    fake=_dls_quantize_fake,
)
_dls_dequantize = define(
    "dls_dequantize(Tensor q, Tensor step, Tensor shift) -> Tensor",
    reference=dls_dequantize_ref,
    fake=_dls_dequantize_fake,
)


def dls_qparams(
    x: torch.Tensor,
    scale_weights: torch.Tensor,
    shift_weights: torch.Tensor,
    quant_min: int = -8,
    quant_max: int = 7,
    per_tensor: bool = False,
    cap: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict the quantization step and shift of each group from its statistics.

    Args:
        x: activations, any shape; dim 0 counts samples.
        scale_weights: (4,) weights of |mean|, std, min and max of the shifted tensor.
        shift_weights: (4,) weights of mean, std, min and max.
        quant_min: smallest code.
        quant_max: largest code.
        per_tensor: one group for the whole tensor instead of one per sample.
        cap: limit the step to (max - min) / levels, as the published code does.

    Returns:
        step and shift, float32.

    Shape:
        x (B, ...) -> (B,), or (1,) with `per_tensor`.

    Raises:
        NonFiniteError: a sample holds NaN or infinity.

    Source: arXiv 2503.21970, equations 6 and 10.
    """
    result = _dls_qparams(x, scale_weights, shift_weights, quant_min, quant_max, per_tensor, cap)
    return result[0], result[1]


def dls_quantize(
    x: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    quant_min: int = -8,
    quant_max: int = 7,
) -> torch.Tensor:
    """Codes round_half_even(clip((x + shift) / step)) of activations.

    Args:
        x: activations, any shape.
        step: (1,) or one per sample, positive.
        shift: like `step`.
        quant_min: smallest code.
        quant_max: largest code; above 127 the codes are uint8.

    Returns:
        int8 (or uint8) codes, contiguous.

    Shape:
        x (B, ...) -> codes (B, ...).

    Raises:
        RuntimeError: a code range outside 2..8 bits, or steps that do not match the samples.

    Source: arXiv 2503.21970, equation 5.
    """
    result: torch.Tensor = _dls_quantize(x, step, shift, quant_min, quant_max)
    return result


def dls_dequantize(q: torch.Tensor, step: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Values step * q - shift of codes.

    Args:
        q: codes, any shape.
        step: (1,) or one per sample.
        shift: like `step`.

    Returns:
        float32 values, contiguous.

    Shape:
        q (B, ...) -> values (B, ...).

    Raises:
        RuntimeError: steps that do not match the samples.

    Source: arXiv 2503.21970, equation 5.
    """
    result: torch.Tensor = _dls_dequantize(q, step, shift)
    return result
