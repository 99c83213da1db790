"""Every invariant notices what breaks it, and runs of passes check what passes ensure."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.models import ConvNet, ScanNet
from torch import nn
from torch.fx import GraphModule

import qmir_ao
from qmir_ao.errors import PassOrderError
from qmir_ao.passes.base import Pass
from qmir_ao.passes.convert_quantizers import ConvertQuantizers
from qmir_ao.passes.invariants import ALWAYS, INVARIANTS, check_invariants
from qmir_ao.passes.pipeline import CAPTURE, COMPILE, CPU, NORMALIZE, check_order, run_passes
from qmir_ao.passes.record import summarize

aten, qmir = torch.ops.aten, torch.ops.qmir


def lowered(net: nn.Module, *size: int) -> GraphModule:
    torch.manual_seed(0)
    prepared = qmir_ao.prepare_qat(net, qmir_ao.qmir_qconfig)
    prepared(torch.rand(size))
    return qmir_ao.convert_and_lower(prepared.eval()).graph_module


@pytest.fixture(scope="module")
def graphs() -> dict[str, GraphModule]:
    return {"conv": lowered(ConvNet(), 2, 3, 9, 10), "scan": lowered(ScanNet(), 2, 4, 7)}


def first(graph: GraphModule, target: object) -> torch.fx.Node:
    return next(n for n in graph.graph.nodes if n.target is target)


def float_operand(graph: GraphModule) -> None:
    node = first(graph, qmir.conv2d.default)
    node.update_arg(0, node.args[0].args[0])


def wide_weights(graph: GraphModule) -> None:
    name = str(first(graph, qmir.conv2d.default).args[3].target)
    setattr(graph, name, getattr(graph, name).float())


def float_scan_operand(graph: GraphModule) -> None:
    node = first(graph, qmir.selective_scan_q.default)
    node.update_arg(7, node.args[7].args[0])


def missing_attribute(graph: GraphModule) -> None:
    name = next(str(n.target) for n in graph.graph.nodes if n.op == "get_attr")
    delattr(graph, name)


def second_output(graph: GraphModule) -> None:
    graph.graph.create_node("output", "output", (first(graph, qmir.linear.default),))


def unread(graph: GraphModule) -> None:
    node = first(graph, qmir.linear.default)
    with graph.graph.inserting_after(node):
        graph.graph.call_function(aten.exp.default, (node,))


def identity(graph: GraphModule) -> None:
    node = first(graph, qmir.linear.default)
    with graph.graph.inserting_after(node):
        new = graph.graph.call_function(aten.alias.default, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda n: n is not new)


def second_quantizer(graph: GraphModule) -> None:
    node = first(graph, qmir.chain_quantize.default)
    reader = next(iter(node.users))
    with graph.graph.inserting_after(node):
        reader.replace_input_with(node, graph.graph.node_copy(node))


def second_constant(graph: GraphModule) -> None:
    node = next(n for n in graph.graph.nodes if n.op == "get_attr")
    graph.register_buffer("again", getattr(graph, str(node.target)).clone())
    with graph.graph.inserting_after(node):
        new = graph.graph.get_attr("again")
    next(iter(node.users)).replace_input_with(node, new)


def computed_constant(graph: GraphModule) -> None:
    node = first(graph, qmir.linear.default)
    bias = node.args[6]
    with graph.graph.inserting_before(node):
        node.update_arg(6, graph.graph.call_function(aten.neg.default, (bias,)))


def functional(graph: GraphModule) -> None:
    node = next(n for n in graph.graph.nodes if n.target is aten.conv2d.default)
    node.target = nn.functional.conv2d


def float_weight(graph: GraphModule) -> None:
    node = first(graph, qmir.linear.default)
    weight = [f"extra_{i}" for i in range(4)]
    for name, shape in zip(weight, [(8, 8), (1,), (1,), (4,)], strict=True):
        graph.register_buffer(name, torch.rand(shape))
    with graph.graph.inserting_before(node):
        values = [graph.graph.get_attr(name) for name in weight]
        graph.graph.call_function(qmir.rfa_fake_quant.default, (*values, -2))


def quantizer_module(graph: GraphModule) -> None:
    graph.add_submodule("left", qmir_ao.DLSFakeQuantize(4))
    node = first(graph, qmir.linear.default)
    with graph.graph.inserting_after(node):
        graph.graph.call_module("left", (node,))


BROKEN: dict[str, tuple[str, Callable[[GraphModule], None], str]] = {
    "integers_get_codes": ("conv", float_operand, "not from codes"),
    "packed types": ("conv", wide_weights, "packed weights of type torch.float32"),
    "scan operands": ("scan", float_scan_operand, "operand 7 from"),
    "attributes_are_tensors": ("conv", missing_attribute, "which was removed"),
    "nodes_in_order": ("conv", second_output, "2 outputs"),
    "everything_is_read": ("conv", unread, "nothing reads"),
    "no_identity_is_left": ("scan", identity, "returns what it gets"),
    "codes_are_made_once": ("conv", second_quantizer, "exist already"),
    "constants_are_held_once": ("conv", second_constant, "another name"),
    "constants_are_folded": ("conv", computed_constant, "computes a constant"),
    "one_vocabulary": ("conv", functional, "of torch.nn.functional"),
    "weights_are_packed": ("conv", float_weight, "keeps a float weight"),
    "quantizers_are_operators": ("conv", quantizer_module, "still calls the fake-quantizer left"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_an_invariant_is_named(name: str, graphs: dict[str, GraphModule]) -> None:
    case, change, message = BROKEN[name]
    graph = copy.deepcopy(graphs[case])
    ensured = [name] if name in INVARIANTS else []
    check_invariants(graph, "ThisPass", ensured)
    change(graph)
    with pytest.raises(PassOrderError, match=message):
        check_invariants(graph, "ThisPass", ensured)


def test_ranks_of_image_scans_are_checked() -> None:
    graph = torch.fx.symbolic_trace(
        lambda u, d, A, B, C: qmir.ss2d_scan.default(u, d, A, B, C, None, None, True)
    )
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for node, rank in zip(inputs, (4, 4, 2, 5, 5), strict=True):
        node.meta["val"] = torch.zeros([1] * rank)
    check_invariants(graph, "FuseCrossScan", ["image_scans_get_images"])
    inputs[3].meta["val"] = torch.zeros([1] * 4)
    with pytest.raises(PassOrderError, match="operand 3 of rank 4, not 5"):
        check_invariants(graph, "FuseCrossScan", ["image_scans_get_images"])


def test_every_invariant_has_a_case_here() -> None:
    assert INVARIANTS.keys() | ALWAYS.keys() <= BROKEN.keys() | {"image_scans_get_images"}


def test_every_list_declares_what_exists() -> None:
    for passes, given in (
        (CAPTURE, frozenset()),
        (NORMALIZE, frozenset()),
        (CPU, frozenset()),
        (COMPILE, frozenset({"InlineModules", "FoldConstants"})),
    ):
        check_order(passes, given)
    ensured = {name for one in CPU for name in one.ensures}
    assert ensured == INVARIANTS.keys()


def test_an_unknown_invariant_is_named() -> None:
    class Hopes(Pass):
        ensures = ("everything_is_well",)

        def rewrite(self, graph_module: GraphModule) -> int:
            return 0

    with pytest.raises(PassOrderError, match="Hopes ensures everything_is_well"):
        check_order((Hopes(),))


class Undo(Pass):
    """Puts a fake-quantizer module back."""

    def rewrite(self, graph_module: GraphModule) -> int:
        quantizer_module(graph_module)
        node = next(n for n in graph_module.graph.nodes if n.target == "left")
        output = next(n for n in graph_module.graph.nodes if n.op == "output")
        output.args = (node,)
        return 1


def test_a_later_pass_may_not_undo_what_was_ensured(graphs: dict[str, GraphModule]) -> None:
    graph = copy.deepcopy(graphs["conv"])
    with pytest.raises(PassOrderError, match="quantizers_are_operators does not hold after Undo"):
        run_passes(graph, (ConvertQuantizers(), Undo()))

    class May(Undo):
        breaks = ("quantizers_are_operators",)

    run_passes(copy.deepcopy(graphs["conv"]), (ConvertQuantizers(), May()))


def test_records_say_what_changed_and_where() -> None:
    class Rename(Pass):
        def rewrite(self, graph_module: GraphModule) -> int:
            node = next(n for n in graph_module.graph.nodes if n.target == "relu")
            node.target = "sigmoid"
            node.meta["qmir_module"] = "layers.0.act"
            return 1

    graph = torch.fx.symbolic_trace(lambda x: (x + 1).relu())
    (record,) = run_passes(graph, (Rename(),))
    assert (record.name, record.changed) == ("Rename", 1)
    assert record.operators == {"relu": -1, "sigmoid": 1}
    assert record.modules == {"layers.0.act": 1}
    assert str(record) == "Rename: 1 places (relu -1, sigmoid +1)\n    in layers.0.act"
    (again,) = run_passes(torch.fx.symbolic_trace(lambda x: x + 1), (ConvertQuantizers(),))
    assert str(again) == "ConvertQuantizers: nothing to change"


def test_modules_that_differ_in_numbers_alone_are_one_line() -> None:
    paths = ["layers.0.a", "layers.1.a", "layers.1.b2", "x3"]
    assert summarize(paths) == {"layers.*.a": 2, "layers.1.b2": 1, "x3": 1}
