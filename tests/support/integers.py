"""Operands of the integer operators, and an own packer: what the tests compare against."""

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import strategies as st
from support.codes import FILLS, code_range, codes, grid

__all__ = [
    "FILLS", "code_range", "codes", "containers", "dequantize", "fills", "grid", "pack_fields",
    "same_bytes", "seeds", "with_threads",
]  # fmt: skip


def pack_fields(values: np.ndarray, bits: int) -> torch.Tensor:
    """Little-end-first two's complement fields, by way of single bits."""
    fields = values.reshape(-1, 1).astype(np.int64) >> np.arange(bits) & 1
    return torch.from_numpy(np.packbits(fields.astype(np.uint8), bitorder="little"))


def dequantize(values: torch.Tensor, step: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """step * q - shift per slice of dim 0, in float64."""
    per_slice = (-1, *[1] * (values.dim() - 1))
    return step.double().reshape(per_slice) * values.double() - shift.double().reshape(per_slice)


def with_threads(count: int, function: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Result of `function` on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal to the last bit, signs of zeros and NaN included."""
    left, right = left.contiguous(), right.contiguous()
    equal_kind = left.shape == right.shape and left.dtype == right.dtype
    return equal_kind and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def linear_operands(
    seed: int, shape: tuple[int, ...], features: int, bits: int, per_sample: bool, per_row: bool
) -> tuple:
    """Arguments of `qmir::linear` for x of `shape`, and the weight's codes."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(codes(rng, shape, 8, "random"))
    weight = codes(rng, (features, shape[-1]), bits, "random")
    x_grid = grid(rng, shape[0] if per_sample else 1)
    w_step, w_shift = grid(rng, features if per_row else 1)
    w_grid = (w_step, w_shift[:1] if seed % 3 == 2 else w_shift)
    bias = torch.from_numpy(rng.normal(size=features).astype(np.float32)) if seed % 2 else None
    return (x, *x_grid, pack_fields(weight, bits), *w_grid, bias, bits, features), weight


seeds = st.integers(0, 2**31 - 1)
containers = st.sampled_from([2, 4, 8])
fills = st.sampled_from(FILLS)
