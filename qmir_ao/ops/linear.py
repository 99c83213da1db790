"""Linear layer on integer codes with a packed weight.

    acc[r, o] = sum_k q_x[r, k] * q_w[o, k]                          int32, exact
    y[r, o]   = (alpha*step[o] * acc - alpha*shift[o] * sx[r])
                + (K*beta*shift[o] - beta*step[o] * sw[o] + bias[o])

with x_hat = alpha * q_x - beta, w_hat = step * q_w - shift, sx = sum_k q_x, sw = sum_k q_w: the
product of the two dequantized operands, with no float copy of either. A residual and an activation
may follow (`qmir_ao.ops._epilogue`); `linear_moments` also gives the statistics of the result
(`qmir_ao.ops._moments`).

Source: affine integer arithmetic on the grids of Q-MambaIR (arXiv 2503.21970), equations 5 to 7;
the term for zero points as in Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference" (2018), equation 7.

Shape letters: B = samples, K = input features, O = output features, G = B or 1 activation groups.
Inference only: there is no backward.
"""

import math

import torch
from torch import Tensor

from qmir_ao.ops._epilogue import ARGUMENTS, Epilogue, apply_epilogue, check_epilogue
from qmir_ao.ops._integer import (
    check_bias,
    check_codes,
    check_grid,
    check_taps,
    check_weight,
    check_weight_grid,
    epilogue,
    require,
)
from qmir_ao.ops._library import define
from qmir_ao.ops._moments import ARGUMENT as MOMENTS_ARGUMENT
from qmir_ao.ops._moments import with_empty_moments, with_moments
from qmir_ao.ops.pack import unpack_ref

ACC_SCHEMA = "linear_acc(Tensor x, Tensor weight, int bits, int out_features) -> Tensor"
_PARAMETERS = (
    "Tensor x, Tensor x_step, Tensor x_shift, Tensor weight, Tensor w_step, "
    f"Tensor w_shift, Tensor? bias, int bits, int out_features, {ARGUMENTS}"
)
SCHEMA = f"linear({_PARAMETERS}) -> Tensor"
MOMENTS_SCHEMA = f"linear_moments({_PARAMETERS}, {MOMENTS_ARGUMENT}) -> (Tensor, Tensor)"
PARAMETERS = 12
"""How many parameters `linear` has; `linear_moments` has one more."""


def check_linear_acc(op: str, x: Tensor, weight: Tensor, bits: int, out_features: int) -> None:
    """Refuse operands whose codes, container or lengths do not fit together."""
    check_codes(op, "x", x)
    require(x.dim() >= 1, lambda: f"qmir::{op}: x must be (B, ..., K), got a scalar")
    require(out_features >= 1, lambda: f"qmir::{op}: out_features must be >= 1, got {out_features}")
    check_taps(op, x.shape[-1])
    check_weight(op, weight, out_features * x.shape[-1], bits)


def check_linear(
    x: Tensor,
    x_step: Tensor,
    x_shift: Tensor,
    weight: Tensor,
    w_step: Tensor,
    w_shift: Tensor,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    epilogue: Epilogue,
) -> None:
    """Refuse operands that do not fit `qmir::linear`."""
    check_linear_acc("linear", x, weight, bits, out_features)
    rows = math.prod(x.shape[:-1])
    per_row = x_step.numel() == rows and x.dim() > 1
    samples = x.shape[0] if x.dim() > 1 else 1
    check_grid("linear", "x", x_step, x_shift, rows if per_row else samples)
    check_weight_grid("linear", w_step, w_shift, out_features)
    check_bias("linear", bias, out_features)
    check_epilogue("linear", epilogue, (*x.shape[:-1], out_features), out_features)


def _accumulate(x: Tensor, weight: Tensor, bits: int, out_features: int) -> tuple[Tensor, Tensor]:
    codes = unpack_ref(weight, bits, out_features * x.shape[-1])
    codes = codes.reshape(out_features, x.shape[-1]).to(torch.int32)
    return torch.matmul(x.to(torch.int32), codes.t()), codes


def linear_acc_ref(x: Tensor, weight: Tensor, bits: int, out_features: int) -> Tensor:
    """Plain-torch form of `qmir::linear_acc`."""
    check_linear_acc("linear_acc", x, weight, bits, out_features)
    return _accumulate(x, weight, bits, out_features)[0]


