"""Projections by einsum become grouped convolutions; other sums stay."""

import pytest
import torch
from support.graphs import calls, captured, run
from support.models import CAPTURES
from support.scans import assert_no_worse
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping

import qmir_ao
from qmir_ao.passes.swap_einsum import SwapEinsum

captures = pytest.mark.parametrize("capture", CAPTURES)


class Sum(nn.Module):
    def __init__(self, equation: str, *weight: int, listed: bool = False) -> None:
        super().__init__()
        self.equation, self.listed = equation, listed
        self.weight = nn.Parameter(torch.randn(weight))

    def forward(self, x: Tensor) -> Tensor:
        if self.listed:
            return torch.einsum(self.equation, [x, self.weight])
        return torch.einsum(self.equation, x, self.weight)


CASES = {
    "published": Sum("b k d l, k c d -> b k c l", 4, 7, 5),
    "rank": Sum("bkrl,kdr->bkdl", 4, 6, 5),
    "one group": Sum("bkdl,kcd->bkcl", 1, 3, 5),
    "listed": Sum("bkdl,kcd->bkcl", 4, 7, 5, listed=True),
}
NEGATIVE = {
    "turned weight": Sum("bkdl,kdc->bkcl", 4, 5, 7),
    "turned result": Sum("bkdl,kcd->bklc", 4, 7, 5),
    "no groups": Sum("bkdl,cd->bkcl", 7, 5),
    "summed groups": Sum("bkdl,kcd->bcl", 4, 7, 5),
    "channels last": Sum("bkld,kcd->bklc", 4, 7, 5),
}


@captures
@pytest.mark.parametrize("name", CASES)
def test_projections_become_convolutions(name: str, capture: str) -> None:
    net = CASES[name]
    groups = net.weight.shape[0]
    graph = captured(net, capture, 3, groups, 5, 6)
    assert calls(graph, "einsum") == 1
    assert SwapEinsum()(graph).modified
    assert calls(graph, "einsum") == 0
    assert calls(graph, "conv1d") == 1
    inputs = [torch.rand(2, groups, 5, 6) for _ in range(8)]
    exact = [torch.einsum(net.equation, x.double(), net.weight.double()) for x in inputs]
    assert_no_worse([(run(graph, x), run(net, x), y) for x, y in zip(inputs, exact, strict=True)])
    assert SwapEinsum().rewrite(graph) == 0


@captures
@pytest.mark.parametrize("name", NEGATIVE)
def test_other_sums_stay(name: str, capture: str) -> None:
    size = (2, 4, 6, 5) if name == "channels last" else (2, 4, 5, 6)
    graph = captured(NEGATIVE[name], capture, *size)
    assert SwapEinsum().rewrite(graph) == 0


def test_a_sum_of_two_inputs_stays() -> None:
    graph = torch.fx.symbolic_trace(lambda x, y: torch.einsum("bkdl,kcd->bkcl", x, y))
    assert SwapEinsum().rewrite(graph) == 0


def test_gradients_stay() -> None:
    net = CASES["published"].double()
    graph = captured(net, "trace")
    SwapEinsum()(graph)
    x, found = torch.rand(2, 4, 5, 6, dtype=torch.float64), []
    for form in (net, graph):
        given = x.clone().requires_grad_()
        net.zero_grad()
        form(given).square().sum().backward()
        found += [(given.grad, net.weight.grad.clone())]
    net.float()
    for before, after in zip(*found, strict=True):
        assert torch.allclose(before, after, rtol=1e-12)


def test_another_group_count_is_noticed() -> None:
    net = CASES["published"]
    graph = captured(net, "trace")
    SwapEinsum()(graph)
    convolution = next(n for n in graph.graph.nodes if n.target is torch.conv1d)
    weight = convolution.args[1]
    weight.args = (*weight.args[:1], [28, 5, 1][::1])
    with graph.graph.inserting_before(convolution):
        flipped = graph.graph.call_function(torch.flip, (weight, [0]))
    convolution.update_arg(1, flipped)
    graph.recompile()
    x = torch.rand(2, 4, 5, 6)
    assert not torch.allclose(run(graph, x), run(net, x), atol=1e-3)


@captures
def test_the_weight_is_quantized(capture: str) -> None:
    net = nn.Sequential(CASES["published"])
    inputs = (torch.rand(2, 4, 5, 6),) if capture == "export" else None
    mapping = QConfigMapping().set_module_name("0", qmir_ao.qmir_qconfig)
    prepared = qmir_ao.prepare_qat(net, mapping, inputs)
    prepared(torch.rand(2, 4, 5, 6))
    report = qmir_ao.convert_and_lower(prepared.eval()).report
    assert [(r.kind, r.weight_bits, r.module) for r in report.operators] == [("conv2d", 4, "0")]
