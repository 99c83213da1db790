"""Sizes of convolutions and operands for them, for the tests of `qmir::conv2d`."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from support.integers import codes, grid, pack_fields


class Case(NamedTuple):
    """Sizes of one convolution; the image is grown to hold the kernel where it is too small."""

    batch: int
    groups: int
    inputs: int
    features: int
    kernel: tuple[int, int]
    image: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def x_shape(self) -> tuple[int, int, int, int]:
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        least = [span - 2 * p for span, p in zip(spans, self.padding, strict=True)]
        height, width = (max(size, low) for size, low in zip(self.image, least, strict=True))
        return self.batch, self.groups * self.inputs, height, width

    def weight_size(self) -> list[int]:
        return [self.groups * self.features, self.inputs, *self.kernel]

    def geometry(self, bits: int) -> tuple:
        pairs = (list(self.stride), list(self.padding), list(self.dilation))
        return (bits, self.weight_size(), *pairs, self.groups)


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


general = st.builds(
    Case,
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    pairs(1, 4),
    pairs(1, 20),
    pairs(1, 3),
    pairs(0, 4),
    pairs(1, 3),
)
# One channel per group, with and without a multiplier.
depthwise = st.builds(
    Case,
    st.integers(1, 2),
    st.integers(1, 6),
    st.just(1),
    st.integers(1, 2),
    pairs(1, 5),
    pairs(1, 40),
    pairs(1, 3),
    pairs(0, 4),
    pairs(1, 3),
)
cases = st.one_of(general, depthwise)

NAMED = {
    "body-3x3": Case(2, 1, 60, 60, (3, 3), (9, 13), (1, 1), (1, 1), (1, 1)),
    "wide-image": Case(1, 1, 5, 7, (3, 3), (4, 600), (1, 1), (1, 1), (1, 1)),
    "tall-image": Case(1, 1, 66, 8, (3, 3), (210, 67), (1, 1), (1, 1), (1, 1)),
    "stride-2-wide": Case(1, 2, 6, 8, (3, 3), (9, 530), (2, 2), (1, 1), (1, 1)),
    "pointwise": Case(3, 1, 61, 31, (1, 1), (17, 19), (1, 1), (0, 0), (1, 1)),
    "pointwise-padded": Case(1, 1, 7, 5, (1, 1), (5, 5), (1, 1), (2, 1), (1, 1)),
    "depthwise": Case(2, 72, 1, 1, (3, 3), (17, 33), (1, 1), (1, 1), (1, 1)),
    "depthwise-dilated": Case(1, 30, 1, 1, (3, 3), (31, 65), (1, 1), (2, 2), (2, 2)),
    "depthwise-7x7": Case(1, 5, 1, 2, (7, 7), (20, 70), (1, 1), (3, 3), (1, 1)),
    "depthwise-tall": Case(1, 2, 1, 1, (3, 3), (900, 150), (1, 1), (1, 1), (1, 1)),
    "kernel-larger-than-image": Case(1, 2, 3, 2, (5, 5), (2, 3), (1, 1), (4, 4), (1, 1)),
    "padding-beyond-kernel": Case(1, 1, 3, 2, (2, 2), (3, 3), (1, 1), (4, 4), (1, 1)),
}


def operands(
    seed: int,
    case: Case,
    bits: int,
    per_sample: bool = True,
    per_row: bool = True,
    x_offset: torch.Tensor | None = None,
) -> tuple:
    """Arguments of `qmir::conv2d`, and the weight's codes."""
    rng = np.random.default_rng(seed)
    size = case.weight_size()
    x = torch.from_numpy(codes(rng, case.x_shape(), 8, "random"))
    weight = codes(rng, tuple(size), bits, "random")
    x_grid = grid(rng, case.batch if per_sample else 1)
    w_step, w_shift = grid(rng, size[0] if per_row else 1)
    w_grid = (w_step, w_shift[:1] if seed % 3 == 2 else w_shift)
    bias = torch.from_numpy(rng.normal(size=size[0]).astype(np.float32)) if seed % 2 else None
    tensors = (x, *x_grid, pack_fields(weight, bits), *w_grid, bias, x_offset)
    return (*tensors, *case.geometry(bits)), torch.from_numpy(weight)


SCALES = {
    "ordinary": (1.0, 0.0),
    "small": (1e-3, 0.0),
    "huge": (1e30, 0.0),
    "tiny": (1e-30, 0.0),
    "subnormal": (1e-42, 0.0),
    "mixed": (1.0, 8.0),
    "zero": (0.0, 0.0),
}
"""Standard deviation of the offsets, and of its logarithm from channel to channel."""


def offsets(seed: int, case: Case, scale: str, single: bool) -> torch.Tensor:
    """Channel offsets for a case, or one for all channels."""
    rng = np.random.default_rng([seed, 1])
    deviation, spread = SCALES[scale]
    count = 1 if single else case.groups * case.inputs
    values = rng.normal(size=count) * deviation * np.exp(rng.normal(size=count) * spread)
    return torch.from_numpy(values.astype(np.float32))
