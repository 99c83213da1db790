"""FuseEpilogue: counts on networks of the zoo, equal bytes, and sums that it must leave alone."""

import copy
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chains import before
from support.graphs import calls, run
from support.integers import same_bytes
from support.lowering import check_operators
from support.models import CAPTURES, ConvNet, example, train_step
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import qmir_ao
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.backend.registry import TARGETS, lower_graph
from qmir_ao.ops._epilogue import Epilogue
from qmir_ao.passes.epilogues import OWN_ARGUMENTS, epilogue_of
from qmir_ao.passes.fuse_epilogue import FuseEpilogue
from qmir_ao.passes.invariants import check_invariants
from qmir_ao.passes.lower import SOURCE
from qmir_ao.passes.pipeline import CPU, CUDA
from qmir_ao.recipes.models import mambair, swinir
from qmir_ao.recipes.models.edsr import EDSR
from qmir_ao.recipes.models.mambair import MambaIR
from qmir_ao.recipes.models.swinir import SwinIR

aten, qmir = torch.ops.aten, torch.ops.qmir
captures = pytest.mark.parametrize("capture", CAPTURES)
SIZES = [(1, 3, 8, 8), (2, 3, 11, 6), (1, 3, 5, 19)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, and what becomes of its integer operators.

    Attributes:
        build: makes it.
        sums: residual sums that are fused.
        scaled: of those, the ones whose channels have factors.
        turned: of those, the ones behind a permute.
        relus: activations that are fused.
    """

    build: Any
    sums: int
    scaled: int = 0
    turned: int = 0
    relus: int = 0


def mamba(name: str, depth: int) -> MambaIR:
    return MambaIR(**{**mambair.CONFIGS[name], "depths": (depth,)})


ZOO = {
    # Of each block out_proj; of the group its convolution.
    "mambair-tiny": Case(lambda: mamba("mambair-tiny-x2", 1), 2, scaled=1, turned=1),
    # The second block drops paths while it trains.
    "mambair-light": Case(lambda: mamba("mambair-light-x2", 2), 3, scaled=2, turned=1),
    "edsr": Case(lambda: EDSR(features=8, blocks=2), 2, relus=2),
    # Of each block the projection and the second layer of the MLP.
    "swinir": Case(
        lambda: SwinIR(**{**swinir.CONFIGS["swinir-light-x2"], "depths": (2,), "heads": (6,)}),
        5,
        turned=1,
    ),
}
zoo = pytest.mark.parametrize("name", ZOO)


def prepare(model: nn.Module, capture: str, dynamic: bool = True) -> GraphModule:
    size = (2, 3, 9, 11)
    free: Any = torch.export.Dim.DYNAMIC
    open_dims = capture == "export" and dynamic
    shapes = ({0: free, 2: free, 3: free},) if open_dims else None
    qconfig = qmir_ao.get_qmir_qconfig(4, 4)
    graph = qmir_ao.prepare_qat(model, qconfig, example(capture, *size), dynamic_shapes=shapes)
    train_step(graph, torch.rand(size))
    return graph.eval()


@functools.cache
def prepared(name: str, capture: str) -> GraphModule:
    torch.manual_seed(0)
    return prepare(ZOO[name].build(), capture)


@functools.cache
def plain(name: str, capture: str) -> GraphModule:
    return before("FuseEpilogue", prepared(name, capture))


def integer_operators(graph: GraphModule) -> list[Node]:
    return [n for n in graph.graph.nodes if n.target in OWN_ARGUMENTS]


def ends(graph: GraphModule) -> list[Epilogue]:
    found = [epilogue_of(n) for n in integer_operators(graph)]
    return [e for e in found if e != Epilogue()]


def lower(graph: GraphModule, target: str = "cpu", *, fused: bool = True) -> LoweredModule:
    passes = (CUDA if target == "cuda" else CPU) if fused else without()
    return lower_graph(graph, dataclasses.replace(TARGETS["cpu"], passes=passes))


def without() -> tuple:
    return tuple(p for p in CPU if p.name != "FuseEpilogue")


@captures
@zoo
def test_sums_and_activations_move_into_integer_operators(name: str, capture: str) -> None:
    graph, case = copy.deepcopy(plain(name, capture)), ZOO[name]
    sums, products = calls(graph, "add"), calls(graph, "mul")
    relus, turns = calls(graph, "relu"), calls(graph, "permute")
    operators = len(integer_operators(graph))
    inputs = [torch.rand(size) for size in SIZES]
    want = [run(graph, x) for x in inputs]
    assert FuseEpilogue()(graph).modified
    assert calls(graph, "add") == sums - case.sums
    assert calls(graph, "mul") == products - case.scaled
    assert calls(graph, "relu") == relus - case.relus
    # A residual is turned as the operator's result was; a permute behind may cancel.
    assert calls(graph, "permute") <= turns + case.turned
    assert len(integer_operators(graph)) == operators
    found = ends(graph)
    assert sum(e.residual is not None for e in found) == case.sums
    assert sum(e.residual_scale is not None for e in found) == case.scaled
    assert sum(e.activation == "relu" for e in found) == case.relus
    for x, y in zip(inputs, want, strict=True):
        assert same_bytes(run(graph, x), y)
    check_invariants(graph, "FuseEpilogue", ("no_identity_is_left", "everything_is_read"))
    assert FuseEpilogue().rewrite(graph) == 0


@captures
@pytest.mark.parametrize("part", ["residual", "residual_scale", "activation"])
def test_a_changed_operand_is_noticed(part: str, capture: str) -> None:
    name = "edsr" if part == "activation" else "mambair-tiny"
    graph = copy.deepcopy(plain(name, capture))
    x = torch.rand(SIZES[0])
    want = run(graph, x)
    FuseEpilogue()(graph)
    node = next(
        n for n in integer_operators(graph) if getattr(epilogue_of(n), part) not in (None, "none")
    )
    at = OWN_ARGUMENTS[node.target] + Epilogue._fields.index(part)
    node.update_arg(at, "none" if part == "activation" else None)
    if part == "residual":
        node.update_arg(at + 1, None)
    graph.recompile()
    assert not torch.equal(run(graph, x), want)


@captures
@zoo
def test_the_lowered_network_is_the_one_without_the_pass(name: str, capture: str) -> None:
    graph = prepared(name, capture)
    fused, separate = lower(graph), lower(graph, fused=False)
    on_gpu = lower(graph, "cuda")
    # There FuseMoments also moves activations that a quantizer reads.
    assert 0 < len(ends(fused.graph_module)) <= len(ends(on_gpu.graph_module))
    for size in SIZES:
        x = torch.rand(size)
        want = separate(x)
        assert same_bytes(fused(x), want)
        assert same_bytes(on_gpu(x), want)
    check_operators(graph, fused, torch.rand(SIZES[1]))


@captures
@zoo
def test_reports_stay_the_same(name: str, capture: str) -> None:
    graph = prepared(name, capture)
    fused, separate = lower(graph).report, lower(graph, fused=False).report
    parts = [sorted((r.op, r.module, r.reason) for r in x.left_in_float) for x in (fused, separate)]
    assert parts[0] == parts[1]
    assert fused.operators == separate.operators
    assert fused.float_parameter_bytes == separate.float_parameter_bytes


@captures
def test_what_passes_did_and_comparisons_name_the_operators(capture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mamba("mambair-tiny-x2", 1)
    graph = prepare(copy.deepcopy(model), capture)
    fused, separate = lower(graph), lower(graph, fused=False)
    record = next(p for p in qmir_ao.explain(fused).passes if p.name == "FuseEpilogue")
    assert record.changed == 2
    assert record.operators["add"] == -2 and record.operators["mul"] == -1
    x = [torch.rand(SIZES[0])]
    tables = [qmir_ao.compare(model, each, x) for each in (fused, separate)]
    assert tables[0].rows == tables[1].rows
    qmir_ao.save(fused, tmp_path / "model")
    loaded = qmir_ao.load(tmp_path / "model")
    assert same_bytes(loaded(x[0]), fused(x[0]))
    assert loaded.report == fused.report
    assert qmir_ao.compare(graph, loaded, x[0]) == qmir_ao.compare(graph, fused, x[0])
    assert str(qmir_ao.explain(loaded)) == str(qmir_ao.explain(fused))


class Body(nn.Module):
    """A convolution of 11 features between float ones; subclasses join its result otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 11, 3, padding=1)
        self.body = nn.Conv2d(11, 11, 3, padding=1)
        self.last = nn.Conv2d(11, 3, 3, padding=1)
        self.columns = nn.Parameter(torch.rand(11) + 0.5)
        self.planes = nn.Parameter(torch.rand(11, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.join(x, self.body(x)))

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def body(join: Any) -> type[Body]:
    return type("Joined", (Body,), {"join": lambda self, x, y: join(self, x, y)})


LEFT = {
    "read twice": lambda _, x, y: x + y + y.mean((2, 3), keepdim=True),
    "depends on the result": lambda _, x, y: torch.sigmoid(y) + y,
    "twice itself": lambda _, x, y: y + y,
    "one value for each channel": lambda _, x, y: x.mean((2, 3), keepdim=True) + y,
    "a constant for each channel": lambda m, x, y: y + m.planes,
    "wider than the result": lambda _, x, y: (torch.stack((x, x)) + y)[1],
    "alpha": lambda _, x, y: torch.add(x, y, alpha=0.5),
    "a number": lambda _, x, y: y + 0.5,
    "another type": lambda _, x, y: y + (x > 0),
    "double": lambda _, x, y: (x.double() + y).float(),
    "difference": lambda _, x, y: x - y,
    "not relu": lambda _, x, y: torch.nn.functional.gelu(y),
    "relu of a copy": lambda _, x, y: torch.relu(y) + torch.tanh(y),
    "scaled result": lambda _, x, y: x + y * 0.1,
    "another call of the module": lambda m, x, y: torch.tanh(m.body(torch.tanh(x))) + y,
}
CALLED_TWICE = {"another call of the module"}


@captures
@pytest.mark.parametrize("name", LEFT)
def test_what_must_stay_stays(name: str, capture: str) -> None:
    torch.manual_seed(0)
    graph = before("FuseEpilogue", prepare(body(LEFT[name])(), capture))
    x = torch.rand(2, 3, 9, 11)
    want = run(graph, x)
    assert len(integer_operators(graph)) == 1 + (name in CALLED_TWICE)
    assert FuseEpilogue().rewrite(graph) == 0
    graph.recompile()
    assert same_bytes(run(graph, x), want)


TAKEN = {
    # Name: what joins, residual, factors, activation.
    "residual first": (lambda _, x, y: x + y, True, False, "none"),
    "residual behind": (lambda _, x, y: y + x, True, False, "none"),
    "sum, then relu": (lambda _, x, y: torch.relu(x + y), True, False, "relu"),
    "relu, then sum": (lambda _, x, y: x + torch.relu(y), False, False, "relu"),
    "factors of channels": (lambda m, x, y: x * m.planes + y, True, True, "none"),
    "factors in front": (lambda m, x, y: m.planes * x + y, True, True, "none"),
    "factors of columns": (lambda m, x, y: x * m.columns + y, True, False, "none"),
    "factors that are read": (lambda m, x, y: y + (z := x * m.planes) + z, True, False, "none"),
    "factors from an input": (
        lambda m, x, y: x * torch.sigmoid(x.mean((2, 3), keepdim=True)) + y,
        True,
        False,
        "none",
    ),
    "turned residual first": (
        lambda _, x, y: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) + y,
        True,
        False,
        "none",
    ),
}


