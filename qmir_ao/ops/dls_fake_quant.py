"""DLS fake-quantization for training: quantize and dequantize in one differentiable operator.

    y0 = step * round_half_even(clip(t, quant_min, quant_max)) - shift,  t = (x + shift) / step
    y  = clip(y0, min x, max x) with clamp_output, else y0

Rounding passes gradients straight through. They flow through the four statistics into `x` too, and
the step's gradient is scaled by 1/sqrt(N * quant_max).

Source: Q-MambaIR (arXiv 2503.21970), equations 5 to 10, with the gradients of the published code.

Shape letters: G = groups (samples of dim 0, or 1 per tensor), N = elements of one group.
"""

from typing import Any

import torch

from qmir_ao.ops._affine import (
    as_rows,
    check_range,
    column,
    compute_dtype,
    gradient_scale,
    group_count,
    round_to_grid,
)
from qmir_ao.ops._library import define
from qmir_ao.ops.dls import STEP_EPS, Prediction, check_scalars, predict


def dls_fake_quant_ref(
    x: torch.Tensor,
    scale_weights: torch.Tensor,
    shift_weights: torch.Tensor,
    quant_min: int,
    quant_max: int,
    per_tensor: bool,
    cap: bool,
    clamp_output: bool,
) -> torch.Tensor:
    """Reference of `qmir::dls_fake_quant`."""
    check_range("dls_fake_quant", quant_min, quant_max)
    rows = as_rows(x, group_count(x, per_tensor)).to(compute_dtype(x))
    levels = quant_max - quant_min + 1
    found = predict("dls_fake_quant", rows, scale_weights, shift_weights, levels, cap)
    step, shift = column(found.step), column(found.shift)
    y = step * round_to_grid((rows + shift) / step, quant_min, quant_max) - shift
    if clamp_output:
        y = torch.clamp(y, column(found.low), column(found.high))
    return y.to(x.dtype).reshape(x.shape)


def _step_slope(found: Prediction) -> torch.Tensor:
    """Derivative of the step by its raw prediction; 1/2 where two bounds tie, as in autograd."""
    raw = found.raw.abs().double()
    slope = torch.heaviside(raw - STEP_EPS, raw.new_tensor(0.5))
    if found.cap is not None:
        slope = slope * torch.heaviside(found.cap.double() - raw, raw.new_tensor(0.5))
    return slope * found.raw.sign()


