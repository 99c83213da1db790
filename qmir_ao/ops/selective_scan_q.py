"""Selective scan of quantized operands: the recurrence of Mamba without an exponential in its loop.

    value(q)   = step * q - shift                         for u, B and C
    delta[c]   = softplus(step*c - shift + delta_bias)    one value per (channel, code c)
    decay[c,n] = exp(delta[c] * A[n])                     one value per (channel, code, state)
    h[n]      <- decay[n] * h[n] + (delta * u) * B[n]     state in float32, starts at 0
    y          = sum_n C[n] * h[n]  (n in order)  + D * u

A b-bit delta takes 2^b values per channel, so both delta and decay are tables that are made once
per call. The order of the float32 operations is part of the definition: kernels repeat it, and
give the same bytes.

Source: Mamba (arXiv 2312.00752), algorithm 2, on the operands of Q-MambaIR (arXiv 2503.21970),
section 7.1.2; the tables are ours.

Shape letters: B = samples, E = channels, K = direction groups (E % K == 0), N = states, L = steps,
G = B or 1 quantization groups, c = code of delta, W = width of a table row.
Inference only: there is no backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qmir_ao.ops._affine import check_range
from qmir_ao.ops._integer import check_grid, require
from qmir_ao.ops._library import define

SCHEMA = (
    "selective_scan_q(Tensor u, Tensor u_step, Tensor u_shift, Tensor delta, Tensor delta_step, "
    "Tensor delta_shift, Tensor A, Tensor B, Tensor B_step, Tensor B_shift, Tensor C, "
    "Tensor C_step, Tensor C_shift, Tensor? D, Tensor? delta_bias, bool delta_softplus, "
    "int delta_quant_min, int delta_quant_max) -> Tensor"
)

SOFTPLUS_THRESHOLD = 20.0
"""Above it softplus is the identity, as in torch."""

ROW_MULTIPLE = 4
"""Kernels read a table row in pieces of this many floats."""


class ScanArgs(NamedTuple):
    """Operands of the operator, in the order of its schema."""

    u: Tensor
    u_step: Tensor
    u_shift: Tensor
    delta: Tensor
    delta_step: Tensor
    delta_shift: Tensor
    A: Tensor
    B: Tensor
    B_step: Tensor
    B_shift: Tensor
    C: Tensor
    C_step: Tensor
    C_shift: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    delta_quant_min: int
    delta_quant_max: int


def _check_parameter(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    require(
        tensor.dtype == torch.float32 and tuple(tensor.shape) == shape,
        lambda: (
            f"qmir::{op}: {name} must be float32 of shape {shape}, "
            f"got {tuple(tensor.shape)} {tensor.dtype}"
        ),
    )


def _check_operand(op: str, name: str, codes: Tensor, shape: tuple[int, ...]) -> None:
    require(
        codes.dtype in (torch.int8, torch.uint8) and tuple(codes.shape) == shape,
        lambda: (
            f"qmir::{op}: {name} must hold int8 or uint8 codes of shape {shape}, "
            f"got {tuple(codes.shape)} {codes.dtype}"
        ),
    )


def check_scan(args: ScanArgs, op: str = "selective_scan_q") -> None:
    """Refuse operands whose types or shapes do not fit together; `op` names them in messages."""
    require(args.u.dim() == 3, lambda: f"qmir::{op}: u must be (B, E, L), got {args.u.shape}")
    require(args.B.dim() == 4, lambda: f"qmir::{op}: B must be (B, K, N, L), got {args.B.shape}")
    batch, channels, length = args.u.shape
    groups, states = args.B.shape[1], args.B.shape[2]
    shapes = {"u": (batch, channels, length), "B": (batch, groups, states, length)}
    shapes |= {"delta": shapes["u"], "C": shapes["B"]}
    for name, shape in shapes.items():
        _check_operand(op, name, getattr(args, name), shape)
        step, shift = getattr(args, f"{name}_step"), getattr(args, f"{name}_shift")
        check_grid(op, name, step, shift, batch)
    require(
        groups >= 1 and states >= 1 and channels % groups == 0,
        lambda: (
            f"qmir::{op}: E must be a multiple of K, and K and N at least 1; got E = {channels}, "
            f"K = {groups}, N = {states}"
        ),
    )
    _check_parameter(op, "A", args.A, (channels, states))
    for name, vector in (("D", args.D), ("delta_bias", args.delta_bias)):
        if vector is not None:
            _check_parameter(op, name, vector, (channels,))
    check_range(op, args.delta_quant_min, args.delta_quant_max)


def delta_codes_error(low: int, high: int, op: str = "selective_scan_q") -> str:
    """Message for codes of delta outside the range that the tables cover."""
    return (
        f"qmir::{op}: delta holds codes outside {low}..{high}; quantize it with the "
        "same quant_min and quant_max that are passed as delta_quant_min and delta_quant_max"
    )


def scan_table(args: ScanArgs) -> Tensor:
    """Delta and decays of every code; the reference and all kernels read this one table.

    Returns:
        float32 (G, E, codes, W): delta, then N decays, then padding to a multiple of 4 floats.

    Shape: G = numel(delta_step); codes = delta_quant_max - delta_quant_min + 1.
    """
    codes = torch.arange(
        args.delta_quant_min, args.delta_quant_max + 1, dtype=torch.float32, device=args.u.device
    )
    grid = args.delta_step.reshape(-1, 1, 1) * codes - args.delta_shift.reshape(-1, 1, 1)
    bias = 0.0 if args.delta_bias is None else args.delta_bias.reshape(-1, 1)
    delta = (grid + bias).expand(-1, args.A.shape[0], -1)
    if args.delta_softplus:
        # Not torch's softplus: its vector body and its scalar tail round differently, so a value
        # would depend on where it lies in the batch.
        soft = torch.log1p(torch.exp(delta))
        delta = torch.where(delta > SOFTPLUS_THRESHOLD, delta, soft)
    width = -(-(args.A.shape[1] + 1) // ROW_MULTIPLE) * ROW_MULTIPLE
    rates = torch.nn.functional.pad(args.A, (1, width - 1 - args.A.shape[1]))
    table = torch.exp(delta.unsqueeze(-1) * rates.unsqueeze(1))
    table[..., 0] = delta
    return table


def _value(codes: Tensor, step: Tensor, shift: Tensor) -> Tensor:
    per_sample = (-1, *[1] * (codes.dim() - 1))
    return step.reshape(per_sample) * codes.float() - shift.reshape(per_sample)


def _scan(args: ScanArgs) -> Tensor:
    states, groups = args.A.shape[1], args.B.shape[1]
    batch, channels, length = args.u.shape
    index = args.delta.long() - args.delta_quant_min
    last = args.delta_quant_max - args.delta_quant_min
    require(
        bool(((index >= 0) & (index <= last)).all()),
        lambda: delta_codes_error(args.delta_quant_min, args.delta_quant_max),
    )
    table = scan_table(args).expand(batch, -1, -1, -1)
    sample = torch.arange(batch, device=args.u.device).reshape(-1, 1)
    channel = torch.arange(channels, device=args.u.device)
    group = torch.arange(groups, device=args.u.device).repeat_interleave(channels // groups)
    u = _value(args.u, args.u_step, args.u_shift)
    inputs = _value(args.B, args.B_step, args.B_shift)
    outputs = _value(args.C, args.C_step, args.C_shift)
    h = torch.zeros(batch, channels, states, device=args.u.device)
    steps = []
    for t in range(length):
        row = table[sample, channel, index[..., t]]
        x = row[..., 0] * u[..., t]
        drive = x.unsqueeze(-1) * inputs[:, group, :, t]
        h = row[..., 1 : states + 1] * h + drive
        weighted = outputs[:, group, :, t] * h
        y = torch.zeros_like(x)
        for n in range(states):
            y = y + weighted[..., n]
        steps.append(y)
    result = torch.stack(steps, dim=-1)
    return result if args.D is None else result + args.D.reshape(-1, 1) * u


def selective_scan_q_ref(
    u: Tensor,
    u_step: Tensor,
    u_shift: Tensor,
    delta: Tensor,
    delta_step: Tensor,
    delta_shift: Tensor,
    A: Tensor,
    B: Tensor,
    B_step: Tensor,
    B_shift: Tensor,
    C: Tensor,
    C_step: Tensor,
    C_shift: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    delta_quant_min: int,
    delta_quant_max: int,
) -> Tensor:
    """Plain-torch form of `qmir::selective_scan_q`: one step of the recurrence at a time."""
    args = ScanArgs(
        u, u_step, u_shift, delta, delta_step, delta_shift, A, B, B_step, B_shift,
        C, C_step, C_shift, D, delta_bias, delta_softplus, delta_quant_min, delta_quant_max,
    )  # fmt: skip
    check_scan(args)
    return _scan(args) if u.numel() else torch.zeros(u.shape, device=u.device)


def _fake(*args: object) -> Tensor:
    scan = ScanArgs(*args)  # type: ignore[arg-type]
    check_scan(scan)
    return scan.u.new_empty(scan.u.shape, dtype=torch.float32)


_selective_scan_q = define(SCHEMA, reference=selective_scan_q_ref, fake=_fake)


def selective_scan_q(
    u: Tensor,
    u_step: Tensor,
    u_shift: Tensor,
    delta: Tensor,
    delta_step: Tensor,
    delta_shift: Tensor,
    A: Tensor,
    B: Tensor,
    B_step: Tensor,
    B_shift: Tensor,
    C: Tensor,
    C_step: Tensor,
    C_shift: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    delta_quant_min: int,
    delta_quant_max: int,
) -> Tensor:
    """Selective scan over codes of u, delta, B and C.

    Args:
        u: int8 or uint8 codes (B, E, L).
        u_step: float32 (B,) or (1,); u_shift and the other steps and shifts likewise.
        u_shift: see u_step; the value of a code is step * code - shift.
        delta: codes (B, E, L), all within delta_quant_min..delta_quant_max.
        delta_step: see u_step.
        delta_shift: see u_step.
        A: float32 (E, N), negative for a state that decays.
        B: codes (B, K, N, L); direction group k serves the channels k*E/K to (k+1)*E/K - 1.
        B_step: see u_step.
        B_shift: see u_step.
        C: codes (B, K, N, L).
        C_step: see u_step.
        C_shift: see u_step.
        D: float32 (E,), the weight of the direct path, or None.
        delta_bias: float32 (E,), added to delta before softplus, or None.
        delta_softplus: apply softplus to delta.
        delta_quant_min: smallest code of delta.
        delta_quant_max: largest code of delta.

    Returns:
        float32 (B, E, L).

    Shape: u, delta (B, E, L); A (E, N); B, C (B, K, N, L); result (B, E, L).

    Raises:
        RuntimeError: an operand of another type or shape, or a code of delta out of range.

    Source: module docstring.
    """
    y: Tensor = _selective_scan_q(
        u, u_step, u_shift, delta, delta_step, delta_shift, A, B, B_step, B_shift,
        C, C_step, C_shift, D, delta_bias, delta_softplus, delta_quant_min, delta_quant_max,
    )  # fmt: skip
    return y
