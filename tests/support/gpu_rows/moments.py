"""Rows of integer operators that give statistics with their results, and the quantizer behind them.

Both sides end with 4-bit codes of the image, step and shift. The peer is the same network without
the pass FuseMoments: an operator, and a quantizer that reads its result twice.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from support.cases import DLS_V, DLS_W
from support.gpu_rows.rows import OURS, Row, Side
from torch import Tensor

import qmir_ao.backend.kernels  # noqa: F401  (registers the kernels)
from qmir_ao.ops.pack import pack

QMIR = torch.ops.qmir
READ_TWICE = "results read twice"
BITS, LIMITS = 4, (-8, 7)
PLANES = -3
"""Dimension of the channels where codes are planes."""


class Layer(NamedTuple):
    """A layer of MambaIR light: its inputs, features, groups (0: linear), activation behind it."""

    inputs: int
    features: int
    groups: int
    activation: str


# in_proj, of whose features the first half goes on as planes; the 3x3 of a block; SS2D's own.
LAYERS = [Layer(60, 144, 0, "none"), Layer(60, 60, 1, "none"), Layer(72, 72, 72, "silu")]
SIDES = (64, 320)


def _operands(layer: Layer, side: int, device: torch.device) -> tuple[Tensor, ...]:
    """Codes, step and shift of x and of the weight; bias."""
    inputs, features, groups, _ = layer

    def codes(*shape: int) -> Tensor:
        return torch.randint(LIMITS[0], LIMITS[1] + 1, shape, dtype=torch.int8, device=device)

    x_grid = (torch.full((1,), 0.4, device=device), torch.full((1,), 0.05, device=device))
    w_grid = (
        torch.rand(features, device=device) * 0.1 + 0.05,
        torch.randn(features, device=device) * 0.01,
    )
    x = codes(1, inputs, side, side) if groups else codes(1, side, side, inputs)
    weight = codes(features, inputs // groups, 3, 3) if groups else codes(features, inputs)
    return (x, *x_grid, pack(weight, BITS), *w_grid, torch.randn(features, device=device))


def _quantized(
    x: Tensor,
    activation: str,
    offset_and_scalars: tuple[Tensor, Tensor, Tensor],
    moments: Tensor | None = None,
    channels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of an image's planes, each shifted, and their step and shift."""
    chain = (None, None, None, activation, None, "none", *offset_and_scalars)
    grid = (PLANES, *LIMITS, "sample", False)
    found: tuple[Tensor, Tensor, Tensor] = QMIR.chain_quantize(x, *chain, *grid, moments, channels)
    return found


def _linear_row(layer: Layer, side: int, device: torch.device) -> Row:
    half = layer.features // 2

    def make() -> tuple[Any, ...]:
        offset = torch.randn(half, 1, 1, device=device)
        shift = torch.cat([offset.flatten(), torch.zeros_like(offset).flatten()])
        chosen = torch.arange(half, device=device)
        scalars = (DLS_W.to(device), DLS_V.to(device))
        return (*_operands(layer, side, device), shift, chosen, offset, *scalars)

    def planes(y: Tensor) -> Tensor:
        return y[..., :half].permute(0, 3, 1, 2)

    def run(*args: Tensor) -> Any:
        *given, shift, chosen, offset, w, v = args
        end = (BITS, layer.features, None, None, layer.activation, shift)
        y, moments = QMIR.linear_moments(*given, *end)
        return _quantized(planes(y), "none", (offset, w, v), moments, chosen)

    def run_peer(*args: Tensor) -> Any:
        *given, _, _, offset, w, v = args
        y = QMIR.linear(*given, BITS, layer.features)
        return _quantized(planes(y), layer.activation, (offset, w, v))

    work = f"{side * side} x {layer.inputs} -> {layer.features}, half as planes"
    sides = {OURS: Side(run, make), READ_TWICE: Side(run_peer, make)}
    return Row(f"`linear` + `chain_quantize`, {BITS} bits, {work}", sides, {})


def _conv_row(layer: Layer, side: int, device: torch.device) -> Row:
    size = [layer.features, layer.inputs // layer.groups, 3, 3]
    geometry = (None, BITS, size, [1, 1], [1, 1], [1, 1], layer.groups)

    def make() -> tuple[Any, ...]:
        offset = torch.randn(layer.features, 1, 1, device=device)
        scalars = (DLS_W.to(device), DLS_V.to(device))
        return (*_operands(layer, side, device), offset, *scalars)

    def run(*args: Tensor) -> Any:
        *given, offset, w, v = args
        end = (None, None, layer.activation, offset.flatten())
        y, moments = QMIR.conv2d_moments(*given, *geometry, *end)
        return _quantized(y, "none", (offset, w, v), moments)

    def run_peer(*args: Tensor) -> Any:
        *given, offset, w, v = args
        y = QMIR.conv2d(*given, *geometry)
        return _quantized(y, layer.activation, (offset, w, v))

    kind = "depthwise 3x3" if layer.groups == layer.inputs else "3x3"
    end = "" if layer.activation == "none" else f" + {layer.activation}"
    work = f"{layer.inputs} -> {layer.features} at {side}x{side}"
    sides = {OURS: Side(run, make), READ_TWICE: Side(run_peer, make)}
    return Row(f"`conv2d` {kind}{end} + `chain_quantize`, {BITS} bits, {work}", sides, {})


def rows(gpu: Any, layers: Sequence[Layer] = LAYERS, sides: Sequence[int] = SIDES) -> Iterator[Row]:
    """All rows of operators with statistics, see `Row`."""
    for layer in layers:
        for side in sides:
            row = _conv_row if layer.groups else _linear_row
            yield row(layer, side, gpu.device)
