"""Rows of the quantizers: DLS on a lowered network, both fake-quants of training, fused chains.

A copy moves as many bytes as the work has to: each operand read once and each result written once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from support import oracles
from support.cases import DLS_V, DLS_W, rfa_case
from support.gpu_rows.rows import OURS, Row, Side, copy_of, trained
from torch import Tensor

import qmir_ao.backend.kernels  # noqa: F401  (registers the kernels)

QMIR = torch.ops.qmir
COPY = "copy of the same bytes"
PUBLISHED = "published Python form"
Shape = tuple[int, ...]

ACTIVATIONS: Sequence[Shape] = [(1, 60, 64, 64), (1, 60, 320, 320), (8, 180, 64, 64)]
TOKENS: Sequence[Shape] = [(32768, 60)]
WEIGHTS: Sequence[Shape] = [(60, 60, 3, 3), (360, 180), (4096, 4096)]
CHAINS: Sequence[Shape] = [(1, 4096, 72), (1, 102400, 72), (1, 4096, 360)]

FLOAT, CODE = 4, 1
LIMITS = (-8, 7)
# Two readings of x, as its statistics come first; the codes.
DLS_BYTES = 2 * FLOAT + CODE
# x and y; x, the gradient of y and that of x.
TRAINING_BYTES = 5 * FLOAT


def _scalars(device: torch.device) -> tuple[Tensor, Tensor]:
    return DLS_W.to(device), DLS_V.to(device)


def _quantized(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Statistics and codes by two operators."""
    codes: Tensor = QMIR.dls_quantize(x, *QMIR.dls_qparams(x, w, v, *LIMITS, False, False), *LIMITS)
    return codes


def _fused(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The same by the operator that lowered networks call."""
    chain = (None, None, None, "none", None, "none", None)
    codes: Tensor = QMIR.chain_quantize(x, *chain, w, v, -1, *LIMITS, "sample", False)[0]
    return codes


def _plain(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The same by torch, of one sample."""
    low, high, std, mean = x.amin(), x.amax(), x.std(), x.mean()
    shift = v[0] * mean + v[1] * std + v[2] * low + v[3] * high
    moved = (mean + shift).abs(), std, low + shift, high + shift
    step = sum(a * b for a, b in zip(w, moved, strict=True))
    assert isinstance(step, Tensor)
    step = step.abs().clamp_min(1e-6)
    return torch.clamp(torch.round((x + shift) / step), *LIMITS).to(torch.int8)


def _dls_row(shape: Shape, device: torch.device) -> Row:
    def make() -> tuple[Tensor, ...]:
        return torch.randn(shape, device=device), *_scalars(device)

    sides = {
        OURS: Side(_quantized, make),
        COPY: copy_of(DLS_BYTES * math.prod(shape), device),
        "our chain_quantize": Side(_fused, make),
    }
    if shape[0] == 1:
        sides["plain torch"] = Side(_plain, make)
    return Row(f"`dls_qparams` + `dls_quantize`, 4 bits, {shape}", sides, {COPY: 0.75})


def _fake_dls_row(shape: Shape, per_tensor: bool, device: torch.device) -> Row:
    def make() -> tuple[Tensor, ...]:
        leaves = (torch.randn(shape, device=device), *_scalars(device))
        return (*(t.requires_grad_() for t in leaves), torch.randn(shape, device=device))

    grid = (*LIMITS, per_tensor, False, False)
    sides = {
        OURS: Side(trained(QMIR.dls_fake_quant, 3, *grid), make),
        COPY: copy_of(TRAINING_BYTES * math.prod(shape), device),
    }
    goals = {COPY: 0.6}
    if per_tensor:
        sides[PUBLISHED] = Side(trained(oracles.dls, 3, *grid), make)
        goals[PUBLISHED] = 20.0
    groups = "per tensor" if per_tensor else "per sample"
    return Row(f"`dls_fake_quant`, forward + backward, {groups}, {shape}", sides, goals)


def _fake_rfa_row(shape: Shape, bits: int, device: torch.device) -> Row:
    lowest = -(2 ** (bits - 1))

    def make() -> tuple[Tensor, ...]:
        inputs, _ = rfa_case(shape, 1, bits)
        leaves = [t.to(device).requires_grad_() for t in inputs]
        return (*leaves, torch.randn(shape, device=device))

    sides = {
        OURS: Side(trained(QMIR.rfa_fake_quant, 4, lowest), make),
        COPY: copy_of(TRAINING_BYTES * math.prod(shape), device),
        PUBLISHED: Side(trained(oracles.rfa_loop, 4, lowest), make),
    }
    goals = {COPY: 0.6, PUBLISHED: 20.0}
    return Row(f"`rfa_fake_quant`, {bits} bits, forward + backward, {shape}", sides, goals)


def _gated(x: Tensor, gate: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Codes of norm(x) * silu(gate), a step for each token, by one operator."""
    chain = (None, None, 1e-5, "none", gate, "silu", None)
    codes: Tensor = QMIR.chain_quantize(x, *chain, w, v, -1, *LIMITS, "token", False)[0]
    return codes


def _gated_apart(x: Tensor, gate: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The same by torch's operators and those of the quantizer."""
    y = (F.layer_norm(x, x.shape[-1:]) * F.silu(gate)).flatten(0, -2)
    return _quantized(y, w, v).view(x.shape)


def _chain_row(shape: Shape, compiled: Callable[..., Any], device: torch.device) -> Row:
    def make() -> tuple[Tensor, ...]:
        return *(torch.randn(shape, device=device) for _ in range(2)), *_scalars(device)

    sides = {
        OURS: Side(_gated, make),
        COPY: copy_of((2 * FLOAT + CODE) * math.prod(shape), device),
        "separate operators": Side(_gated_apart, make),
        "separate operators, Inductor": Side(compiled(_gated_apart), make),
    }
    return Row(f"`chain_quantize`, norm * silu(gate), token codes, {shape}", sides, {})


def rows(
    gpu: Any,
    activations: Sequence[Shape] = ACTIVATIONS,
    tokens: Sequence[Shape] = TOKENS,
    weights: Sequence[Shape] = WEIGHTS,
    chains: Sequence[Shape] = CHAINS,
) -> Iterator[Row]:
    """All rows of quantizers, see `Row`."""
    for shape in (*activations, *tokens):
        yield _dls_row(shape, gpu.device)
        yield _fake_dls_row(shape, shape in activations, gpu.device)
    for shape in weights:
        for bits in (2, 4):
            yield _fake_rfa_row(shape, bits, gpu.device)
    for shape in chains:
        yield _chain_row(shape, gpu.compiled, gpu.device)
