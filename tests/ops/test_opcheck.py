"""torch.library.opcheck on every operator: schema, fake tensors, autograd and AOT dispatch."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qmir_ao.backend.cpu
import qmir_ao.ops
from qmir_ao.ops._library import OPS

for module in pkgutil.iter_modules(qmir_ao.ops.__path__):
    importlib.import_module(f"qmir_ao.ops.{module.name}")

Arguments = tuple[Any, ...]
GEOMETRY = (4, [4, 3, 3, 3], [2, 1], [1, 1], [1, 1], 2)
"""A grouped 3x3 convolution of 4-bit codes: container, weight size, stride, padding, dilation."""


def leaf(*size: int) -> Tensor:
    return torch.randn(size, requires_grad=True)


def codes(*size: int) -> Tensor:
    return torch.randint(-8, 8, size, dtype=torch.int8)


def image(*size: int) -> Tensor:
    return torch.randn(size).contiguous(memory_format=torch.channels_last)


def packed(*size: int) -> Tensor:
    return torch.ops.qmir.pack(codes(*size), 4)


def steps(count: int, grad: bool = False) -> Tensor:
    return (torch.rand(count) + 0.1).requires_grad_(grad)


def grid(groups: int, shifts: int | None = None) -> tuple[Tensor, Tensor]:
    return steps(groups), torch.randn(groups if shifts is None else shifts)


def dls_scalars(grad: bool = False) -> tuple[Tensor, Tensor]:
    scale, shift = torch.tensor([0.1, 0.4, 0.05, 0.1]), torch.tensor([-0.9, 0.2, 0.05, 0.0])
    return scale.requires_grad_(grad), shift.requires_grad_(grad)


def chain(statistics: str, full: bool) -> Arguments:
    """A (2, 3, 5) tensor with norm, activation, gate and shift, or with none of them."""
    norm = (torch.randn(5), torch.randn(5), 1e-5) if full else (None, None, None)
    gate = ("gelu", torch.randn(2, 3, 5), "silu") if full else ("none", None, "none")
    offset = torch.randn(5) if full else None
    settings = (*dls_scalars(), -1, -8, 7, statistics, False)
    return (torch.randn(2, 3, 5), *norm, *gate, offset, *settings)


def rfa(shifts: int, grad: bool = False) -> Arguments:
    """Weight, step, shift, thresholds and smallest code."""
    thresholds = torch.arange(-8.0, 8.0) + 0.1 * torch.rand(16)
    tensors = (torch.randn(4, 6), steps(4), 0.1 * torch.randn(shifts), thresholds)
    return (*(t.requires_grad_(grad) for t in tensors), -8)


def scan(optional: bool, grad: bool = False) -> Arguments:
    """Operands for 2 samples, 4 channels in 2 groups, 3 states and 5 steps of time."""
    u, delta = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    B, C = torch.randn(2, 2, 3, 5), torch.randn(2, 2, 3, 5)
    extra = (torch.randn(4), torch.randn(4)) if optional else (None, None)
    tensors = (u, delta, -torch.rand(4, 3) - 0.1, B, C, *extra)
    return (*(t if t is None else t.requires_grad_(grad) for t in tensors), True)


def scan_codes(optional: bool) -> Arguments:
    u, delta = (codes(2, 4, 5), *grid(2)), (codes(2, 4, 5), *grid(2))
    B, C = (codes(2, 2, 3, 5), *grid(2)), (codes(2, 2, 3, 5), *grid(2))
    extra = (torch.randn(4), torch.randn(4)) if optional else (None, None)
    return (*u, *delta, -torch.rand(4, 3) - 0.1, *B, *C, *extra, True, -8, 7)


def image_scan(optional: bool, grad: bool = False) -> Arguments:
    """Operands for 2 images of 2 channels and 3x5 pixels, 3 states, 4 directions."""
    u, delta = torch.randn(2, 2, 3, 5), torch.randn(2, 8, 3, 5)
    B, C = torch.randn(2, 4, 3, 3, 5), torch.randn(2, 4, 3, 3, 5)
    extra = (torch.randn(8), torch.randn(8)) if optional else (None, None)
    tensors = (u, delta, -torch.rand(8, 3) - 0.1, B, C, *extra)
    return (*(t if t is None else t.requires_grad_(grad) for t in tensors), True)


def image_scan_codes(optional: bool) -> Arguments:
    u, delta = (codes(2, 2, 3, 5), *grid(2)), (codes(2, 8, 3, 5), *grid(2))
    B, C = (codes(2, 4, 3, 3, 5), *grid(2)), (codes(2, 4, 3, 3, 5), *grid(2))
    extra = (torch.randn(8), torch.randn(8)) if optional else (None, None)
    return (*u, *delta, -torch.rand(8, 3) - 0.1, *B, *C, *extra, True, -8, 7)


def given_statistics() -> Arguments:
    """A plain chain whose channels have known statistics, in another order."""
    moments = torch.rand(2, 6, 4, dtype=torch.float64)
    return (*chain("sample", False), moments, torch.tensor([4, 0, 1, 2, 5]))


Cases = dict[str, Callable[[], list[Arguments]]]
CASES: Cases = {
    "pack": lambda: [(codes(11), 4)],
    "unpack": lambda: [(packed(11), 4, 11)],
    "dls_qparams": lambda: [(torch.randn(2, 3, 5), *dls_scalars(), -8, 7, False, False)],
    "dls_quantize": lambda: [(torch.randn(2, 3, 5), *grid(2), -8, 7)],
    "chain_quantize": lambda: (
        [
            chain(statistics, full)
            for statistics, full in (("token", True), ("sample", False), ("tensor", True))
        ]
        + [given_statistics()]
    ),
    "dls_dequantize": lambda: [(codes(2, 3, 5), *grid(2))],
    "dls_fake_quant": lambda: [
        (leaf(2, 3, 5), *dls_scalars(True), -8, 7, per_tensor, False, clamp)
        for per_tensor, clamp in ((False, False), (True, True))
    ],
    "dls_fake_quant_backward": lambda: [
        (torch.randn(2, 3, 5), torch.randn(2, 3, 5), *dls_scalars(), -8, 7, False, True, False)
    ],
    "static_fake_quant": lambda: [(leaf(2, 7), steps(1, True), leaf(1), -8, 7)],
    "static_fake_quant_backward": lambda: [(torch.randn(2, 7), torch.randn(2, 7), *grid(1), -8, 7)],
    "rfa_fake_quant": lambda: [rfa(shifts, grad=True) for shifts in (1, 4)],
    "rfa_fake_quant_backward": lambda: [(torch.randn(4, 6), *rfa(n)) for n in (1, 4)],
    "rfa_quantize": lambda: [rfa(shifts) for shifts in (1, 4)],
    "rfa_dequantize": lambda: [(packed(4, 6), *grid(4, n), [4, 6], 4) for n in (1, 4)],
    "linear": lambda: [
        (codes(2, 3, 10), *grid(2), packed(6, 10), *grid(6, n), bias, 4, 6, *end)
        for n, bias, end in (
            (1, torch.randn(6), ()),
            (6, None, (torch.randn(2, 3, 6), torch.randn(6), "relu")),
        )
    ],
    "linear_moments": lambda: [
        (codes(2, 3, 10), *grid(2), packed(6, 10), *grid(6, 1), None, 4, 6, None, None, "gelu", *o)
        for o in ((), (torch.randn(6),))
    ],
    "linear_acc": lambda: [(codes(2, 3, 10), packed(6, 10), 4, 6)],
    "conv2d": lambda: [
        (codes(2, 6, 6, 7), *grid(2), packed(4, 3, 3, 3), *grid(4, n), *optional, *GEOMETRY, *end)
        for n, optional, end in (
            (1, (torch.randn(4), None), ()),
            (4, (None, torch.randn(6, 1, 1)), (image(2, 4, 3, 7), torch.randn(4), "relu")),
            (1, (None, None), (image(2, 4, 3, 7).contiguous(), None)),
        )
    ],
    "conv2d_moments": lambda: [
        (codes(2, 6, 6, 7), *grid(2), packed(4, 3, 3, 3), *grid(4, 1), None, None, *GEOMETRY, *end)
        for end in ((), (image(2, 4, 3, 7), None, "silu", torch.randn(4)))
    ],
    "conv2d_acc": lambda: [(codes(2, 6, 6, 7), packed(4, 3, 3, 3), *GEOMETRY)],
    "selective_scan": lambda: [scan(optional, grad=True) for optional in (True, False)],
    "selective_scan_backward": lambda: [
        (torch.randn(2, 4, 5), *scan(optional)) for optional in (True, False)
    ],
    "selective_scan_q": lambda: [scan_codes(optional) for optional in (True, False)],
    "ss2d_scan": lambda: [image_scan(optional, grad=True) for optional in (True, False)],
    "ss2d_scan_backward": lambda: [
        (torch.randn(2, 2, 3, 5), *image_scan(optional)) for optional in (True, False)
    ],
    "ss2d_scan_q_moments": lambda: [
        (*image_scan_codes(optional), *offset)
        for optional, offset in ((True, ()), (False, (torch.randn(2),)))
    ],
    "ss2d_scan_q": lambda: [image_scan_codes(optional) for optional in (True, False)],
}
"""Sample arguments of each operator; tensors ask for a gradient where it is differentiable."""


def test_every_operator_has_samples() -> None:
    assert len(OPS) == len(set(OPS))
    assert {f"qmir::{name}" for name in CASES} == set(OPS), "give a new operator an entry in CASES"


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    torch.manual_seed(0)
    operator = getattr(torch.ops.qmir, name).default
    for arguments in CASES[name]():
        results = torch.library.opcheck(operator, arguments)
        assert set(results.values()) == {"SUCCESS"}, results
        assert len(results) == 4, results
