"""Geometry of a convolution on integer codes: its checks, and what each kernel position meets.

Shape letters: B = samples, C and O = input and output channels, H, W = input size, P, Q = output
size, kh, kw = kernel size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qmir_ao.ops._integer import check_codes, check_taps, check_weight, require


class Geometry(NamedTuple):
    """Everything of a convolution that is not a tensor."""

    bits: int
    weight_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def out_size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the result."""
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight_size[2:], strict=True)]
        rows, cols = (
            (x.shape[2 + i] + 2 * self.padding[i] - spans[i]) // self.stride[i] + 1 for i in (0, 1)
        )
        return rows, cols


def _check_pair(op: str, name: str, pair: Sequence[int], low: int) -> None:
    require(
        len(pair) == 2 and all(value >= low for value in pair),
        lambda: f"qmir::{op}: {name} must be two integers >= {low}, got {list(pair)}",
    )


def _check_geometry(op: str, x: Tensor, geometry: Geometry) -> None:
    size, groups = geometry.weight_size, geometry.groups
    require(x.dim() == 4, lambda: f"qmir::{op}: x must be (B, C, H, W), got {x.dim()} axes")
    require(
        len(size) == 4 and min(size) >= 1,
        lambda: f"qmir::{op}: weight_size must be [O, C/groups, kh, kw], all >= 1, got {size}",
    )
    _check_pair(op, "stride", geometry.stride, 1)
    _check_pair(op, "padding", geometry.padding, 0)
    _check_pair(op, "dilation", geometry.dilation, 1)
    require(
        groups >= 1 and size[0] % groups == 0 and x.shape[1] == size[1] * groups,
        lambda: (
            f"qmir::{op}: groups must divide O, and C must be groups * weight_size[1]; got "
            f"C = {x.shape[1]}, groups = {groups}, weight_size = {list(size)}"
        ),
    )


def check_convolution(op: str, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, int]:
    """Refuse operands that do not fit together; return the output's height and width."""
    check_codes(op, "x", x)
    _check_geometry(op, x, geometry)
    out_features, channels, height, width = geometry.weight_size
    check_taps(op, channels * height * width)
    check_weight(op, weight, out_features * channels * height * width, geometry.bits)
    rows, cols = geometry.out_size(x)
    require(
        rows >= 1 and cols >= 1,
        lambda: (
            f"qmir::{op}: the kernel {height}x{width} with dilation {list(geometry.dilation)} is "
            f"larger than the padded image, got H, W = {x.shape[2]}, {x.shape[3]}"
        ),
    )
    return rows, cols


def windows(
    x: Tensor, geometry: Geometry, out: tuple[int, int]
) -> Iterator[tuple[int, int, Tensor]]:
    """Each kernel position with the values it meets at all output positions; 0 outside."""
    pad_h, pad_w = geometry.padding
    padded = torch.nn.functional.pad(x, (pad_w, pad_w, pad_h, pad_h))
    step_h, step_w = geometry.stride
    for i in range(geometry.weight_size[2]):
        for j in range(geometry.weight_size[3]):
            top, left = i * geometry.dilation[0], j * geometry.dilation[1]
            rows = slice(top, top + (out[0] - 1) * step_h + 1, step_h)
            cols = slice(left, left + (out[1] - 1) * step_w + 1, step_w)
            yield i, j, padded[..., rows, cols]
