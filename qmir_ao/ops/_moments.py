"""Statistics of an integer operator's results, made by the operator while it holds them.

    z = y + offset[o]
    moments[b, o] = (mean z, sum (z - mean)^2, min z, max z) over the positions of a sample

The statistics of any set of channels follow from those of its channels, so that a quantizer need
not read the results a first time (`qmir_ao.ops.chain_quantize`). The result is the same as without.

Kernels add up tiles in an order of their own: mean and sum of squares are off by a few units of
2^-53, which the statistics, rounded to float32, hardly ever show. Minimum and maximum are exact.

Shape letters: B = samples, O = output channels, n = chosen channels, G = groups (B, or 1).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qmir_ao.ops._integer import require

ARGUMENT = "Tensor? moments_offset=None"
"""The end of a schema."""
COLUMNS = ("mean", "squares", "low", "high")
"""What the last dimension holds."""


def check_moments_offset(op: str, offset: Tensor | None, features: int) -> None:
    """Refuse an offset that is not one float32 value for each output channel."""
    if offset is None:
        return
    require(
        offset.dtype == torch.float32 and offset.numel() == features,
        lambda: (
            f"qmir::{op}: moments_offset must be float32 of {features} values, "
            f"got {tuple(offset.shape)} {offset.dtype}"
        ),
    )


def moments_ref(y: Tensor, offset: Tensor | None, dim: int) -> Tensor:
    """Moments of each channel of a result (B, ..., O, ...) along `dim`: float64 (B, O, 4)."""
    rows = y.movedim(dim, 1).flatten(2) if y.dim() > 2 else y.unsqueeze(-1)
    if offset is not None:
        rows = rows + offset.reshape(-1, 1)
    wide = rows.double()
    # Deviations from the first value: a constant channel gets squares of exactly zero.
    deviation = wide - wide[..., :1]
    about = deviation.mean(-1, keepdim=True)
    squares = (deviation - about).square().sum(-1)
    low, high = wide.aminmax(dim=-1)
    return torch.stack([(wide[..., :1] + about).squeeze(-1), squares, low, high], dim=-1)


def empty_moments(y: Tensor, features: int) -> Tensor:
    """Room for the moments of a result."""
    samples = y.shape[0] if y.dim() > 1 else 1
    return torch.empty((samples, features, len(COLUMNS)), dtype=torch.float64, device=y.device)


def with_moments(
    operator: Callable[..., Tensor], op: str, dim: int, arguments: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Reference of `op` from that of the operator without moments.

    Args:
        operator: the reference without moments.
        op: name for errors.
        dim: of the channels in its result.
        arguments: how many arguments it takes; the offset follows them.
    """

    def reference(*args: Any) -> tuple[Tensor, Tensor]:
        own, offset = split_offset(args, arguments)
        y = operator(*own)
        return y, checked_moments(op, y, offset, dim)

    return reference


def with_empty_moments(
    operator: Callable[..., Tensor], op: str, dim: int, arguments: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The shapes of what `with_moments` makes, from an operator that makes those of the result."""

    def fake(*args: Any) -> tuple[Tensor, Tensor]:
        own, offset = split_offset(args, arguments)
        y = operator(*own)
        check_moments_offset(op, offset, y.shape[dim])
        return y, empty_moments(y, y.shape[dim])

    return fake


def checked_moments(op: str, y: Tensor, offset: Tensor | None, dim: int) -> Tensor:
    """Moments of a result, after checks of what is asked for."""
    check_moments_offset(op, offset, y.shape[dim])
    check_some(op, y)
    return moments_ref(y if y.dim() > 1 else y.unsqueeze(0), offset, dim)


def split_offset(args: Sequence[Any], arguments: int) -> tuple[Sequence[Any], Tensor | None]:
    """The arguments of an operator without moments, and the offset that follows them."""
    return args[:arguments], args[arguments] if len(args) > arguments else None


def check_some(op: str, y: Tensor) -> None:
    """Refuse a result without values, which has no mean."""
    require(
        y.numel() > 0,
        lambda: f"qmir::{op}: a result of shape {tuple(y.shape)} holds nothing and has no moments",
    )


def check_moments(op: str, moments: Tensor, channels: Tensor | None, samples: int) -> None:
    """Refuse moments that do not belong to so many samples."""
    require(
        moments.dtype == torch.float64
        and moments.dim() == 3
        and moments.shape[0] == samples
        and moments.shape[1] > 0
        and moments.shape[2] == len(COLUMNS),
        lambda: (
            f"qmir::{op}: moments must be float64 ({samples}, O, {len(COLUMNS)}), "
            f"got {tuple(moments.shape)} {moments.dtype}"
        ),
    )
    require(
        channels is None
        or (channels.dtype == torch.int64 and channels.dim() == 1 and channels.numel() > 0),
        lambda: (
            f"qmir::{op}: moments_channels must be int64 (n,), "
            f"got {None if channels is None else (tuple(channels.shape), channels.dtype)}"
        ),
    )


def merge_moments(
    moments: Tensor, channels: Tensor | None, groups: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, standard deviation, minimum and maximum of each group.

    Args:
        moments: float64 (B, O, 4).
        channels: which channels a group has, or None for all.
        groups: B, or 1.
        count: values of a group.

    Returns:
        Four float64 tensors (G,).
    """
    chosen = moments if channels is None else moments[:, channels]
    mean, squares, low, high = chosen.reshape(groups, -1, len(COLUMNS)).unbind(-1)
    each = count / mean.shape[1]
    pivot = mean[:, :1]
    deviation = mean - pivot
    about = deviation.mean(1, keepdim=True)
    variance = squares.sum(1) + each * (deviation - about).square().sum(1)
    std = (variance / max(count - 1, 1)).sqrt()
    return (pivot + about).squeeze(1), std, low.amin(1), high.amax(1)
