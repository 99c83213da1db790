"""Independent implementations of the quantizers: plain formulas, differentiated by autograd."""

import math

import torch
from torch import Tensor


def _straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    return (value - surrogate).detach() + surrogate


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    return (x - x * factor).detach() + x * factor


def dls(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    quant_min: int,
    quant_max: int,
    per_tensor: bool,
    cap: bool,
    clamp_output: bool,
) -> Tensor:
    """DLS one group at a time, straight from the formulas."""
    groups = [x] if per_tensor else list(x)
    return torch.stack(
        [_dls_group(g, w, v, quant_min, quant_max, cap, clamp_output) for g in groups]
    ).reshape(x.shape)


def _dls_group(
    x: Tensor, w: Tensor, v: Tensor, quant_min: int, quant_max: int, cap: bool, clamp: bool
) -> Tensor:
    std = x.std() if x.numel() > 1 and x.min() < x.max() else x.new_zeros(())
    low, high = x.min(), x.max()
    shift = v[0] * x.mean() + v[1] * std + v[2] * low + v[3] * high
    u = x + shift
    step = (w[0] * u.mean().abs() + w[1] * std + w[2] * u.min() + w[3] * u.max()).abs()
    step = _scaled_gradient(step, 1.0 / math.sqrt(x.numel() * max(quant_max, 1)))
    if cap:
        step = torch.minimum(step, ((high - low) / (quant_max - quant_min + 1)).detach())
    step = torch.maximum(step, torch.tensor(1e-6, dtype=x.dtype))
    clipped = torch.clamp(u / step, quant_min, quant_max)
    y = step * _straight_through(torch.round(clipped), clipped) - shift
    return torch.clamp(y, low, high) if clamp else y


def static(x: Tensor, step: Tensor, shift: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The static activation quantizer."""
    step = _scaled_gradient(step, 1.0 / math.sqrt(x.numel() * max(quant_max, 1)))
    clipped = torch.clamp((x + shift) / step, quant_min, quant_max)
    return step * _straight_through(torch.round(clipped), clipped) - shift


def rfa_loop(w: Tensor, step: Tensor, shift: Tensor, a: Tensor, quant_min: int) -> Tensor:
    """RFA as published: one `where` per level and one per threshold, the last one that holds wins.

    `step` and `shift` have one element, or one per row of `w`.
    """
    count = a.shape[0]
    quant_max = quant_min + count - 1
    column = (-1,) + (1,) * (w.dim() - 1)
    per_group = w.numel() // step.numel()
    step = _scaled_gradient(step, 1.0 / math.sqrt(per_group * max(quant_max, 1))).reshape(column)
    shift = shift.reshape(column)
    c = torch.clamp((w + shift) / step, quant_min, quant_max)
    level = torch.full_like(c, quant_min)
    for j in range(1, count):
        level = torch.where(c > (a[j - 1] + a[j]) / 2, float(quant_min + j), level)
    line = c * 0.0
    for j in range(count - 1):
        line = torch.where(c > a[j], (c - a[j]) / (a[j + 1] - a[j]), line)
    line = torch.where(c <= a[0], 0.1 * (c - a[0]), line)
    line = torch.where(c > a[-1], 0.1 * (c - a[-1]), line)
    return step * _straight_through(level, line) - shift


def gradients(
    function: object, inputs: tuple[Tensor, ...], settings: tuple[object, ...], upstream: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output of `function(*inputs, *settings)` and the gradients of all inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves, *settings)  # type: ignore[operator]
    return y.detach(), torch.autograd.grad(y, leaves, upstream)


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    got, want = got.detach().double(), want.detach().double()
    scale = float(want.norm())
    return float((got - want).norm()) / (scale if scale > 0 else 1.0)
