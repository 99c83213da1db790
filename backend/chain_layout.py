"""Where the operands of `qmir::chain_quantize` lie in memory, as its kernels walk through them.

Kernels see a tensor of (batch, channels, pixels) with any strides, and float32 alone. Letters as in
qmir_ao/ops/chain_quantize.py.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from qmir_ao.ops.chain_quantize import STATISTICS, ChainArgs

STATISTICS_NUMBERS = {name: number for number, name in enumerate(STATISTICS)}

Strides = tuple[int, int, int]


class Layout(NamedTuple):
    """Operands that the kernels can read.

    Attributes:
        x: of the shape of the codes, copied only where its pixels are no one dimension.
        gate: like x, or None.
        norm_weight: (C,), contiguous, or None.
        norm_bias: like norm_weight.
        offset: like norm_weight.
        size: batch, channels and pixels.
        x_strides: in elements, of batch, channels and pixels.
        gate_strides: the same; zeros without a gate.
        channels_first: whether the channels of the codes are their second dimension.
    """

    x: Tensor
    gate: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    offset: Tensor | None
    size: tuple[int, int, int]
    x_strides: Strides
    gate_strides: Strides
    channels_first: bool

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """The tensors in the order of the kernels' parameters."""
        return self.x, self.norm_weight, self.norm_bias, self.gate, self.offset


def _merged(size: tuple[int, ...], stride: tuple[int, ...]) -> int | None:
    """Stride of neighbouring dimensions taken as one, or None where they are no one dimension."""
    pairs = [(n, step) for n, step in zip(size, stride, strict=True) if n != 1]
    if any(outer[1] != n * step for outer, (n, step) in itertools.pairwise(pairs)):
        return None
    return pairs[-1][1] if pairs else 0


def _strides(x: Tensor, first: bool) -> Strides | None:
    """Strides of `x` as (batch, channels, pixels); channels come second or last."""
    pixels = slice(2, None) if first else slice(1, -1)
    merged = _merged(x.shape[pixels], x.stride()[pixels])
    return None if merged is None else (x.stride(0), x.stride(1 if first else -1), merged)


def _placed(x: Tensor, first: bool) -> tuple[Tensor, Strides]:
    """`x`, copied where the kernel cannot walk through it, and its strides."""
    strides = _strides(x, first)
    if strides is None:
        x = x.contiguous()
        strides = _strides(x, first)
        assert strides is not None
    return x, strides


def _channels(x: Tensor | None, count: int) -> Tensor | None:
    """One contiguous value for each channel."""
    if x is None or (x.numel() == count and x.is_contiguous()):
        return x
    return x.reshape(-1).expand(count).contiguous()


def _channels_first(chain: ChainArgs) -> bool | None:
    """Whether channels are the second dimension or the last one, or None where they are neither.

    Where no channel differs from another, any dimension will do.
    """
    rank = chain.x.dim()
    alike = chain.norm_eps is None and (chain.offset is None or chain.offset.numel() == 1)
    if alike and chain.statistics != "token":
        return rank > 2
    if chain.dim in (-1, 1 - rank):
        return chain.dim != -1
    return None


def _known(chain: ChainArgs) -> bool:
    """Whether kernels can compute this: float32, channels second or last, nothing empty."""
    optional = (chain.norm_weight, chain.norm_bias, chain.gate, chain.offset)
    given = (t for t in optional if t is not None)
    tensors = (chain.x, chain.scale_weights, chain.shift_weights, *given)
    size = chain.size
    return (
        all(t.dtype == torch.float32 for t in tensors)
        and len(size) == chain.x.dim() >= 2
        and chain.x.shape[chain.dim] == size[chain.dim]
        and math.prod(size) > 0
    )


def lay_out(chain: ChainArgs) -> Layout | None:
    """The operands for a kernel, or None where the reference has to compute this.

    Args:
        chain: arguments that `check_chain` has seen.
    """
    first = _channels_first(chain)
    if first is None or not _known(chain):
        return None
    size = chain.size
    channels = size[1 if first else -1]
    x, x_strides = _placed(chain.x if chain.gate is None else chain.x.expand(size), first)
    gate, gate_strides = None, (0, 0, 0)
    if chain.gate is not None:
        gate, gate_strides = _placed(chain.gate.expand(size), first)
    shifts = (chain.norm_weight, chain.norm_bias, chain.offset)
    weight, bias, offset = (_channels(t, channels) for t in shifts)
    sizes = (size[0], channels, math.prod(size) // (size[0] * channels))
    return Layout(x, gate, weight, bias, offset, sizes, x_strides, gate_strides, first)
