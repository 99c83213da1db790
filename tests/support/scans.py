"""What the tests of the selective scans share: accuracy against float64, and walks over images."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from support.tolerances import KERNEL_VS_REFERENCE, SCAN_FLOOR
from torch import Tensor

Operands = list[Tensor | None]
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def in_float64(tensors: Sequence[Tensor | None]) -> Operands:
    return [None if x is None else x.double() for x in tensors]


def max_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max()) if want.numel() else 0.0


def floor(want: Tensor) -> float:
    """What the last roundings of the largest element may cost."""
    return SCAN_FLOOR * float(want.abs().max()) if want.numel() else 0.0


def without_softplus(tensors: Operands) -> Operands:
    u, delta, A, B, C, D, _ = tensors
    return [u, delta.abs() * 0.2, A, B, C, D, None]


def assert_as_accurate(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    cases: list[tuple[Any, ...]],
    names: tuple[str, ...],
) -> None:
    """Largest error of each output over all cases, kernel against reference, both to float64."""
    found = {name: [0.0, 0.0, 0.0] for name in names}
    for *operands_, softplus in cases:
        want = reference(*in_float64(operands_), softplus)
        outputs = (kernel(*operands_, softplus), reference(*operands_, softplus), want)
        if isinstance(want, Tensor):
            outputs = tuple((x,) for x in outputs)
        for name, got, plain, exact in zip(names, *outputs, strict=True):
            assert got.dtype == torch.float32
            errors = max_error(got, exact), max_error(plain, exact), floor(exact)
            found[name] = [max(pair) for pair in zip(found[name], errors, strict=True)]
    for name, (error, plain, rounding) in found.items():
        assert error <= KERNEL_VS_REFERENCE * plain + rounding, name


def walks(height: int, width: int) -> list[np.ndarray]:
    """Flat positions of the pixels in the order in which each direction visits them."""
    rows = [h * width + w for h in range(height) for w in range(width)]
    columns = [h * width + w for w in range(width) for h in range(height)]
    return [np.array(order, int) for order in (rows, columns, rows[::-1], columns[::-1])]


def follow(x: Tensor, walk: np.ndarray) -> Tensor:
    """(..., H, W) as the sequence (..., L) of a walk."""
    return x.flatten(-2)[..., torch.from_numpy(walk)]


def put_back(x: Tensor, walk: np.ndarray, height: int, width: int) -> Tensor:
    """The image (..., H, W) whose walk gives the sequence x."""
    image = torch.empty_like(x)
    image[..., torch.from_numpy(walk)] = x
    return image.unflatten(-1, (height, width))
