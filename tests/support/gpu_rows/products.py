"""Rows of the integer products: linear layers and convolutions at the sizes of MambaIR.

A linear layer begins with floats and their step and ends with floats, on both sides. The peer is
spared what its operator cannot do: `torch._int_mm` takes multiples of 8 only, so its operands are
padded beforehand; its weights have no shift, which needs sums of codes, and stay int8 at 4 bits.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from support.gpu_rows.rows import OURS, Row, Side
from torch import Tensor

import qmir_ao.backend.kernels  # noqa: F401  (registers the kernels)
from qmir_ao.ops.pack import pack

QMIR = torch.ops.qmir
INT_MM = "torch._int_mm, quantize and epilogue"
HALF = "fp16"
HALF_LAST = "fp16, channels last"

# Rows, inputs, features: in_proj and out_proj of MambaIR light and MambaIR at 64x64 and 320x320.
LINEAR = [
    *((side * side, *layer) for side in (64, 320) for layer in ((60, 144), (72, 60))),
    *((64 * 64, *layer) for layer in ((180, 720), (360, 180))),
]
# Channels, features, groups and side of the image.
CONVOLUTIONS = [
    *((60, 60, 1, side) for side in (64, 320)),
    *((72, 72, 72, side) for side in (64, 320)),
    (180, 180, 1, 64),
]
BITS = (4, 8)


def _limits(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _codes(bits: int, *shape: int) -> Tensor:
    low, high = _limits(bits)
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def _on(device: torch.device, *values: Any) -> tuple[Any, ...]:
    return tuple(v.to(device) if isinstance(v, Tensor) else v for v in values)


def _padded(x: Tensor) -> Tensor:
    """Both sides of a matrix filled up to multiples of 8 with zeros."""
    return F.pad(x, (0, -x.shape[1] % 8, 0, -x.shape[0] % 8))


def _epilogue(acc: Tensor, scale: Tensor, sums: Tensor, bias: Tensor) -> Tensor:
    """What follows the product: scale, the shift of x times sums of weights, and the bias."""
    return acc.float() * scale + (bias - sums)


def _linear_row(
    size: tuple[int, int, int], bits: int, compiled: Callable[..., Any], device: torch.device
) -> Row:
    rows, inputs, features = size
    limits = _limits(bits)
    epilogue = compiled(_epilogue)

    def drawn() -> tuple[Tensor, ...]:
        """x, its step and shift; codes, step and shift of the weight; bias."""
        x = torch.randn(rows, inputs)
        x_grid = (torch.full((1,), 6.0 / 2**bits), torch.full((1,), 0.05))
        w_grid = (torch.rand(features) * 0.1 + 0.05, torch.zeros(features))
        return (x, *x_grid, _codes(bits, features, inputs), *w_grid, torch.randn(features))

    def ours() -> tuple[Any, ...]:
        x, x_step, x_shift, weight, *rest = drawn()
        return _on(device, x, x_step, x_shift, pack(weight, bits), *rest)

    def run(x: Tensor, x_step: Tensor, x_shift: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        codes = QMIR.dls_quantize(x[None], x_step, x_shift, *limits)
        y: Tensor = QMIR.linear(codes, x_step, x_shift, weight, *rest, bits, features)
        return y[0]

    def peer() -> tuple[Any, ...]:
        x, x_step, x_shift, weight, w_step, _, bias = drawn()
        scale = F.pad(x_step * w_step, (0, -features % 8))
        sums = F.pad(x_shift * w_step * weight.int().sum(1), (0, -features % 8))
        # Rows only where there are fewer than the product takes.
        wide = F.pad(x, (0, -inputs % 8, 0, max(0, 24 - rows)))
        matrix, bias = _padded(weight).contiguous(), F.pad(bias, (0, -features % 8))
        return _on(device, wide, x_step, x_shift, matrix, scale, sums, bias)

    def run_peer(
        x: Tensor, x_step: Tensor, x_shift: Tensor, weight: Tensor, *rest: Tensor
    ) -> Tensor:
        codes = QMIR.dls_quantize(x[None], x_step, x_shift, *limits)[0]
        y: Tensor = epilogue(torch._int_mm(codes, weight.t()), *rest)
        return y[:rows, :features]

    def halves() -> tuple[Any, ...]:
        x, x_step, x_shift, weight, w_step, _, bias = drawn()
        codes = QMIR.dls_quantize(x[None], x_step, x_shift, *limits)[0]
        kept = (codes * x_step - x_shift, weight * w_step[:, None], bias)
        return tuple(t.to(device, torch.float16) for t in kept)

    return Row(
        f"quantize + `linear`, {bits} bits, {rows} x {inputs} -> {features}",
        {
            OURS: Side(run, ours),
            INT_MM: Side(run_peer, peer),
            f"{HALF} linear": Side(F.linear, halves),
        },
        {INT_MM: 1.0},
    )


def _conv_row(size: tuple[int, int, int, int], bits: int, device: torch.device) -> Row:
    channels, features, groups, side = size
    shape = [features, channels // groups, 3, 3]

    def drawn() -> tuple[Tensor, ...]:
        """Codes, step and shift of x and of the weight; bias."""
        x_grid = (torch.full((1,), 6.0 / 2**bits), torch.full((1,), 0.05))
        w_grid = (torch.rand(features) * 0.1 + 0.05, torch.randn(features) * 0.01)
        x, weight = _codes(bits, 1, channels, side, side), _codes(bits, *shape)
        return (x, *x_grid, weight, *w_grid, torch.randn(features))

    def ours() -> tuple[Any, ...]:
        x, x_step, x_shift, weight, *rest = drawn()
        geometry = (bits, shape, [1, 1], [1, 1], [1, 1], groups)
        return _on(device, x, x_step, x_shift, pack(weight, bits), *rest, None, *geometry)

    def halves(layout: torch.memory_format) -> tuple[Any, ...]:
        x, x_step, x_shift, weight, w_step, w_shift, bias = drawn()
        columns = (-1, 1, 1, 1)
        values = weight * w_step.reshape(columns) - w_shift.reshape(columns)
        images = (x * x_step - x_shift, values)
        x, weight = (t.to(device, torch.float16, memory_format=layout) for t in images)
        return x, weight, bias.to(device, torch.float16)

    def half(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, 1, 1, 1, groups)

    kind = "depthwise 3x3" if groups == channels else "3x3"
    return Row(
        f"`conv2d` {kind}, {bits} bits, {channels} -> {features} at {side}x{side}",
        {
            OURS: Side(QMIR.conv2d, ours),
            HALF: Side(half, lambda: halves(torch.contiguous_format)),
            HALF_LAST: Side(half, lambda: halves(torch.channels_last)),
        },
        {},
    )


def rows(
    gpu: Any,
    linear: Sequence[tuple[int, int, int]] = LINEAR,
    convolutions: Sequence[tuple[int, int, int, int]] = CONVOLUTIONS,
) -> Iterator[Row]:
    """All rows of products, see `Row`."""
    for bits in BITS:
        for size in linear:
            yield _linear_row(size, bits, gpu.compiled, gpu.device)
        for image in convolutions:
            yield _conv_row(image, bits, gpu.device)