def dls_fake_quant_backward_ref(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale_weights: torch.Tensor,
    shift_weights: torch.Tensor,
    quant_min: int,
    quant_max: int,
    per_tensor: bool,
    cap: bool,
    clamp_output: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference of `qmir::dls_fake_quant_backward`: gradients of x and of the eight scalars."""
    check_range("dls_fake_quant_backward", quant_min, quant_max)
    groups = group_count(x, per_tensor)
    rows = as_rows(x, groups).to(compute_dtype(x))
    upstream = as_rows(grad, groups).to(rows.dtype)
    count = rows.shape[1]
    if rows.numel() == 0:
        zeros = torch.zeros_like(scale_weights), torch.zeros_like(shift_weights)
        return x.new_zeros(x.shape), *zeros
    levels = quant_max - quant_min + 1
    found = predict("dls_fake_quant_backward", rows, scale_weights, shift_weights, levels, cap)
    step, shift, low, high = map(column, (found.step, found.shift, found.low, found.high))

    ratio = (rows + shift) / step
    codes = round_to_grid(ratio, quant_min, quant_max)
    inside = (ratio >= quant_min) & (ratio <= quant_max)
    at_low, at_high = rows == low, rows == high
    zero = rows.new_zeros(())
    # Sums of gradient that the output clamp sends to the smallest and largest element.
    sent_low = sent_high = torch.zeros(rows.shape[0], dtype=torch.float64, device=x.device)
    if clamp_output:
        y0 = step * codes - shift
        under, over = y0 < low, y0 > high
        sent_low = torch.where(under, upstream, zero).double().sum(1)
        sent_high = torch.where(over, upstream, zero).double().sum(1)
        upstream = torch.where(under | over, zero, upstream)
    passed = torch.where(inside, upstream, zero)
    error = codes - torch.where(inside, ratio, zero)

    w, v = scale_weights.double(), shift_weights.double()
    scaled = gradient_scale(count, quant_max) * (upstream * error).double().sum(1)
    by_raw = _step_slope(found) * scaled
    centre_sign = (found.mean + found.shift).sign().double()
    by_shift = passed.double().sum(1) - upstream.double().sum(1)
    by_shift = by_shift + by_raw * (w[0] * centre_sign + w[2] + w[3])

    spread = found.std.double() * (count - 1)
    per_deviation = torch.where(
        spread > 0, (by_raw * w[1] + by_shift * v[1]) / spread, torch.zeros_like(spread)
    )
    constant = (by_raw * w[0] * centre_sign + by_shift * v[0]) / count
    per_low = (by_raw * w[2] + by_shift * v[2] + sent_low) / at_low.sum(1)
    per_high = (by_raw * w[3] + by_shift * v[3] + sent_high) / at_high.sum(1)
    c0, c1, c2, c3 = (
        column(c.to(rows.dtype)) for c in (constant, per_deviation, per_low, per_high)
    )
    dx = passed + (c0 + c1 * (rows - column(found.mean)))
    dx = dx + torch.where(at_low, c2, zero) + torch.where(at_high, c3, zero)

    features = torch.stack(found.shifted(), dim=1).double()
    statistics = torch.stack((found.mean, found.std, found.low, found.high), dim=1).double()
    return (
        dx.to(x.dtype).reshape(x.shape),
        (column(by_raw) * features).sum(0).to(scale_weights.dtype),
        (column(by_shift) * statistics).sum(0).to(shift_weights.dtype),
    )


def _dls_fake_quant_fake(
    x: torch.Tensor,
    scale_weights: torch.Tensor,
    shift_weights: torch.Tensor,
    quant_min: int,
    quant_max: int,
    per_tensor: bool,
    cap: bool,
    clamp_output: bool,
) -> torch.Tensor:
    check_scalars("dls_fake_quant", scale_weights, shift_weights)
    check_range("dls_fake_quant", quant_min, quant_max)
    return x.new_empty(x.shape)


def _dls_fake_quant_backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale_weights: torch.Tensor,
    shift_weights: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape),
        torch.empty_like(scale_weights),
        torch.empty_like(shift_weights),
    )


_dls_fake_quant_backward = define(
    "dls_fake_quant_backward(Tensor grad, Tensor x, Tensor scale_weights, Tensor shift_weights, "
    "int quant_min, int quant_max, bool per_tensor, bool cap, bool clamp_output) "
    "-> (Tensor, Tensor, Tensor)",
    reference=dls_fake_quant_backward_ref,
    fake=_dls_fake_quant_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scale_weights, shift_weights, *ctx.settings = inputs
    ctx.save_for_backward(x, scale_weights, shift_weights)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    gradients = _dls_fake_quant_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, None, None, None, None, None)


_dls_fake_quant = define(
    "dls_fake_quant(Tensor x, Tensor scale_weights, Tensor shift_weights, int quant_min, "
    "int quant_max, bool per_tensor, bool cap, bool clamp_output) -> Tensor",
    reference=dls_fake_quant_ref,
    fake=_dls_fake_quant_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def dls_fake_quant(
    x: torch.Tensor,
    scale_weights: torch.Tensor,
    shift_weights: torch.Tensor,
    quant_min: int = -8,
    quant_max: int = 7,
    per_tensor: bool = False,
    cap: bool = False,
    clamp_output: bool = False,
) -> torch.Tensor:
    """Fake-quantize activations with a step and a shift predicted from their own statistics.

    Args:
        x: activations, any shape; dim 0 counts samples.
        scale_weights: (4,) weights of |mean|, std, min and max of the shifted tensor.
        shift_weights: (4,) weights of mean, std, min and max.
        quant_min: smallest code.
        quant_max: largest code.
        per_tensor: one group for the whole tensor instead of one per sample.
        cap: limit the step to (max - min) / levels, as the published code does; where the limit
            acts, the scale weights get no gradient.
        clamp_output: clip the result to the input's [min, max]; it then leaves the uniform grid.

    Returns:
        Values on the grid step * code - shift, contiguous; differentiable in x and the scalars.

    Shape:
        x (B, ...) -> (B, ...).

    Raises:
        NonFiniteError: a sample holds NaN or infinity.

    Source: arXiv 2503.21970, equations 5 to 10.
    """
    result: torch.Tensor = _dls_fake_quant(
        x, scale_weights, shift_weights, quant_min, quant_max, per_tensor, cap, clamp_output
    )
    return result
