"""The static activation quantizer of the published placement: a learned step and shift (LSQ+-like).

    y = step * round_half_even(clip((x + shift) / step, quant_min, quant_max)) - shift

Source: the activation quantizer beside DLS in the code of Q-MambaIR (arXiv 2503.21970); LSQ+
(arXiv 2004.09576) with a shift that is added.

Shape letters: N = elements of x. One step and one shift serve the whole tensor.
"""

from typing import Any

import torch

from qmir_ao.ops._affine import (
    check_finite,
    check_range,
    compute_dtype,
    gradient_scale,
    round_to_grid,
)
from qmir_ao.ops._library import define


def check_single(op: str, step: torch.Tensor, shift: torch.Tensor) -> None:
    """Refuse more than one step and one shift."""
    torch._check(
        step.numel() == 1 and shift.numel() == 1,
        lambda: (
            f"qmir::{op}: step and shift must have one element, got shapes "
            f"{tuple(step.shape)} and {tuple(shift.shape)}"
        ),
    )


def static_fake_quant_ref(
    x: torch.Tensor, step: torch.Tensor, shift: torch.Tensor, quant_min: int, quant_max: int
) -> torch.Tensor:
    """Reference of `qmir::static_fake_quant`."""
    check_range("static_fake_quant", quant_min, quant_max)
    check_single("static_fake_quant", step, shift)
    values = x.to(compute_dtype(x)).contiguous()
    step, shift = step.reshape(()).to(values.dtype), shift.reshape(()).to(values.dtype)
    ratio = (values + shift) / step
    check_finite("static_fake_quant", "x", ratio)
    y = step * round_to_grid(ratio, quant_min, quant_max) - shift
    return y.to(x.dtype)


def static_fake_quant_backward_ref(
    grad: torch.Tensor,
    x: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    quant_min: int,
    quant_max: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference of `qmir::static_fake_quant_backward`: gradients of x, step and shift."""
    check_range("static_fake_quant_backward", quant_min, quant_max)
    check_single("static_fake_quant_backward", step, shift)
    values = x.to(compute_dtype(x)).contiguous()
    upstream = grad.to(values.dtype).contiguous()
    ratio = (values + shift.reshape(()).to(values.dtype)) / step.reshape(()).to(values.dtype)
    codes = round_to_grid(ratio, quant_min, quant_max)
    inside = (ratio >= quant_min) & (ratio <= quant_max)
    zero = values.new_zeros(())
    passed = torch.where(inside, upstream, zero)
    error = codes - torch.where(inside, ratio, zero)
    dstep = gradient_scale(x.numel(), quant_max) * (upstream * error).double().sum()
    dshift = passed.double().sum() - upstream.double().sum()
    return (
        passed.to(x.dtype),
        dstep.to(step.dtype).reshape(step.shape),
        dshift.to(shift.dtype).reshape(shift.shape),
    )


def _fake(
    x: torch.Tensor, step: torch.Tensor, shift: torch.Tensor, quant_min: int, quant_max: int
) -> torch.Tensor:
    check_range("static_fake_quant", quant_min, quant_max)
    check_single("static_fake_quant", step, shift)
    return x.new_empty(x.shape)


def _backward_fake(
    grad: torch.Tensor, x: torch.Tensor, step: torch.Tensor, shift: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), step.new_empty(step.shape), shift.new_empty(shift.shape)


_static_fake_quant_backward = define(
    "static_fake_quant_backward(Tensor grad, Tensor x, Tensor step, Tensor shift, int quant_min, "
    "int quant_max) -> (Tensor, Tensor, Tensor)",
    reference=static_fake_quant_backward_ref,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, step, shift, *ctx.settings = inputs
    ctx.save_for_backward(x, step, shift)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    gradients = _static_fake_quant_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, None, None)


_static_fake_quant = define(
    "static_fake_quant(Tensor x, Tensor step, Tensor shift, int quant_min, int quant_max) "
    "-> Tensor",
    reference=static_fake_quant_ref,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def static_fake_quant(
    x: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor,
    quant_min: int = -8,
    quant_max: int = 7,
) -> torch.Tensor:
    """Fake-quantize activations with one learned step and one learned shift.

    Args:
        x: activations, any shape.
        step: one element, positive.
        shift: one element.
        quant_min: smallest code.
        quant_max: largest code.

    Returns:
        Values on the grid step * code - shift, contiguous; differentiable in x, step and shift.

    Shape:
        x (...) -> (...).

    Raises:
        NonFiniteError: x holds NaN or infinity.
        RuntimeError: a code range outside 2..8 bits, or more than one step.

    Source: the activation quantizer in the published code of arXiv 2503.21970.
    """
    result: torch.Tensor = _static_fake_quant(x, step, shift, quant_min, quant_max)
    return result
