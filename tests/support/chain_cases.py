"""Cases of `qmir::chain_quantize` that its kernels' tests share: layouts, chains, operands."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qmir_ao.ops._activations import ACTIVATIONS
from qmir_ao.ops.chain_quantize import ChainArgs

W = torch.tensor([0.1, 0.3, -0.02, 0.05])
V = torch.tensor([-1.0, 0.1, 0.02, -0.03])
CHAINS: dict[str, dict[str, Any]] = {
    "norm": {"norm": True},
    "norm, gate": {"norm": True, "gate": True, "gate_activation": "silu"},
    "norm, relu, gate": {"norm": True, "activation": "relu", "gate": True},
    "gate": {"gate": True},
    **{name: {"activation": name} for name in ACTIVATIONS if name != "none"},
}


def views(size: tuple[int, ...], last: bool) -> dict[str, Tensor]:
    """The same values with channels last, or first, however memory holds them."""
    b, c, h, w = size
    values = torch.randn(b, h, w, c) * 2 + 1
    wide = torch.cat([torch.randn(b, h, w, c), values], dim=-1)[..., c:]
    planes = values.permute(0, 3, 1, 2).contiguous()
    part = torch.cat([planes, planes], dim=1)[:, c:]
    layouts = {
        "channels last": values,
        "half of the channels": wide,
        "planes": planes.permute(0, 2, 3, 1),
        "some of the planes": part.permute(0, 2, 3, 1),
        "every other column": torch.stack([values, values], dim=3)[:, :, :, 1],
    }
    return {k: v if last else v.permute(0, 3, 1, 2) for k, v in layouts.items()}


def chain_arguments(
    x: Tensor,
    dim: int,
    statistics: str,
    *,
    norm: bool = False,
    gate: bool = False,
    gate_activation: str = "none",
    activation: str = "none",
    offset: bool = True,
    grid: tuple[int, int] = (-8, 7),
) -> ChainArgs:
    """Operands of the operator for x, drawn from a seed of their own."""
    torch.manual_seed(1)
    channels = x.shape[dim]
    weights = (torch.randn(channels), torch.randn(channels), 1e-5) if norm else (None,) * 3
    factor = torch.randn(x.shape) if gate else None
    shift = torch.randn(channels, *[1] * (-1 - dim)) if offset else None
    chain = (*weights, activation, factor, gate_activation, shift)
    return ChainArgs(x, *chain, W, V, dim, *grid, statistics, False)


def same_results(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether codes, steps and shifts are equal, with their types."""
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))
