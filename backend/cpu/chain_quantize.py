"""CPU kernel of `qmir::chain_quantize` (csrc/chain_quantize.cpp)."""

import ctypes
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cpu.binding import all_float32, bind
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.ops._affine import code_dtype, non_finite
from qmir_ao.ops.chain_quantize import (
    ACTIVATIONS,
    OP,
    STATISTICS,
    ChainArgs,
    chain_quantize_ref,
    check_chain,
)

_ACTIVATION = {name: number for number, name in enumerate(ACTIVATIONS)}
_STATISTICS = {name: number for number, name in enumerate(STATISTICS)}


def _merged(size: tuple[int, ...], stride: tuple[int, ...]) -> int | None:
    """Stride of neighbouring dimensions taken as one, or None where they are no one dimension."""
    pairs = [(n, step) for n, step in zip(size, stride, strict=True) if n != 1]
    if any(outer[1] != n * step for outer, (n, step) in itertools.pairwise(pairs)):
        return None
    return pairs[-1][1] if pairs else 0


def _strides(x: Tensor, first: bool) -> tuple[int, int, int] | None:
    """Strides of `x` as (batch, channels, pixels); channels come second or last."""
    pixels = slice(2, None) if first else slice(1, -1)
    merged = _merged(x.shape[pixels], x.stride()[pixels])
    return None if merged is None else (x.stride(0), x.stride(1 if first else -1), merged)


def _placed(x: Tensor, first: bool) -> tuple[Tensor, tuple[int, int, int]]:
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
    """Whether the kernel can compute this: float32, channels second or last, nothing empty."""
    optional = (chain.norm_weight, chain.norm_bias, chain.gate, chain.offset)
    given = (t for t in optional if t is not None)
    size = chain.size
    return (
        all_float32(chain.x, chain.scale_weights, chain.shift_weights, *given)
        and len(size) == chain.x.dim() >= 2
        and chain.x.shape[chain.dim] == size[chain.dim]
        and math.prod(size) > 0
    )


@cpu_kernel(OP, chain_quantize_ref)
def _chain_quantize(lib: ctypes.CDLL, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    chain = ChainArgs(*args)
    check_chain(chain)
    first = _channels_first(chain)
    if first is None or not _known(chain):
        return chain_quantize_ref(*args)
    size = chain.size
    channels = size[1 if first else -1]
    x, x_strides = _placed(chain.x if chain.gate is None else chain.x.expand(size), first)
    gate, gate_strides = None, (0, 0, 0)
    if chain.gate is not None:
        gate, gate_strides = _placed(chain.gate.expand(size), first)
    shifts = (chain.norm_weight, chain.norm_bias, chain.offset)
    weight, bias, offset = (_channels(t, channels) for t in shifts)
    w, v = chain.scale_weights.contiguous(), chain.shift_weights.contiguous()
    codes = torch.empty(size, dtype=code_dtype(chain.quant_max))
    step, shift = (torch.empty(chain.groups, dtype=torch.float32) for _ in range(2))
    values = (
        *(size[0], channels, math.prod(size) // (size[0] * channels)),
        *x_strides,
        *gate_strides,
        first,
        _STATISTICS[chain.statistics],
        chain.norm_eps is not None,
        _ACTIVATION[chain.activation],
        _ACTIVATION[chain.gate_activation],
        *(chain.quant_min, chain.quant_max, chain.cap),
    )
    shape = (ctypes.c_int64 * len(values))(*values)
    tensors = (x, weight, bias, gate, offset, w, v)
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    run = bind(lib, "qmir_chain_quantize", "ppppppppdppp", True)
    bad = run(
        *pointers, ctypes.addressof(shape), chain.norm_eps or 0.0,
        codes.data_ptr(), step.data_ptr(), shift.data_ptr(),
    )  # fmt: skip
    if bad >= 0:
        raise non_finite(OP, f"sample {bad} of x")
    return codes, step, shift
