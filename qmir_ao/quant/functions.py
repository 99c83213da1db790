"""Differentiable pieces of the learned quantizers that are no operators of their own."""

import math
from typing import Any

import torch
from torch import Tensor

_SOFT_NORM = 2.0 * math.tanh(0.5)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Decay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] + ctx.factor * x, None


class _SoftRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        inner = torch.tanh(x - torch.floor(x) - 0.5)
        return grads[0] * ((1.0 - inner * inner) / _SOFT_NORM)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` unchanged, its gradient times `factor` (LSQ's gradient scale)."""
    result: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return result


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged (straight-through estimator)."""
    result: Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return result


def straight_through(carrier: Tensor, values: Tensor) -> Tensor:
    """`values`, with the gradient going to `carrier`, of the same shape."""
    result: Tensor = _StraightThrough.apply(carrier, values)  # type: ignore[no-untyped-call]
    return result


def with_decay(x: Tensor, factor: float) -> Tensor:
    """`x` unchanged; its gradient gains that of the penalty factor * x**2 / 2."""
    result: Tensor = _Decay.apply(x, factor)  # type: ignore[no-untyped-call]
    return result


def round_soft(x: Tensor) -> Tensor:
    """Round half to even; the gradient is that of a tanh ramp in each interval.

    Source: QuantSR's redistribution (NeurIPS 2023): the derivative of
    floor(x) + 0.5 + tanh(x - floor(x) - 0.5) / (2 tanh 0.5).
    """
    result: Tensor = _SoftRound.apply(x)  # type: ignore[no-untyped-call]
    return result


class _ThresholdCodes(torch.autograd.Function):
    """Codes of learned intervals; the backward is that of the piecewise linear ramp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, widths: Tensor) -> Tensor:
        ctx.save_for_backward(x, start, widths)
        return torch.bucketize(x, interval_cuts(start, widths)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, start, widths = ctx.saved_tensors
        upstream = grads[0]
        edges = torch.cat([start, start + torch.cumsum(widths, 0)])
        segment = torch.bucketize(x, edges) - 1
        inside = (segment >= 0) & (segment < widths.numel())
        segment = segment.clamp(0, widths.numel() - 1)
        slope = torch.where(inside, upstream / widths[segment], upstream.new_zeros(()))
        count = widths.numel()
        flat = segment.reshape(-1)
        total = torch.bincount(flat, slope.reshape(-1).double(), minlength=count)
        offset = slope * (x - edges[segment]) / widths[segment]
        own = torch.bincount(flat, offset.reshape(-1).double(), minlength=count)
        # A segment moves with the start and with every width before it.
        beyond = torch.flip(torch.cumsum(torch.flip(total, (0,)), 0), (0,)) - total
        return slope, -total.sum().reshape(start.shape).to(start), -(own + beyond).to(widths)


def interval_cuts(start: Tensor, widths: Tensor) -> Tensor:
    """The 2**bits - 1 inputs at which the code changes: the middle of each interval."""
    return start + torch.cumsum(widths, 0) - widths / 2


def threshold_codes(x: Tensor, start: Tensor, widths: Tensor) -> Tensor:
    """Codes 0 .. len(widths) of `x` by learned intervals: how many cuts it exceeds.

    Args:
        x: any shape.
        start: (1,), where the ramp begins.
        widths: (2**bits - 1,), positive; interval k leads from code k to k + 1.

    Source: N2UQ (CVPR 2022), generalised straight-through estimator.
    """
    result: Tensor = _ThresholdCodes.apply(x, start, widths)  # type: ignore[no-untyped-call]
    return result
