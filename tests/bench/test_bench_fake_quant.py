"""Fake-quantizers, forward and backward, beside their peers: `make bench` runs these.

Peers: the published form of RFA (one `where` per level, here without its autograd function) and
the plain-torch reference of DLS. Every benchmark first checks that both sides agree.
"""

import pytest
import torch
from support import oracles

import qmir_ao.backend.cpu.dls
import qmir_ao.backend.cpu.rfa  # noqa: F401  (registers the kernels)
from qmir_ao.ops.dls_fake_quant import (
    dls_fake_quant,
    dls_fake_quant_backward_ref,
    dls_fake_quant_ref,
)
from qmir_ao.ops.rfa_fake_quant import rfa_fake_quant

pytestmark = pytest.mark.bench

WEIGHTS = {"conv60x60x3x3": (60, 60, 3, 3), "dense256x256": (256, 256)}
ACTIVATIONS = {"scan2x288x2304": (2, 288, 2304), "body2x60x48x48": (2, 60, 48, 48)}


def _rfa_case(shape, bits):
    levels = 2**bits
    thresholds = torch.arange(levels) - levels / 2 + torch.randn(levels) * 0.05
    inputs = (torch.randn(shape), torch.tensor([0.3]), torch.zeros(1), thresholds.sort().values)
    return tuple(t.requires_grad_() for t in inputs), -(levels // 2), torch.randn(shape)


def _train(function, inputs, settings, upstream):
    return torch.autograd.grad(function(*inputs, *settings), inputs, upstream)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("side", ["qmir", "published-loop"])
def test_rfa_forward_backward(benchmark, shape, bits, side):
    inputs, quant_min, upstream = _rfa_case(shape, bits)
    sides = {"qmir": rfa_fake_quant, "published-loop": oracles.rfa_loop}
    want = _train(oracles.rfa_loop, inputs, (quant_min,), upstream)
    got = _train(rfa_fake_quant, inputs, (quant_min,), upstream)
    assert all(oracles.relative(a, b) < 1e-3 for a, b in zip(got, want, strict=True))
    benchmark.group = f"rfa {bits} bit {shape}"
    benchmark(_train, sides[side], inputs, (quant_min,), upstream)


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, v, *settings):
        ctx.save_for_backward(x, w, v)
        ctx.settings = settings
        return dls_fake_quant_ref(x, w, v, *settings)

    @staticmethod
    def backward(ctx, grad):
        return (
            *dls_fake_quant_backward_ref(grad, *ctx.saved_tensors, *ctx.settings),
            *[None] * len(ctx.settings),
        )


@pytest.mark.parametrize("shape", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("side", ["qmir", "plain-torch", "copy"])
def test_dls_forward_backward(benchmark, shape, side):
    inputs = (
        torch.randn(shape).requires_grad_(),
        torch.tensor([0.0, 0.3, 0.0, 0.0]).requires_grad_(),
        torch.tensor([-1.0, 0.1, 0.0, 0.0]).requires_grad_(),
    )
    settings, upstream = (-8, 7, False, False, False), torch.randn(shape)
    want = _train(_Reference.apply, inputs, settings, upstream)
    got = _train(dls_fake_quant, inputs, settings, upstream)
    assert all(oracles.relative(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    benchmark.group = f"dls 4 bit {shape}"
    if side == "copy":
        # Memory traffic of one read and one write: the unit in which the others are judged.
        benchmark(torch.clone, upstream)
    else:
        function = dls_fake_quant if side == "qmir" else _Reference.apply
        benchmark(_train, function, inputs, settings, upstream)