UNSURE_WHEN_TRACED = ("factors of columns", "factors from an input")
"""A symbolic trace does not say that these have the size of the result."""


@captures
@pytest.mark.parametrize("name", TAKEN)
def test_forms_that_are_taken(name: str, capture: str) -> None:
    torch.manual_seed(0)
    join, residual, scale, activation = TAKEN[name]
    dynamic = name != "factors of columns"
    graph = before("FuseEpilogue", prepare(body(join)(), capture, dynamic))
    x = torch.rand(2, 3, 9, 11)
    want = run(graph, x)
    FuseEpilogue()(graph)
    assert same_bytes(run(graph, x), want)
    if capture == "trace" and name in UNSURE_WHEN_TRACED:
        assert not ends(graph)
        return
    (end,) = ends(graph)
    assert (end.residual is not None, end.residual_scale is not None) == (residual, scale)
    assert end.activation == activation
    assert FuseEpilogue().rewrite(graph) == 0


@captures
@pytest.mark.parametrize("turned", [False, True])
def test_a_sum_of_which_there_are_views_lies_in_rows(turned: bool, capture: str) -> None:
    """Where a graph shows that the residual does not, it stays; else a copy would be made."""

    def join(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        last = x.contiguous(memory_format=torch.channels_last)
        other = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if turned else last
        return (y + other).view(x.shape[0], -1).reshape(x.shape)

    torch.manual_seed(0)
    graph = before("FuseEpilogue", prepare(body(join)(), capture))
    x = torch.rand(2, 3, 9, 11)
    want = run(graph, x)
    assert FuseEpilogue()(graph).modified is not turned
    assert same_bytes(run(graph, x), want)


@captures
def test_a_linear_layer_behind_a_permute_stays(capture: str) -> None:
    """Its result would lie in another order than the sum did."""
    torch.manual_seed(0)
    graph = before("FuseEpilogue", prepare(ConvNet(), capture))
    FuseEpilogue()(graph)
    assert [e.activation for e in ends(graph)] == ["relu"]
    assert all(e.residual is None for e in ends(graph))


def test_a_channel_shift_stays_with_its_quantizer() -> None:
    """That of a vector of one has the size of the result that it is added to."""

    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = (5, 5, 1, 5, 5)
            self.layers = nn.Sequential(*(nn.Linear(*s) for s in itertools.pairwise(sizes)))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    torch.manual_seed(0)
    qconfig = qmir_ao.get_qmir_qconfig(4, 4)
    graph = qmir_ao.prepare_qat(Vector(), qconfig, (torch.randn(5),))
    graph(torch.randn(5))
    graph = before("FuseEpilogue", graph.eval())
    shifts = [n for n in graph.graph.nodes if n.target is aten.add.Tensor and SOURCE in n.meta]
    assert any(n.args[0].target is qmir.linear.default for n in shifts)
    assert FuseEpilogue().rewrite(graph) == 0


def test_a_graph_that_writes_in_place_is_left_alone() -> None:
    graph = copy.deepcopy(plain("edsr", "trace"))
    node = next(n for n in graph.graph.nodes if n.target is aten.relu.default)
    with graph.graph.inserting_after(node):
        assert graph.graph.call_method("add_", (node.all_input_nodes[0], 1.0))
    assert FuseEpilogue().rewrite(graph) == 0


@captures
@zoo
def test_a_training_graph_is_left_alone(name: str, capture: str) -> None:
    assert FuseEpilogue().rewrite(copy.deepcopy(prepared(name, capture))) == 0