def linear_ref(
    x: Tensor,
    x_step: Tensor,
    x_shift: Tensor,
    weight: Tensor,
    w_step: Tensor,
    w_shift: Tensor,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Plain-torch form of `qmir::linear`."""
    end = Epilogue(residual, residual_scale, activation)
    check_linear(x, x_step, x_shift, weight, w_step, w_shift, bias, bits, out_features, end)
    acc, codes = _accumulate(x, weight, bits, out_features)
    per_sample = (-1, *[1] * (x.dim() - 1))
    if x_step.numel() not in (1, x.shape[0]):
        per_sample = (*x.shape[:-1], 1)
    y = epilogue(
        acc,
        x.sum(-1, keepdim=True, dtype=torch.int32),
        codes.sum(1),
        x.shape[-1],
        (x_step.reshape(per_sample), x_shift.reshape(per_sample)),
        (w_step.reshape(-1), w_shift.reshape(-1)),
        bias,
    )
    return apply_epilogue(y, end, (-1,)).contiguous()


def _linear_acc_fake(x: Tensor, weight: Tensor, bits: int, out_features: int) -> Tensor:
    check_linear_acc("linear_acc", x, weight, bits, out_features)
    return x.new_empty((*x.shape[:-1], out_features), dtype=torch.int32)


def _linear_fake(
    x: Tensor,
    x_step: Tensor,
    x_shift: Tensor,
    weight: Tensor,
    w_step: Tensor,
    w_shift: Tensor,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    end = Epilogue(residual, residual_scale, activation)
    check_linear(x, x_step, x_shift, weight, w_step, w_shift, bias, bits, out_features, end)
    return x.new_empty((*x.shape[:-1], out_features), dtype=torch.float32)


_linear_acc = define(ACC_SCHEMA, reference=linear_acc_ref, fake=_linear_acc_fake)
_linear = define(SCHEMA, reference=linear_ref, fake=_linear_fake)
linear_moments_ref = with_moments(linear_ref, "linear_moments", -1, PARAMETERS)
linear_moments = define(
    MOMENTS_SCHEMA,
    reference=linear_moments_ref,
    fake=with_empty_moments(_linear_fake, "linear_moments", -1, PARAMETERS),
)
"""`linear` and the statistics of its output features for each sample (`qmir_ao.ops._moments`)."""


def linear_acc(x: Tensor, weight: Tensor, *, bits: int, out_features: int) -> Tensor:
    """Integer accumulators of a linear layer.

    Args:
        x: int8 codes (B, ..., K).
        weight: `pack(codes of shape (O, K), bits)`, uint8.
        bits: container of one weight code: 2, 4 or 8.
        out_features: O.

    Returns:
        int32 sums of products (B, ..., O), exact.

    Shape: x (B, ..., K); weight (ceil(O*K*bits/8),); result (B, ..., O).

    Raises:
        RuntimeError: an operand of another type or length.

    Source: module docstring.
    """
    acc: Tensor = _linear_acc(x, weight, bits, out_features)
    return acc


def linear(
    x: Tensor,
    x_step: Tensor,
    x_shift: Tensor,
    weight: Tensor,
    w_step: Tensor,
    w_shift: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    out_features: int,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Linear layer of quantized operands: x_hat @ w_hat.T + bias in integer arithmetic.

    Args:
        x: int8 codes (B, ..., K).
        x_step: alpha, float32, one per row (numel(x) / K,), one per sample (B,) or (1,).
        x_shift: beta, as x_step.
        weight: `pack(codes of shape (O, K), bits)`, uint8.
        w_step: float32, one per output feature (O,) or (1,).
        w_shift: float32, (1,) or as w_step.
        bias: float32 (O,), or None.
        bits: container of one weight code: 2, 4 or 8.
        out_features: O.
        residual: float32 (B, ..., O), added to the result, or None.
        residual_scale: float32, O factors of the residual's channels, or None.
        activation: of the sum, "none", "relu", "sigmoid", "silu", "gelu" or "gelu_tanh".

    Returns:
        float32 (B, ..., O), contiguous.

    Shape: x (B, ..., K); weight (ceil(O*K*bits/8),); result (B, ..., O).

    Raises:
        RuntimeError: an operand of another type or length.

    Source: module docstring.
    """
    y: Tensor = _linear(
        x, x_step, x_shift, weight, w_step, w_shift, bias, bits, out_features,
        residual, residual_scale, activation,
    )  # fmt: skip
    return y
