"""Consumers of one tensor share codes where their quantizers are equal, and only there."""

import pytest
import torch
from support.graphs import calls, run
from support.lowering import check_operators
from support.models import CAPTURES, example, train_step
from torch import Tensor, nn

import qmir_ao
from qmir_ao.passes.share_quantize import ShareQuantize, repeated_quantizers

qmir = torch.ops.qmir
captures = pytest.mark.parametrize("capture", CAPTURES)


class Quantizers(nn.Module):
    """Two quantizers of one tensor; equal but for what a case changes."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.change = change
        for name in ("first", "second"):
            self.register_buffer(f"{name}_scale", torch.tensor([0.0, 0.3, 0.0, 0.0]))
            self.register_buffer(f"{name}_shift", torch.tensor([0.1, 0.0, 0.0, 0.0]))
        if change == "scalars":
            self.second_scale[1] = 0.4
        if change == "sign of zero":
            self.second_scale[0] = -0.0

    def quantized(self, x: Tensor, name: str, high: int) -> Tensor:
        scalars = getattr(self, f"{name}_scale"), getattr(self, f"{name}_shift")
        predicted = qmir.dls_qparams.default(x, *scalars, -8, 7, False, False)
        step, shift = predicted[0], predicted[1]
        codes = qmir.dls_quantize.default(x, step, shift, -8, high)
        return qmir.dls_dequantize.default(codes, step, shift)

    def forward(self, x: Tensor) -> Tensor:
        other = x + 1 if self.change == "tensor" else x
        if self.change == "moved":
            x, other = x.permute(0, 2, 1), x.permute(0, 2, 1)
        if self.change == "written":
            other = x.permute(0, 2, 1)
            first = self.quantized(x.permute(0, 2, 1), "first", 7)
            x.mul_(2)
            return first + self.quantized(other, "second", 7)
        high = 6 if self.change == "range" else 7
        return self.quantized(x, "first", 7) * self.quantized(other, "second", high)


@pytest.mark.parametrize("change", ["", "moved"])
def test_equal_quantizers_are_one(change: str) -> None:
    graph = torch.fx.symbolic_trace(Quantizers(change))
    x = torch.randn(3, 5, 7)
    want = run(graph, x)
    assert ShareQuantize().rewrite(graph) == 1
    graph.recompile()
    for name in ("dls_qparams", "dls_quantize"):
        assert calls(graph, name) == 1
    assert torch.equal(run(graph, x), want)
    assert ShareQuantize().rewrite(graph) == 0
    assert not repeated_quantizers(graph)


@pytest.mark.parametrize("change", ["scalars", "sign of zero", "tensor", "range", "written"])
def test_different_quantizers_stay(change: str) -> None:
    graph = torch.fx.symbolic_trace(Quantizers(change))
    x = torch.randn(3, 5, 7)
    want = run(graph, x.clone())
    assert ShareQuantize().rewrite(graph) == 0
    graph.recompile()
    assert calls(graph, "dls_quantize") == calls(graph, "dls_qparams") == 2
    assert torch.equal(run(graph, x.clone()), want)


def test_sharing_different_ones_would_be_noticed() -> None:
    graph = torch.fx.symbolic_trace(Quantizers("scalars"))
    x = torch.randn(3, 5, 7)
    want = run(graph, x)
    first, second = (n for n in graph.graph.nodes if n.target is qmir.dls_quantize.default)
    second.replace_all_uses_with(first)
    graph.recompile()
    assert not torch.equal(run(graph, x), want)


class TwoReaders(nn.Module):
    """One tensor read by two layers through views of its own, so that preparation sees two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x.transpose(1, 2)) + self.second(x.transpose(1, 2))


@captures
@pytest.mark.parametrize("trained", [True, False])
def test_a_network_with_two_views(capture: str, trained: bool) -> None:
    """Equal from the start and one after lowering; apart once training moved them apart."""
    torch.manual_seed(0)
    prepared = qmir_ao.prepare_qat(TwoReaders(), qmir_ao.qmir_qconfig, example(capture, 3, 6, 4))
    x = torch.randn(3, 6, 4)
    if trained:
        prepared(x)
        train_step(prepared, x)
    else:
        with torch.no_grad():
            prepared(x)
    lowered = qmir_ao.convert_and_lower(prepared.eval())
    assert calls(lowered.graph_module, "dls_quantize") == (2 if trained else 1)
    assert sum(r.kind == "linear" for r in lowered.report.operators) == 2
    check_operators(prepared, lowered, torch.randn(2, 6, 4))
