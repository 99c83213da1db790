"""Every pass: what changes, that values stay, a second run finds nothing, what it leaves alone."""

import copy

import pytest
import torch
from support.models import CAPTURES, ConvNet, ScanNet, example
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import qmir_ao
from qmir_ao.errors import PassOrderError
from qmir_ao.passes.fold import FoldConstants, FoldWeights
from qmir_ao.passes.lower import (
    DecomposeFakeQuantize,
    LowerConv,
    LowerLinear,
    LowerScan,
)
from qmir_ao.passes.normalize import InlineModules, NormalizeOperators
from qmir_ao.passes.pipeline import COMPILE, CPU, check_order, run_passes

aten, qmir = torch.ops.aten, torch.ops.qmir
NAMES = [p.name for p in CPU]
# Integer epilogues round otherwise than float sums; in units of the output's largest value.
ROUNDING = 1e-4


def prepared(model: type[nn.Module], size: tuple[int, ...], capture: str) -> GraphModule:
    torch.manual_seed(0)
    graph = qmir_ao.prepare_qat(model(), qmir_ao.qmir_qconfig, example(capture, *size))
    graph(torch.rand(size))
    return graph.eval()


def count(graph_module: GraphModule, target: object) -> int:
    return sum(n.target is target for n in graph_module.graph.nodes)


def before(name: str, graph_module: GraphModule) -> GraphModule:
    """A copy on which every pass of the CPU target before `name` ran."""
    result = copy.deepcopy(graph_module)
    result.eval()
    run_passes(result, CPU[: NAMES.index(name)])
    return result


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= ROUNDING * b.abs().max())


CASES = {"conv": (ConvNet, (2, 3, 9, 10)), "scan": (ScanNet, (2, 4, 7))}
BOUNDED = {"LowerLinear", "LowerConv", "LowerScan", "FuseNormChain"}
EXACT = {p.name for p in CPU} - BOUNDED


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_values_stay_and_a_second_run_finds_nothing(name: str, case: str, capture: str) -> None:
    model, size = CASES[case]
    graph = before(name, prepared(model, size, capture))
    one = CPU[NAMES.index(name)]
    x = torch.rand(size)
    with torch.no_grad():
        want = graph(x)
        one(graph)
        got = graph(x)
    assert torch.equal(got, want) if name in EXACT else close(got, want)
    assert one.rewrite(graph) == 0
    assert not one(graph).modified


def test_modules_become_functions() -> None:
    graph = prepared(ConvNet, (2, 3, 9, 10), "trace")
    kinds = (nn.Conv2d, nn.Linear, nn.Dropout)
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    assert sum(isinstance(graph.get_submodule(n.target), kinds) for n in calls) == 6
    assert InlineModules().rewrite(graph) == 6
    assert count(graph, aten.conv2d.default) == 3
    assert count(graph, torch.conv2d) == 1  # its padding has a name: NormalizeOperators counts
    assert count(graph, aten.linear.default) == 1


def test_other_modules_are_traced_into() -> None:
    modules = nn.Softshrink(), nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
    graph = torch.fx.symbolic_trace(nn.Sequential(*modules))
    x = torch.randn(2, 1, 5, 7)
    want = graph(x)
    assert InlineModules()(graph).modified
    assert not [n for n in graph.graph.nodes if n.op == "call_module"]
    assert torch.equal(graph(x), want)


