"""FuseDlsStatistics: one operator for each quantizer, to the byte; what it must leave alone."""

import pytest
import torch
from support.chains import QUANTIZERS, before, count, prepared, run
from support.models import CAPTURES
from torch import Tensor
from torch.fx import GraphModule, symbolic_trace

import qmir_ao
from qmir_ao.errors import NonFiniteError
from qmir_ao.passes.fuse_dls_statistics import FuseDlsStatistics
from qmir_ao.passes.lower import SOURCE

aten, qmir = torch.ops.aten, torch.ops.qmir
PARTS = (qmir.dls_qparams.default, qmir.dls_quantize.default, aten.flatten.using_ints)
FUSED = qmir.chain_quantize.default
SIZES = [(1, 3, 9, 11), (3, 3, 8, 5), (2, 3, 1, 1)]


def lowered(capture: str) -> GraphModule:
    return before("FuseDlsStatistics", prepared(capture))


@pytest.mark.parametrize("capture", CAPTURES)
def test_every_quantizer_becomes_one_operator(capture: str) -> None:
    graph = lowered(capture)
    shifts = [n for n in graph.graph.nodes if n.target is aten.add.Tensor and SOURCE in n.meta]
    assert count(graph, *PARTS[:2]) == 2 * QUANTIZERS
    assert len(shifts) == QUANTIZERS
    inputs = [torch.rand(size) for size in SIZES]
    want = [run(graph, x) for x in inputs]
    result = FuseDlsStatistics()(graph)
    assert result.modified
    assert count(graph, *PARTS) == 0
    assert count(graph, FUSED) == QUANTIZERS
    assert not [n for n in graph.graph.nodes if n.target is aten.add.Tensor and SOURCE in n.meta]
    for x, y in zip(inputs, want, strict=True):
        assert torch.equal(run(graph, x), y)
    assert FuseDlsStatistics().rewrite(graph) == 0


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("at", range(QUANTIZERS))
def test_a_changed_shift_is_noticed(at: int, capture: str) -> None:
    graph = lowered(capture)
    x = torch.rand(SIZES[0])
    want = run(graph, x)
    FuseDlsStatistics()(graph)
    node = [n for n in graph.graph.nodes if n.target is FUSED][at]
    offset = graph.get_buffer(node.args[7].target)
    offset += 0.5 * torch.arange(offset.numel()).reshape(offset.shape)
    assert not torch.equal(run(graph, x), want)


def quantizer(x: Tensor, w: Tensor, v: Tensor, other: str) -> tuple[Tensor, ...]:
    predicted = qmir.dls_qparams.default(x, w, v, -8, 7, False, False)
    step, shift = predicted[0], predicted[1]
    source = x * 2 if other == "another tensor" else x
    codes = qmir.dls_quantize.default(source, step, shift, -8, 3 if other == "range" else 7)
    more = qmir.dls_quantize.default(x, step, shift, -8, 7) if other == "two" else step
    return codes, step, shift, more


W, V = torch.tensor([0.1, 0.3, -0.02, 0.05]), torch.tensor([-1.0, 0.1, 0.02, -0.03])


@pytest.mark.parametrize("other", ["", "another tensor", "range", "two"])
def test_only_codes_of_the_same_tensor_and_range_are_fused(other: str) -> None:
    graph = symbolic_trace(quantizer, concrete_args={"other": other})
    x = torch.randn(3, 5, 7)
    want = graph(x, W, V, other)
    assert FuseDlsStatistics().rewrite(graph) == int(other == "")
    graph.recompile()
    assert all(torch.equal(a, b) for a, b in zip(graph(x, W, V, other), want, strict=True))


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_shifted_tensor_that_is_read_elsewhere_stays(capture: str) -> None:
    graph = lowered(capture)
    node = next(n for n in graph.graph.nodes if n.target is aten.add.Tensor and SOURCE in n.meta)
    output = next(n for n in graph.graph.nodes if n.op == "output")
    with graph.graph.inserting_before(output):
        extra = graph.graph.call_function(aten.mean.default, (node,))
        total = graph.graph.call_function(aten.add.Tensor, (output.all_input_nodes[0], extra))
    output.replace_input_with(output.all_input_nodes[0], total)
    graph.recompile()
    x = torch.rand(SIZES[1])
    want = run(graph, x)
    assert FuseDlsStatistics().rewrite(graph) == QUANTIZERS
    graph.recompile()
    assert node in graph.graph.nodes and node.target is aten.add.Tensor
    assert torch.equal(run(graph, x), want)


def test_a_training_graph_is_left_alone() -> None:
    for capture in CAPTURES:
        assert FuseDlsStatistics().rewrite(prepared(capture)) == 0


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_bad_input_raises_the_same_error(capture: str) -> None:
    plain, fused = lowered(capture), lowered(capture)
    FuseDlsStatistics()(fused)
    x = torch.rand(3, 3, 9, 11)
    x[0, 1, 2, 3] = float("nan")
    messages = []
    for graph in (plain, fused):
        with pytest.raises(NonFiniteError) as error:
            run(graph, x)
        messages.append(str(error.value).partition(": ")[2])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("capture", CAPTURES)
def test_the_lowered_network_reports_what_it_did_before(capture: str) -> None:
    report = qmir_ao.convert_and_lower(prepared(capture)).report
    assert len(report.operators) == QUANTIZERS
    ops = [record.op for record in report.left_in_float]
    counts = {"layer_norm": 3, "silu": 2, "gelu": 1, "mul": 1, "conv2d": 2, "add": QUANTIZERS + 2}
    assert {op: ops.count(op) for op in set(ops)} == counts
    modules = {record.op: record.module for record in report.left_in_float}
    assert modules["layer_norm"] in ("ln_1", "ln_2", "out_norm")
    assert all(record.reason for record in report.left_in_float)
