"""Equal constants are held once; nearly equal ones are not."""

import pytest
import torch
from support.graphs import run
from support.lowering import check_operators
from support.models import CAPTURES, example
from torch import Tensor, nn

import qmir_ao
from qmir_ao.passes.dedupe_constants import DedupeConstants, repeated_constants

BASE = torch.tensor([1.0, float("nan"), 0.0, -2.5])
CHANGES = {
    "value": torch.tensor([1.0, float("nan"), 0.0, -2.4]),
    "sign of zero": torch.tensor([1.0, float("nan"), -0.0, -2.5]),
    "shape": BASE.reshape(4, 1),
    "type": BASE.double(),
    "bits as integers": BASE.view(torch.int32),
}


class Sum(nn.Module):
    def __init__(self, second: Tensor) -> None:
        super().__init__()
        self.register_buffer("first", BASE.clone())
        self.register_buffer("second", second.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x + self.first, x * self.second, x - self.first


def constants(graph: torch.fx.GraphModule) -> list[str]:
    return [n.target for n in graph.graph.nodes if n.op == "get_attr"]


def test_equal_constants_are_read_from_one_place() -> None:
    graph = torch.fx.symbolic_trace(Sum(BASE))
    x = torch.rand(3, 4)
    want = run(graph, x)
    assert set(constants(graph)) == {"first", "second"}
    assert DedupeConstants()(graph).modified
    assert constants(graph) == ["first"]
    for got, value in zip(run(graph, x), want, strict=True):
        assert torch.equal(got.nan_to_num(7), value.nan_to_num(7))
    assert DedupeConstants().rewrite(graph) == 0


@pytest.mark.parametrize("change", CHANGES)
def test_others_stay(change: str) -> None:
    graph = torch.fx.symbolic_trace(Sum(CHANGES[change]))
    assert DedupeConstants().rewrite(graph) == 0
    assert set(constants(graph)) == {"first", "second"}
    assert not repeated_constants(graph)


def test_reading_the_wrong_one_would_be_noticed() -> None:
    graph = torch.fx.symbolic_trace(Sum(CHANGES["value"]))
    x = torch.rand(3, 4)
    want = run(graph, x)[1]
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            node.target = "first"
    graph.recompile()
    assert not torch.equal(run(graph, x)[1].nan_to_num(7), want.nan_to_num(7))


class Twice(nn.Module):
    """A layer that runs twice: its weight is folded for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(torch.relu(self.shared(x))))


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_shared_layer_is_held_once(capture: str) -> None:
    torch.manual_seed(0)
    prepared = qmir_ao.prepare_qat(Twice(), qmir_ao.qmir_qconfig, example(capture, 3, 6))
    prepared(torch.randn(3, 6))
    lowered = qmir_ao.convert_and_lower(prepared.eval())
    packed = [t for t in lowered.state_dict().values() if t.dtype == torch.uint8]
    assert sum(r.kind == "linear" for r in lowered.report.operators) == 3
    assert len(packed) == 2
    check_operators(prepared, lowered, torch.randn(4, 6))
