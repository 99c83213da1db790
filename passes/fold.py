"""Evaluate offline what depends on parameters only; weights end as packed integers."""

import torch
from torch.fx import GraphModule, Node

import qmir_ao.ops.rfa  # noqa: F401  (defines the operators named below)
from qmir_ao.ops.pack import pack
from qmir_ao.passes.base import Pass
from qmir_ao.quant.constants import attribute, constant_value, register_constant
from qmir_ao.quant.patterns import arguments
from qmir_ao.quant.spec import container_bits

qmir = torch.ops.qmir

_WEIGHTS = (qmir.rfa_fake_quant.default, qmir.rfa_dequantize.default)


def _foldable(node: Node, known: dict[Node, bool]) -> bool:
    """Constant, and not a quantized weight: those keep their integers."""
    if node not in known:
        if node.op == "get_attr":
            known[node] = True
        elif node.op != "call_function" and node.op != "call_method":
            known[node] = False
        else:
            inputs = node.all_input_nodes
            known[node] = (
                bool(inputs)
                and node.target not in _WEIGHTS
                and all(_foldable(i, known) for i in inputs)
            )
    return known[node]


class FoldConstants(Pass):
    """Replace operators on parameters by their value: -exp(A_log), reshaped weights, A and D.

    The scan operands A, D and delta bias, fake-quantized in training, become plain constants on
    their grid here. Exact.

        before: a = neg(exp(get_attr[A_logs]))    after: a = get_attr[_folded_a]
    """

    requires = ("ConvertQuantizers",)
    ensures = ("constants_are_folded",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Fold every maximal constant subgraph."""
        changed = 0
        known: dict[Node, bool] = {}
        for node in list(graph_module.graph.nodes):
            value = _to_fold(graph_module, node, known)
            if value is None:
                continue
            name = register_constant(graph_module, f"_folded_{node.name}", value)
            with graph_module.graph.inserting_before(node):
                new = graph_module.graph.get_attr(name)
            new.meta = dict(node.meta)
            known[new] = True
            node.replace_all_uses_with(new)
            changed += 1
        return changed


def _to_fold(graph_module: GraphModule, node: Node, known: dict[Node, bool]) -> torch.Tensor | None:
    """Value of the last node of a constant subgraph, if it is a tensor."""
    if node.op == "get_attr" or not node.users or not _foldable(node, known):
        return None
    if all(_foldable(user, known) for user in node.users):
        return None  # a later node folds it along
    value = constant_value(graph_module, node)
    return value if isinstance(value, torch.Tensor) else None


def unfolded(graph_module: GraphModule) -> list[Node]:
    """Operators on parameters that `FoldConstants` would evaluate."""
    known: dict[Node, bool] = {}
    nodes = graph_module.graph.nodes
    return [n for n in nodes if _to_fold(graph_module, n, known) is not None]


class FoldWeights(Pass):
    """Round RFA weights once and keep them as packed integers; no float copy remains.

    A weight that is an input of the graph (torch.compile passes parameters in) is rounded and
    packed when the graph runs. Exact: the levels lie on a uniform grid.

        before: wq = rfa_fake_quant(w, step, shift, thresholds, qmin)
        after:  wq = rfa_dequantize(get_attr[packed], step, shift, size, bits)
    """

    requires = ("FoldConstants",)
    ensures = ("weights_are_packed",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Fold every RFA fake-quantize operator."""
        changed = 0
        for node in list(graph_module.graph.nodes):
            if node.target is not qmir.rfa_fake_quant.default:
                continue
            sources = arguments(node)[:4]
            with graph_module.graph.inserting_before(node):
                if all(isinstance(s, Node) and s.op == "get_attr" for s in sources):
                    new: Node | None = _fold_weight(graph_module, node)
                else:
                    new = _round_at_run_time(graph_module, node)
            if new is None:
                continue
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            changed += 1
        return changed


def _bits(levels: int) -> int:
    return container_bits(max(levels - 1, 1).bit_length())


def _fold_weight(graph_module: GraphModule, node: Node) -> Node:
    w, step, shift, thresholds = (
        attribute(graph_module, str(a.target)) for a in arguments(node)[:4]
    )
    with torch.no_grad():
        codes = qmir.rfa_quantize(w, step, shift, thresholds, arguments(node)[4])
        bits = _bits(thresholds.numel())
        packed = pack(codes, bits)
    graph = graph_module.graph
    constants = [
        graph.get_attr(register_constant(graph_module, f"{node.name}_{suffix}", value))
        for suffix, value in (("packed", packed), ("step", step), ("shift", shift))
    ]
    return graph.call_function(qmir.rfa_dequantize.default, (*constants, list(w.shape), bits))


def _round_at_run_time(graph_module: GraphModule, node: Node) -> Node | None:
    w, step, shift, thresholds, quant_min = arguments(node)
    weight, levels = (a.meta.get("val", a.meta.get("example_value")) for a in (w, thresholds))
    if weight is None or levels is None:
        return None
    bits = _bits(levels.numel())
    graph = graph_module.graph
    codes = graph.call_function(qmir.rfa_quantize.default, (w, step, shift, thresholds, quant_min))
    packed = graph.call_function(qmir.pack.default, (codes, bits))
    size = [int(s) for s in weight.shape]
    return graph.call_function(qmir.rfa_dequantize.default, (packed, step, shift, size, bits))
