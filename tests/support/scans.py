"""What the tests of the selective scans share: accuracy against float64, and walks over images."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from support.tolerances import KERNEL_VS_REFERENCE
from torch import Tensor

Operands = list[Tensor | None]
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def in_float64(tensors: Sequence[Tensor | None]) -> Operands:
    return [None if x is None else x.double() for x in tensors]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference as a share of the largest value; infinite where that should be zero."""
    if not want.numel():
        return 0.0
    error, largest = float((got.double() - want).abs().max()), float(want.abs().max())
    return error / largest if largest else math.inf if error else 0.0


def assert_no_worse(cases: Sequence[tuple[Tensor, Tensor, Tensor]], name: str = "") -> None:
    """Mean error over (result, plain float32, exact): KERNEL_VS_REFERENCE times the plain at most.

    The largest element decides the error of one case; plain float32 may be exact there by luck.
    """
    error = sum(relative_error(got, exact) for got, _, exact in cases)
    allowed = sum(relative_error(plain, exact) for _, plain, exact in cases)
    assert error <= KERNEL_VS_REFERENCE * allowed, name


def without_softplus(tensors: Operands) -> Operands:
    u, delta, A, B, C, D, _ = tensors
    return [u, delta.abs() * 0.2, A, B, C, D, None]


def assert_as_accurate(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    cases: list[tuple[Any, ...]],
    names: tuple[str, ...],
) -> None:
    """Mean error of each output over all cases: kernel beside reference, both against float64."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in names}
    for *operands_, softplus in cases:
        want = reference(*in_float64(operands_), softplus)
        outputs = (kernel(*operands_, softplus), reference(*operands_, softplus), want)
        if isinstance(want, Tensor):
            outputs = tuple((x,) for x in outputs)
        for name, got, plain, exact in zip(names, *outputs, strict=True):
            assert got.dtype == torch.float32
            found[name].append((got, plain, exact))
    for name, results in found.items():
        assert_no_worse(results, name)


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
