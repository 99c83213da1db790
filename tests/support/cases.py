"""Case tables of the operators' tests, for the CPU kernels as for the CUDA ones."""

import torch
from support.scans import Operands
from torch import Tensor

DLS_W = torch.tensor([0.1, 0.3, -0.02, 0.05])
DLS_V = torch.tensor([-1.0, 0.1, 0.02, -0.03])
DLS_SHAPES = [(2, 5, 7), (3, 1000, 13), (1, 1), (5,), (2, 3, 17, 33), (2, 8, 4096), (3, 16385)]
# per_tensor, cap, clamp_output
DLS_FLAGS = [
    (False, False, False),
    (True, True, True),
    (False, False, True),
    (False, True, False),
]
DLS_RANGES = [(-2, 1), (-8, 7), (-128, 127), (0, 15)]


def dls_case(shape: tuple[int, ...], offset: float = 1.0) -> tuple[Tensor, Tensor]:
    """An activation, and an upstream gradient."""
    return torch.randn(shape) * 2 + offset, torch.randn(shape)


# Shape of the weight, its steps, its shifts.
RFA_CASES: list[tuple[tuple[int, ...], int, int]] = [
    ((13, 5, 3, 3), 1, 1),
    ((13, 5, 3, 3), 13, 13),
    ((13, 5, 3, 3), 13, 1),
    ((7, 9), 7, 7),
    ((3, 5001), 3, 3),
    ((3, 5001), 3, 1),
    ((1, 1), 1, 1),
    ((9,), 1, 1),
]


def rfa_case(
    shape: tuple[int, ...],
    groups: int,
    bits: int,
    order: str = "moved",
    shifts: int | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int]:
    """Weight, step, shift and thresholds; and the smallest code."""
    step = torch.rand(groups) * 0.3 + 0.1
    shift = torch.randn(groups if shifts is None else shifts) * 0.1
    thresholds = torch.arange(2**bits) - 2.0 ** (bits - 1)
    if order != "init":
        thresholds = thresholds + torch.randn(2**bits) * 0.2
    if order == "moved":
        thresholds = thresholds.sort().values
    return (torch.randn(shape), step, shift, thresholds), -(2 ** (bits - 1))


# Batch, groups, channels per group, states, steps.
SCAN_SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "one-of-each": (1, 1, 1, 1, 1),
    "seven-steps": (2, 4, 5, 3, 7),
    "light": (2, 4, 18, 10, 37),
    "classic": (1, 2, 33, 16, 100),
    "eight-states": (3, 1, 18, 8, 37),
    "twenty-states": (1, 4, 5, 20, 100),
    "one-channel": (2, 2, 1, 10, 100),
    "one-state": (1, 1, 33, 1, 37),
}
# Whether D and delta_bias are there.
SCAN_OPTIONAL = {"both": (True, True), "no-D": (False, True), "no-bias": (True, False)}


def scan_operands(
    size: tuple[int, int, int, int, int], has_D: bool = True, has_bias: bool = True, seed: int = 0
) -> Operands:
    """u, delta, A, B, C, D, delta_bias."""
    batch, groups, channels, states, steps = size
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    width = groups * channels
    return [
        normal(batch, width, steps),
        normal(batch, width, steps) * 0.5,
        -torch.exp(normal(width, states) * 0.5),
        normal(batch, groups, states, steps),
        normal(batch, groups, states, steps),
        normal(width) if has_D else None,
        normal(width) - 2.0 if has_bias else None,
    ]
