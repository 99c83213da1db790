"""A turned tensor is copied once for its quantizer's two kernels, and its values stay."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.graphs import calls, run
from support.lowering import check_operators
from support.models import CAPTURES, example
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.profiler import ProfilerActivity, profile

import qmir_ao
from qmir_ao.passes.lay_out_once import LayOutOnce
from qmir_ao.passes.pipeline import CPU, run_passes

FUSED = ("FuseDlsStatistics",)
qmir = torch.ops.qmir
SCALARS = torch.tensor([0.0, 0.3, 0.0, 0.0]), torch.tensor([0.1, 0.0, 0.0, 0.2])
Form = Callable[[Tensor], Tensor]


def graph_of(form: Form, *, codes: bool = True) -> GraphModule:
    def quantized(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = form(x)
        predicted = qmir.dls_qparams.default(y, w, v, -8, 7, False, False)
        step, shift = predicted[0], predicted[1]
        read = y if codes else y.exp()
        return qmir.dls_quantize.default(read, step, shift, -8, 7), step, y.sum()

    return torch.fx.symbolic_trace(quantized)


def copies(graph: GraphModule, x: Tensor) -> int:
    run(graph, x, *SCALARS)  # whatever is compiled or cached is done by then
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run(graph, x, *SCALARS)
    return sum(e.count for e in seen.key_averages() if e.key == "aten::clone")


TURNED: dict[str, Form] = {
    "permuted": lambda x: x.permute(0, 2, 3, 1),
    "permuted and shifted": lambda x: x.permute(0, 2, 3, 1) + 1,
    "a piece": lambda x: torch.split(x, [1, 3], dim=1)[1],
    "a transposed piece": lambda x: torch.relu(x.chunk(2, dim=1)[1].transpose(2, 3)),
}
STAYS: dict[str, Form] = {
    "as it lies": lambda x: x,
    "computed": lambda x: x * 2 + 1,
    "turned and summed": lambda x: x.permute(0, 2, 3, 1).cumsum(1),
    "written to": lambda x: x.permute(0, 2, 3, 1).mul_(1.0),
}


@pytest.mark.parametrize("name", TURNED)
def test_one_copy_instead_of_two(name: str) -> None:
    graph = graph_of(TURNED[name])
    x = torch.randn(3, 4, 5, 7)
    want, before = run(graph, x, *SCALARS), copies(graph, x)
    assert LayOutOnce()(graph).modified
    assert calls(graph, "contiguous") == 1
    assert copies(graph, x) == before - 1
    for got, value in zip(run(graph, x, *SCALARS), want, strict=True):
        assert torch.equal(got, value)
    assert LayOutOnce().rewrite(graph) == 0
    total = next(n for n in graph.graph.nodes if n.target == "sum")
    assert total.args[0].target is not torch.ops.aten.contiguous.default


@pytest.mark.parametrize("name", STAYS)
def test_others_stay(name: str) -> None:
    assert LayOutOnce().rewrite(graph_of(STAYS[name])) == 0


def test_statistics_of_another_tensor_than_the_codes_stay() -> None:
    assert LayOutOnce().rewrite(graph_of(TURNED["permuted"], codes=False)) == 0


def test_another_order_in_memory_would_be_noticed() -> None:
    graph = graph_of(TURNED["permuted"])
    x = torch.randn(3, 4, 5, 7)
    want = run(graph, x, *SCALARS)[0]
    LayOutOnce()(graph)
    copy = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.contiguous.default)
    copy.target, copy.args = torch.flip, (*copy.args, [1])
    graph.recompile()
    assert not torch.equal(run(graph, x, *SCALARS)[0], want)


@pytest.mark.parametrize("capture", CAPTURES)
def test_lowered_networks_agree(capture: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point, self.conv = nn.Linear(5, 6), nn.Conv2d(6, 5, 3, padding=1)
            self.last = nn.Conv2d(5, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(torch.relu(self.point(x)).permute(0, 3, 1, 2))
            return self.last(y + x.permute(0, 3, 1, 2))

    torch.manual_seed(0)
    prepared = qmir_ao.prepare_qat(Net(), qmir_ao.qmir_qconfig, example(capture, 2, 8, 9, 5))
    prepared(torch.randn(2, 8, 9, 5))
    lowered = qmir_ao.convert_and_lower(prepared.eval())
    # A fused quantizer reads the turned tensor where it lies; without them one copy is made.
    assert calls(lowered.graph_module, "contiguous") == 0
    graph = copy.deepcopy(prepared)
    run_passes(graph, tuple(p for p in CPU if p.name not in FUSED))
    assert calls(graph, "contiguous") == 1
    check_operators(prepared, lowered, torch.randn(2, 8, 9, 5))