def test_operators_get_one_vocabulary() -> None:
    def forward(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        y = nn.functional.conv2d(x, w, padding="valid", stride=2)
        return nn.functional.linear(nn.functional.dropout(y, 0.5, False), v)

    graph = torch.fx.symbolic_trace(forward)
    x, w, v = torch.rand(1, 2, 9, 9), torch.rand(3, 2, 3, 3), torch.rand(5, 4)
    want = graph(x, w, v)
    assert NormalizeOperators().rewrite(graph) == 3
    graph.recompile()
    assert count(graph, aten.conv2d.default) == count(graph, aten.linear.default) == 1
    assert torch.equal(graph(x, w, v), want)


@pytest.mark.parametrize("capture", CAPTURES)
def test_quantizers_become_operators(capture: str) -> None:
    graph = before("ConvertQuantizers", prepared(ConvNet, (2, 3, 9, 10), capture))
    calls = sum(n.op == "call_module" for n in graph.graph.nodes)
    at = NAMES.index("ConvertQuantizers")
    assert run_passes(graph, CPU[at : at + 1])[0].changed == calls > 0
    assert not any(n.op == "call_module" for n in graph.graph.nodes)
    assert count(graph, qmir.dls_quantize.default) == count(graph, qmir.dls_dequantize.default)
    assert count(graph, qmir.rfa_fake_quant.default) == 3


@pytest.mark.parametrize("capture", CAPTURES)
def test_constants_fold_and_weights_pack(capture: str) -> None:
    graph = before("FoldConstants", prepared(ScanNet, (2, 4, 7), capture))
    assert FoldConstants()(graph).modified
    assert count(graph, aten.exp.default) == count(graph, torch.exp) == 0
    assert count(graph, qmir.rfa_fake_quant.default) == 1
    assert FoldWeights()(graph).modified
    assert count(graph, qmir.rfa_fake_quant.default) == 0
    assert count(graph, qmir.rfa_dequantize.default) == 1


def test_what_depends_on_inputs_is_not_folded() -> None:
    graph = torch.fx.symbolic_trace(lambda x: torch.exp(x) + torch.exp(-x))
    assert FoldConstants().rewrite(graph) == 0


COUNTS = {
    "LowerLinear": ("conv", LowerLinear(), aten.linear.default, qmir.linear.default, 1),
    "LowerConv": ("conv", LowerConv(), aten.conv2d.default, qmir.conv2d.default, 2),
    "LowerScan": (
        "scan",
        LowerScan(),
        qmir.selective_scan.default,
        qmir.selective_scan_q.default,
        1,
    ),
}


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", COUNTS)
def test_operators_become_integer_ones(name: str, capture: str) -> None:
    case, one, old, new, expected = COUNTS[name]
    model, size = CASES[case]
    graph = before(name, prepared(model, size, capture))
    kept = count(graph, old) - expected if old is not qmir.selective_scan.default else 0
    assert one.rewrite(graph) == expected
    graph.graph.eliminate_dead_code()
    assert count(graph, new) == expected
    if name == "LowerConv":
        convolutions = [n for n in graph.graph.nodes if n.target is new]
        assert all(isinstance(n.args[7], Node) for n in convolutions)  # the channel shift
        assert count(graph, aten.sub.Tensor) == 0
    assert count(graph, old) == kept


@pytest.mark.parametrize("name", COUNTS)
def test_float_operators_are_left_alone(name: str) -> None:
    case, one, *_ = COUNTS[name]
    model, size = CASES[case]
    graph = torch.export.export(model().eval(), (torch.rand(size),)).module()
    assert one.rewrite(graph) == 0


@pytest.mark.parametrize("name", COUNTS)
def test_a_changed_constant_is_noticed(name: str) -> None:
    case, one, _, new, _ = COUNTS[name]
    model, size = CASES[case]
    graph = before(name, prepared(model, size, "export"))
    x = torch.rand(size)
    with torch.no_grad():
        want = graph(x)
        one(graph)
        node = next(n for n in graph.graph.nodes if n.target is new)
        node.update_arg(1, node.args[2])  # the step takes the shift's place
        graph.recompile()
        assert not close(graph(x), want)


def test_fake_quantize_operators_are_split() -> None:
    def forward(x: Tensor, w: Tensor, v: Tensor, clamp: bool) -> Tensor:
        return qmir.dls_fake_quant.default(x, w, v, -8, 7, False, False, clamp)

    x, w, v = torch.randn(3, 5, 7), torch.tensor([0, 0.3, 0, 0]), torch.tensor([0, 0.1, 0, 0])
    graph = torch.fx.symbolic_trace(forward, concrete_args={"clamp": False})
    want = graph(x, w, v, False)
    assert DecomposeFakeQuantize().rewrite(graph) == 1
    graph.graph.eliminate_dead_code()
    graph.recompile()
    assert count(graph, qmir.dls_quantize.default) == 1
    assert torch.equal(graph(x, w, v, False), want)
    assert DecomposeFakeQuantize().rewrite(graph) == 0
    clamped = torch.fx.symbolic_trace(forward, concrete_args={"clamp": True})
    assert DecomposeFakeQuantize().rewrite(clamped) == 0


def test_wrong_orders_are_named() -> None:
    check_order(CPU)
    check_order(COMPILE, frozenset({"InlineModules", "FoldConstants"}))
    with pytest.raises(PassOrderError, match="LowerLinear requires FoldWeights"):
        check_order((LowerLinear(), FoldWeights()))
