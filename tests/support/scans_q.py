"""Operands of the integer scans at named sizes, and their oracles: float64, and four walks."""

import numpy as np
import torch
from support.codes import code_range, codes, grid
from support.scans import follow, put_back, walks
from support.tolerances import (
    DIRECTION_SUM_ROUNDINGS,
    scan_q_computed_roundings,
    scan_q_roundings,
)
from torch import Tensor

from qmir_ao.ops.selective_scan_q import ScanArgs, selective_scan_q_ref

# batch, groups, channels per group, states, steps
Size = tuple[int, int, int, int, int]
# batch, channels, states, height, width
ImageSize = tuple[int, int, int, int, int]

SEQUENCES: dict[str, Size] = {
    "one-step": (1, 1, 1, 1, 1),
    "seven-steps": (2, 4, 18, 10, 7),
    "light": (1, 4, 72, 10, 64),
    "classic": (1, 4, 45, 16, 33),
    "one-state": (2, 2, 17, 1, 40),
    "three-states": (1, 1, 16, 3, 16),
    "twenty-three-states": (1, 1, 5, 23, 17),
    "sixty-four-states": (1, 2, 17, 64, 19),
    "seventy-states": (1, 1, 3, 70, 9),
}


IMAGES: dict[str, ImageSize] = {
    "one-pixel": (1, 1, 1, 1, 1),
    "one-row": (2, 3, 4, 1, 40),
    "one-column": (1, 17, 3, 37, 1),
    "square": (1, 16, 8, 16, 16),
    "light": (1, 18, 10, 17, 33),
    "classic": (1, 33, 16, 9, 20),
    "twenty-three-states": (1, 5, 23, 5, 7),
    "seventy-states": (1, 2, 70, 3, 4),
}


def operands(
    seed: int, size: Size, bits: int, per_sample: bool = True, softplus: bool = True
) -> ScanArgs:
    batch, groups, channels, states, steps = size
    rng = np.random.default_rng(seed)
    count = batch if per_sample else 1
    sequence, projection = (batch, groups * channels, steps), (batch, groups, states, steps)
    drawn = []
    for shape in (sequence, sequence, projection, projection):
        step, shift = grid(rng, count)
        drawn.append((torch.from_numpy(codes(rng, shape, bits, "random")), step * 0.5, shift))
    (u, delta, B, C) = drawn
    A = -torch.from_numpy(rng.uniform(0.05, 4.0, (groups * channels, states)).astype(np.float32))
    D, bias = (
        torch.from_numpy(rng.normal(size=groups * channels).astype(np.float32)) for _ in range(2)
    )
    optional = (D, bias) if seed % 4 else (None, None)
    return ScanArgs(*u, *delta, A, *B, *C, *optional, softplus, *code_range(bits))


def image_operands(seed: int, size: ImageSize, bits: int, per_sample: bool = True) -> ScanArgs:
    batch, channels, states, *sides = size
    rng = np.random.default_rng(seed)
    count = batch if per_sample else 1
    shapes = (
        (batch, channels, *sides),
        (batch, 4 * channels, *sides),
        (batch, 4, states, *sides),
        (batch, 4, states, *sides),
    )
    drawn = []
    for shape in shapes:
        step, shift = grid(rng, count)
        drawn.append((torch.from_numpy(codes(rng, shape, bits, "random")), step * 0.5, shift))
    (u, delta, B, C) = drawn
    A = -torch.from_numpy(rng.uniform(0.05, 4.0, (4 * channels, states)).astype(np.float32))
    D, bias = (torch.from_numpy(rng.normal(size=4 * channels).astype(np.float32)) for _ in range(2))
    optional = (D, bias) if seed % 4 else (None, None)
    return ScanArgs(*u, *delta, A, *B, *C, *optional, True, *code_range(bits))


