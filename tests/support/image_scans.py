"""Float operands of the scans over images, and the draws on which kernels are compared."""

from typing import Any

import torch
from support.scans import Operands, without_softplus
from torch import Tensor

# batch, channels, states, height, width
Size = tuple[int, int, int, int, int]

OPTIONAL = {"both": (True, True), "no-D": (False, True), "no-bias": (True, False)}


def operands(size: Size, has_D: bool = True, has_bias: bool = True, seed: int = 0) -> Operands:
    batch, channels, states, *sides = size
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    return [
        normal(batch, channels, *sides),
        normal(batch, 4 * channels, *sides) * 0.5,
        -torch.exp(normal(4 * channels, states) * 0.5),
        normal(batch, 4, states, *sides),
        normal(batch, 4, states, *sides),
        normal(4 * channels) if has_D else None,
        normal(4 * channels) - 2.0 if has_bias else None,
    ]


def cases(size: Size, optional: tuple[bool, bool], softplus: bool = True) -> list[tuple[Any, ...]]:
    # As many draws as give 64 rows: the reference may hit a few elements by luck.
    count = max(4, -(-64 // (4 * size[0] * size[1])))
    drawn = [operands(size, *optional, seed=seed) for seed in range(count)]
    return [(*(x if softplus else without_softplus(x)), softplus) for x in drawn]


def with_gradient(drawn: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [(torch.randn_like(case[0]), *case) for case in drawn]
