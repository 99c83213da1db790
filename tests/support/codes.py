"""Random codes and grids, for tests that run without hypothesis as well."""

import numpy as np
import torch

FILLS = ("random", "min", "max", "ends")


def code_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def codes(rng: np.random.Generator, shape: tuple[int, ...], bits: int, fill: str) -> np.ndarray:
    """int8 codes: random, all of one extreme, or both extremes mixed."""
    low, high = code_range(bits)
    if fill == "random":
        return rng.integers(low, high, shape, endpoint=True).astype(np.int8)
    if fill == "ends":
        return rng.choice(np.array([low, high], np.int8), shape)
    return np.full(shape, low if fill == "min" else high, np.int8)


def grid(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random positive steps and shifts of either sign, float32."""
    step = rng.uniform(0.01, 0.5, count).astype(np.float32)
    shift = rng.normal(0.0, 1.0, count).astype(np.float32)
    return torch.from_numpy(step), torch.from_numpy(shift)
