"""What the fake-quantizers share: groups as rows, range checks, the rounding grid.

Shape letters: G = quantization groups, N = elements of one group.
"""

import math

import torch

from qmir_ao.errors import NonFiniteError


def check_range(op: str, quant_min: int, quant_max: int) -> None:
    """Refuse a code range that does not belong to 2..8 bits, or leaves zero out."""
    torch._check(
        quant_min <= 0 < quant_max and 2 < quant_max - quant_min + 1 <= 256,
        lambda: (
            f"qmir::{op}: codes must fit 2..8 bits and hold zero, such as [-8, 7] or [0, 15], "
            f"got [{quant_min}, {quant_max}]"
        ),
    )


def code_dtype(quant_max: int) -> torch.dtype:
    """The integer type of codes: int8, or uint8 for an unsigned 8-bit range."""
    return torch.uint8 if quant_max > 127 else torch.int8


def group_count(x: torch.Tensor, per_tensor: bool) -> int:
    """Number of activation groups: one per sample (dim 0), or one in all.

    A vector has no dimension for samples: it is one.
    """
    return 1 if per_tensor or x.dim() < 2 else x.shape[0]


def as_rows(x: torch.Tensor, groups: int) -> torch.Tensor:
    """View (or copy) `x` as (G, N)."""
    return x.reshape(groups, x.numel() // groups if groups else 0)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Type of the elementwise arithmetic: float64 stays, everything narrower runs in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gradient_scale(count: int, quant_max: int) -> float:
    """LSQ's gradient scale 1/sqrt(N * Qp) of a step shared by `count` elements."""
    return 1.0 / math.sqrt(max(count, 1) * max(quant_max, 1))


def round_to_grid(ratio: torch.Tensor, quant_min: int, quant_max: int) -> torch.Tensor:
    """Codes as floats: clip first, then round half to even."""
    return torch.round(torch.clamp(ratio, quant_min, quant_max))


def column(values: torch.Tensor) -> torch.Tensor:
    """(G,) as (G, 1), to meet rows of (G, N)."""
    return values.reshape(-1, 1)


def non_finite(op: str, where: str) -> NonFiniteError:
    """The error for a tensor that has no quantization step; `where` names the part at fault."""
    return NonFiniteError(
        f"qmir::{op}: {where} holds NaN or infinity (or its learned scalars do), so nothing can be "
        "quantized; every value must be finite: look for a diverged layer before this quantizer, "
        "or lower the learning rate"
    )


def check_finite(op: str, where: str, values: torch.Tensor) -> None:
    """Raise `NonFiniteError` where a value is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise non_finite(op, where)
