"""RFA fake-quantization for training: quantize and dequantize a weight, differentiably.

    w_hat = step * (quant_min + i) - shift, with the level i of `rfa.py`

The backward replaces the rounding by a line through the thresholds: slope 1 / (T[j+1] - T[j])
between two of them, 0.1 outside. The step's gradient is scaled by 1/sqrt(N * quant_max).

Source: Q-MambaIR (arXiv 2503.21970), equations 7 and 8 and algorithm 1, with the gradients of the
published code.

Shape letters: G = groups (1 per tensor, or one per output channel), N = weights of one group,
T = 2**bits thresholds. w is viewed as (G, N). The shift has one element for all groups, or G.
"""

from typing import Any

import torch

from qmir_ao.ops._affine import as_rows, column, gradient_scale
from qmir_ao.ops._library import define
from qmir_ao.ops.rfa import ascending, check_weight, quant_max_of, round_weight

OUTER_SLOPE = 0.1
"""Slope of the rounding's surrogate below the first and above the last threshold."""


def rfa_fake_quant_ref(
    w: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    thresholds: torch.Tensor,
    quant_min: int,
) -> torch.Tensor:
    """Reference of `qmir::rfa_fake_quant`."""
    check_weight("rfa_fake_quant", w, step, shift, thresholds, quant_min)
    level = round_weight(w, step, shift, thresholds, quant_min).level
    values = column(step) * level.to(step.dtype) - column(shift)
    return values.to(w.dtype).reshape(w.shape)


def rfa_fake_quant_backward_ref(
    grad: torch.Tensor,
    w: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    thresholds: torch.Tensor,
    quant_min: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference of `qmir::rfa_fake_quant_backward`: gradients of w, step, shift, thresholds."""
    check_weight("rfa_fake_quant_backward", w, step, shift, thresholds, quant_min)
    last, quant_max = thresholds.shape[0] - 1, quant_max_of(thresholds, quant_min)
    ratio, clipped, level = round_weight(w, step, shift, thresholds, quant_min)
    upstream = as_rows(grad, step.numel()).to(ratio.dtype)
    points = thresholds.to(ratio.dtype)
    # Segment 0 lies below the first threshold, segment T above the last.
    segment = torch.searchsorted(ascending(points), clipped)
    segment = torch.where(clipped <= points[0], 0, segment)
    segment = torch.where(clipped > points[last], last + 1, segment)
    outer = points.new_tensor([OUTER_SLOPE])
    slopes = torch.cat([outer, 1.0 / (points[1:] - points[:-1]), outer])
    inside = (ratio >= quant_min) & (ratio <= quant_max)
    slope = torch.where(inside, slopes[segment], points.new_zeros(()))
    dw = upstream * slope

    error = level.to(ratio.dtype) - slope * ratio
    scale = gradient_scale(ratio.shape[1], quant_max)
    dstep = scale * (upstream * error).double().sum(1)
    dshift = dw.double().sum(1) - upstream.double().sum(1)
    if shift.numel() == 1:
        dshift = dshift.sum()

    weighted = column(step) * upstream
    bins = segment.reshape(-1)
    total = torch.zeros(last + 2, dtype=torch.float64, device=w.device)
    mass = total.index_add(0, bins, weighted.double().reshape(-1))
    moment = total.index_add(0, bins, (weighted * clipped).double().reshape(-1))
    left, right = points[:-1].double(), points[1:].double()
    inner, inner_moment, gap = mass[1:-1], moment[1:-1], (right - left).square()
    dthresholds = torch.zeros(last + 1, dtype=torch.float64, device=w.device)
    dthresholds[:-1] -= (right * inner - inner_moment) / gap
    dthresholds[1:] -= (inner_moment - left * inner) / gap
    dthresholds[0] -= OUTER_SLOPE * mass[0]
    dthresholds[-1] -= OUTER_SLOPE * mass[-1]
    return (
        dw.to(w.dtype).reshape(w.shape),
        dstep.to(step.dtype).reshape(step.shape),
        dshift.to(shift.dtype).reshape(shift.shape),
        dthresholds.to(thresholds.dtype),
    )


def _fake_quant_fake(
    w: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    thresholds: torch.Tensor,
    quant_min: int,
) -> torch.Tensor:
    check_weight("rfa_fake_quant", w, step, shift, thresholds, quant_min)
    return w.new_empty(w.shape)


def _backward_fake(
    grad: torch.Tensor,
    w: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    thresholds: torch.Tensor,
    quant_min: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        w.new_empty(w.shape),
        step.new_empty(step.shape),
        shift.new_empty(shift.shape),
        thresholds.new_empty(thresholds.shape),
    )


_rfa_fake_quant_backward = define(
    "rfa_fake_quant_backward(Tensor grad, Tensor w, Tensor step, Tensor shift, Tensor thresholds, "
    "int quant_min) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=rfa_fake_quant_backward_ref,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.quant_min = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return (*_rfa_fake_quant_backward(grad, *ctx.saved_tensors, ctx.quant_min), None)


_rfa_fake_quant = define(
    "rfa_fake_quant(Tensor w, Tensor step, Tensor shift, Tensor thresholds, int quant_min) "
    "-> Tensor",
    reference=rfa_fake_quant_ref,
    fake=_fake_quant_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def rfa_fake_quant(
    w: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    thresholds: torch.Tensor,
    quant_min: int = -8,
) -> torch.Tensor:
    """Fake-quantize a weight by learned thresholds.

    Args:
        w: weight; with G steps it is viewed as G rows.
        step: one element, or one per output channel, positive.
        shift: one element, or as many as `step`.
        thresholds: 2**bits ascending values, in units of codes.
        quant_min: smallest code; the largest is quant_min + len(thresholds) - 1.

    Returns:
        Values on the grid step * code - shift, contiguous; differentiable in all four tensors.

    Shape:
        w (O, ...), step (1,) or (O,), shift (1,) or that of step -> (O, ...).

    Raises:
        RuntimeError: thresholds that do not belong to 2..8 bits, or steps that do not divide w.

    Source: arXiv 2503.21970, equations 7 and 8, algorithm 1.
    """
    result: torch.Tensor = _rfa_fake_quant(w, step, shift, thresholds, quant_min)
    return result