def float64_recurrence(args: ScanArgs) -> tuple[Tensor, Tensor, float, float]:
    """The scan in float64, the same over absolute values, and the largest exponent and offset."""

    def value(name: str) -> tuple[Tensor, Tensor]:
        q = getattr(args, name).double()
        per_sample = (-1, *[1] * (q.dim() - 1))
        step, shift = (
            getattr(args, f"{name}_{part}").double().reshape(per_sample)
            for part in ("step", "shift")
        )
        return step * q - shift, (step * q).abs() + shift.abs()

    (u, u_abs), (z, z_abs), (B, B_abs), (C, C_abs) = map(value, ("u", "delta", "B", "C"))
    bias = 0.0 if args.delta_bias is None else args.delta_bias.double().reshape(-1, 1)
    offset = float((z_abs + abs(bias)).max())
    delta = torch.nn.functional.softplus(z + bias)
    repeat = u.shape[1] // B.shape[1]
    B, B_abs, C, C_abs = (x.repeat_interleave(repeat, 1) for x in (B, B_abs, C, C_abs))
    A, D = args.A.double(), 0.0 if args.D is None else args.D.double().reshape(-1, 1)
    h = torch.zeros(*u.shape[:2], A.shape[1], dtype=torch.float64)
    h_abs, y, y_abs = h.clone(), torch.empty(u.shape).double(), torch.empty(u.shape).double()
    for t in range(u.shape[2]):
        decay = torch.exp(delta[..., t, None] * A)
        h = decay * h + (delta[..., t] * u[..., t])[..., None] * B[..., t]
        h_abs = decay * h_abs + (delta[..., t] * u_abs[..., t])[..., None] * B_abs[..., t]
        y[..., t] = (C[..., t] * h).sum(-1)
        y_abs[..., t] = (C_abs[..., t] * h_abs).sum(-1)
    exponent = float(delta.max() * A.abs().max())
    return y + D * u, y_abs + abs(D) * u_abs, exponent, offset


def scan_bound(args: ScanArgs, computed: bool) -> tuple[Tensor, Tensor]:
    """The scan in float64, and how far from it a result may be.

    Args:
        args: operands.
        computed: whether decays are computed instead of read from a table.
    """
    exact, magnitude, exponent, offset = float64_recurrence(args)
    roundings = scan_q_computed_roundings if computed else scan_q_roundings
    count = roundings(args.u.shape[2], args.A.shape[1], exponent, offset)
    return exact, count * 2.0**-24 * magnitude


def along(args: ScanArgs, k: int, walk: np.ndarray) -> ScanArgs:
    """Operands of the plain scan in direction k of an image."""
    channels = args.u.shape[1]
    own = slice(k * channels, (k + 1) * channels)
    return args._replace(
        u=follow(args.u, walk),
        delta=follow(args.delta[:, own], walk),
        A=args.A[own],
        B=follow(args.B[:, k : k + 1], walk),
        C=follow(args.C[:, k : k + 1], walk),
        D=None if args.D is None else args.D[own],
        delta_bias=None if args.delta_bias is None else args.delta_bias[own],
    )


def image_bound(args: ScanArgs, computed: bool) -> tuple[Tensor, Tensor]:
    """The scan of an image in float64, and how far from it a result may be."""
    height, width = args.u.shape[2:]
    exact, allowed = torch.zeros(args.u.shape).double(), torch.zeros(args.u.shape).double()
    for k, walk in enumerate(walks(height, width)):
        plain = along(args, k, walk)
        y, error = scan_bound(plain, computed)
        sums = DIRECTION_SUM_ROUNDINGS * 2.0**-24 * (y.abs() + error)
        exact += put_back(y, walk, height, width)
        allowed += put_back(error + sums, walk, height, width)
    return exact, allowed


def walked(args: ScanArgs) -> Tensor:
    """Four plain reference scans along their walks, added in the stated order."""
    height, width = args.u.shape[2:]
    images = [
        put_back(selective_scan_q_ref(*along(args, k, walk)), walk, height, width)
        for k, walk in enumerate(walks(height, width))
    ]
    return (images[0] + images[2]) + (images[1] + images[3])
