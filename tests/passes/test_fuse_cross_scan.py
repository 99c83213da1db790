"""Cross scans become one operator, whoever wrote them; near misses stay; trained networks lower."""

import copy

import pytest
import torch
from support.cross_scans import CASES, NEGATIVE, Grouped, Published
from support.graphs import AUTO, calls, captured, run
from support.lowering import check_operators
from support.models import CAPTURES
from support.scans import assert_no_worse
from torch import Tensor
from torch.fx import GraphModule

import qmir_ao
from qmir_ao.passes import cross_scan_proof, pipeline
from qmir_ao.passes.cross_scan import find_cross_scans
from qmir_ao.passes.fuse_cross_scan import FuseCrossScan
from qmir_ao.passes.pipeline import CAPTURE, NORMALIZE, run_passes

captures = pytest.mark.parametrize("capture", CAPTURES)
SIZES = (2, 8, 9, 5)
OTHER_SIZES = [(1, 5, 7, 5), (3, 4, 3, 5), (2, 1, 6, 5)]
MOVED = ("flip", "transpose", "stack")


def block(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return (CASES | NEGATIVE)[name]().eval()


def in_float64(name: str) -> torch.nn.Module:
    net = block(name)
    net.cast = lambda x: x
    return net.double()


def assert_as_accurate(fused: GraphModule, plain: GraphModule, exact: torch.nn.Module) -> None:
    """Fused float32 is as near to float64 as the graph before, at sizes never captured."""
    inputs = [torch.rand(size) for size in OTHER_SIZES]
    assert_no_worse([(run(fused, x), run(plain, x), run(exact, x.double())) for x in inputs])


@captures
@pytest.mark.parametrize("name", CASES)
def test_directions_become_one_operator(name: str, capture: str) -> None:
    plain = captured(block(name), capture, *SIZES)
    fused = copy.deepcopy(plain)
    scans = calls(fused, "selective_scan")
    assert scans == (4 if name == "four scans" else 1)
    assert calls(fused, "flip") > 0
    records = {r.name: r for r in run_passes(fused, CAPTURE)}
    assert records["FuseCrossScan"].changed == 1
    assert records["FuseCrossScan"].operators["flip"] < 0
    assert calls(fused, "ss2d_scan") == 1
    assert calls(fused, "selective_scan", "flip", "stack") == 0
    exact = in_float64(name)
    assert_as_accurate(fused, plain, exact)
    code = fused.code
    assert FuseCrossScan().rewrite(fused) == 0
    assert fused.code == code


@captures
def test_projections_read_the_image_once(capture: str) -> None:
    """A grouped convolution over four copies is one convolution, and no copies are made."""
    graph = captured(block("grouped"), capture, *SIZES)
    run_passes(graph, CAPTURE)
    assert calls(graph, "expand", "cat") == 0
    assert calls(graph, "conv1d") == 1  # the time steps, which differ between the directions


@captures
@pytest.mark.parametrize("name", NEGATIVE)
def test_near_misses_stay(name: str, capture: str) -> None:
    graph = captured(block(name), capture, *SIZES)
    x = torch.rand(2, 5, 7, 5)
    want, counts = run(graph, x), [calls(graph, m) for m in MOVED]
    assert not FuseCrossScan()(graph).modified
    assert calls(graph, "ss2d_scan") == 0
    assert [calls(graph, m) for m in MOVED] == counts
    assert torch.equal(run(graph, x), want)


def test_gradients_stay() -> None:
    plain = captured(in_float64("published"), "trace")
    fused = copy.deepcopy(plain)
    run_passes(fused, CAPTURE)
    x = torch.rand(2, 5, 7, 5, dtype=torch.float64)
    weights = torch.rand(2, 5, 7, 5, dtype=torch.float64)
    found = []
    for graph in (plain, fused):
        given = x.clone().requires_grad_()
        (graph(given) * weights).sum().backward()
        found.append([given.grad, *(p.grad for p in dict(graph.named_parameters()).values())])
    assert len(found[0]) == 12
    for before, after in zip(*found, strict=True):
        assert torch.allclose(before, after, rtol=1e-9, atol=1e-12)


def test_two_blocks_become_two_operators() -> None:
    net = torch.nn.Sequential(block("grouped"), block("vmamba")).eval()
    graph = captured(net, "trace")
    assert FuseCrossScan().rewrite(graph) == 2
    graph.recompile()
    assert torch.allclose(run(graph, x := torch.rand(1, 4, 6, 5)), net(x), atol=1e-6)


def test_a_wrong_fused_form_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof compares with the operator itself: with another one nothing is fused."""
    graph = captured(block("grouped"), "trace")
    assert len(list(find_cross_scans(copy.deepcopy(graph)))) == 1

    def off(*operands: object) -> Tensor:
        return reference(*operands) * (1.0 + 1e-6)

    reference = cross_scan_proof.ss2d_scan_ref
    monkeypatch.setattr(cross_scan_proof, "ss2d_scan_ref", off)
    assert not list(find_cross_scans(graph))


@pytest.mark.parametrize("operands", [(1, 1), (3, 4)], ids=["none", "B and C"])
def test_swapped_operands_are_noticed(operands: tuple[int, int]) -> None:
    graph = captured(block("grouped"), "trace")
    run_passes(graph, CAPTURE)
    node = next(n for n in graph.graph.nodes if n.target is torch.ops.qmir.ss2d_scan.default)
    first, second = operands
    args = list(node.args)
    args[first], args[second] = args[second], args[first]
    node.args = tuple(args)
    graph.recompile()
    x = torch.rand(2, 5, 7, 5)
    assert torch.allclose(run(graph, x), block("grouped")(x), atol=1e-6) == (first == second)


def trained(net: torch.nn.Module, capture: str, activation: str) -> GraphModule:
    by_export = capture == "export"
    prepared = qmir_ao.prepare_qat(
        net.train(),
        qmir_ao.get_qmir_qconfig(4, 4, activation=activation),
        (torch.rand(SIZES),) if by_export else None,
        dynamic_shapes=({0: AUTO, 1: AUTO, 2: AUTO},) if by_export else None,
    )
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-3)
    prepared.train()(torch.rand(2, 6, 7, 5)).square().mean().backward()
    optimizer.step()
    return prepared.eval()


@captures
@pytest.mark.parametrize("case", [Published, Grouped], ids=["published", "grouped"])
def test_trained_blocks_lower_to_integers(case: type, capture: str) -> None:
    torch.manual_seed(0)
    prepared = trained(case(), capture, "dls")
    assert calls(prepared, "ss2d_scan") == 1
    lowered = qmir_ao.convert_and_lower(prepared)
    graph = lowered.graph_module
    assert calls(graph, "ss2d_scan_q") == 1
    assert calls(graph, "flip", "stack", "cat", "einsum", "selective_scan_q", "expand") == 0
    kinds = [r.kind for r in lowered.report.operators]
    assert sorted(kinds) == ["conv2d"] * 3 + ["linear"] * 2 + ["selective_scan"]
    for size in ((2, 5, 9, 5), (1, 7, 3, 5)):
        check_operators(prepared, lowered, torch.rand(size))


@captures
def test_graphs_prepared_elsewhere_are_fused_when_they_are_lowered(
    capture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Static quantizers do to the image what they do to its copies: the same codes."""
    monkeypatch.setattr(pipeline, "CAPTURE", ())
    torch.manual_seed(0)
    prepared = trained(Grouped(), capture, "lsq")
    assert calls(prepared, "selective_scan") == 1
    fused = copy.deepcopy(prepared)
    run_passes(fused, NORMALIZE)
    assert calls(fused, "ss2d_scan") == 1
    x = torch.rand(2, 5, 7, 5)
    want = run(prepared, x)
    assert torch.allclose(run(fused, x), want, atol=1e-6)
    lowered = qmir_ao.convert_and_lower(prepared)
    assert calls(lowered.graph_module, "ss2d_scan_q") == 1
    assert calls(lowered.graph_module, "flip", "stack", "cat", "expand") == 0
    check_operators(prepared, lowered, x)


def test_dynamic_quantizers_of_copies_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """n - 1 in the standard deviation: the step of four copies is not that of the image."""
    monkeypatch.setattr(pipeline, "CAPTURE", ())
    prepared = trained(Grouped(), "trace", "dls")
    before = copy.deepcopy(prepared)
    run_passes(before, NORMALIZE[:2])
    assert FuseCrossScan().rewrite(before) == 0
    lowered = qmir_ao.convert_and_lower(prepared)
    assert calls(lowered.graph_module, "selective_scan_q") == 1
    check_operators(prepared, lowered, torch.rand(2, 5, 7, 5))


def test_settings_by_module_name_reach_fused_operators() -> None:
    from torch.ao.quantization import QConfigMapping

    mapping = QConfigMapping().set_global(qmir_ao.get_qmir_qconfig(4, 4))
    mapping.set_module_name("0", qmir_ao.get_qmir_qconfig(2, 8))
    net = torch.nn.Sequential(block("grouped"), block("grouped"))
    prepared = qmir_ao.prepare_qat(net, mapping)
    prepared(torch.rand(2, 6, 7, 5))
    report = qmir_ao.convert_and_lower(prepared.eval()).report
    bits = {r.module.split(".")[0]: (r.weight_bits, r.act_bits) for r in report.operators}
    weighted = [r for r in report.operators if r.kind != "selective_scan"]
    assert {(r.module.split(".")[0], r.weight_bits, r.act_bits) for r in weighted} == {
        ("0", 2, 8),
        ("1", 4, 4),
    }
    assert bits.keys() == {"0", "1"}


def test_compiled_float_networks_are_fused() -> None:
    seen = []

    def backend(graph_module: GraphModule, _: object) -> object:
        seen.append({r.name: r.changed for r in run_passes(graph_module, pipeline.COMPILE)})
        return graph_module.forward

    torch._dynamo.reset()
    net, x = block("grouped"), torch.rand(2, 5, 7, 5)
    with torch.no_grad():
        got = torch.compile(net, backend=backend)(x)
        assert torch.allclose(got, net(x), atol=1e-6)
    assert seen == [seen[0]]
    assert seen[0]["FuseCrossScan"] == 1
