"""Replace proven recurrences in a captured graph by `torch.ops.qmir.selective_scan`."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qmir_ao.capture.functionalize import functionalize, shows
from qmir_ao.capture.inputs import check_constants
from qmir_ao.capture.operands import evaluate_constant
from qmir_ao.capture.recurrence import (
    call_name,
    scan_operator,
    state_updates,
    unrolled,
)
from qmir_ao.capture.recurrence_check import Match, prove
from qmir_ao.capture.state import Buffers, check_stateless
from qmir_ao.capture.unroll import emit, unroll_scan
from qmir_ao.ops.selective_scan import selective_scan_op

log = logging.getLogger(__name__)
aten = torch.ops.aten

FLOAT_REASON = "qmir_float_reason"
"""Key of `node.meta`: why an operator is left in float; reports read it."""
_REASON = "a recurrence over time that is no selective scan stays in float"


def fuse_recurrences(graph_module: GraphModule) -> int:
    """Replace every recurrence that is proven to be a selective scan; note the others as float.

    Args:
        graph_module: a graph of either capture, changed in place.

    Returns:
        Number of scans put in.

    Raises:
        CaptureError: a scan operator of dynamic length that is no selective scan.
    """
    count, unrolled_any = 0, False
    for node in list(graph_module.graph.nodes):
        if call_name(node) not in ("stack", "cat", "scan"):
            continue
        candidates = [*unrolled(node), *scan_operator(graph_module, node)]
        match = next((m for c in candidates if (m := prove(graph_module, c))), None)
        if match is not None:
            _replace(graph_module, match)
            count += 1
            continue
        if call_name(node) == "scan":
            left = unroll_scan(graph_module, node)
            unrolled_any = True
        else:
            left = state_updates(node)
        for update in left:
            update.meta[FLOAT_REASON] = _REASON
        if left:
            log.info("%s: %s", node.name, _REASON)
    if count or unrolled_any:
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
    return count


def rewritten_by_trace(
    model: nn.Module, rewrite: Callable[[GraphModule], bool] = lambda _: False
) -> nn.Module:
    """The model as a graph with recurrences replaced and effects of in-place operators written out.

    The model itself where nothing changes.

    Args:
        model: what is traced; where that fails the preparation traces again, and reports it.
        rewrite: further rewriting of the graph in place; returns whether it changed something.

    Raises:
        CaptureError: an in-place operator that cannot be written out, a result that depends on
            state, or a constant on another device.
    """
    from torch.ao.quantization.fx.tracer import QuantizationTracer

    buffers = Buffers(model)
    try:
        traced = GraphModule(model.eval(), QuantizationTracer([], []).trace(model))
    except Exception as reason:
        log.debug("no search for recurrences: %s", reason)
        return model
    check_stateless(traced.graph, buffers)
    check_constants(traced)
    effects = shows(traced)
    if effects:
        functionalize(traced)
    fused = fuse_recurrences(traced) > 0
    return traced if rewrite(traced) or fused or effects else model


def _replace(graph_module: GraphModule, match: Match) -> None:
    found, graph = match.candidate, graph_module.graph

    def moved(node: Node, name: str, order: str) -> Node:
        layout = match.layouts[name]
        perm = [layout.index(letter) for letter in order]
        if perm != sorted(perm):
            node = emit(graph, aten.permute.default, (node, perm), found.root)
        if order.endswith("l") and found.length is not None:
            node = _first_steps(graph_module, node, found.length, found.root)
        return node

    def groups(node: Node, name: str) -> Node:
        if len(match.layouts[name]) == 4:
            return moved(node, name, "bknl")
        return emit(graph, aten.unsqueeze.default, (moved(node, name, "bnl"), 1), found.root)

    with graph.inserting_before(found.root):
        delta, softplus = _before_softplus(found.delta)
        operands = (
            moved(found.u, "u", "bel"),
            moved(delta, "delta", "bel"),
            moved(found.A, "A", "en"),
            groups(found.B, "B"),
            groups(found.C, "C"),
            found.D,
        )
        y = emit(graph, selective_scan_op, (*operands, None, softplus), found.root)
        back = ["bel".index(letter) for letter in match.result]
        if back != sorted(back):
            y = emit(graph, aten.permute.default, (y, back), found.root)
    found.root.replace_all_uses_with(y)


def _first_steps(graph_module: GraphModule, node: Node, length: int, like: Node) -> Node:
    """Cut a sequence to the steps that the loop took, unless it is known to have no more."""
    value = node.meta.get("val")
    if value is None:
        value = evaluate_constant(graph_module, node)
    size = value.shape[-1] if isinstance(value, Tensor) else None
    if isinstance(size, int) and size == length:
        return node
    return emit(graph_module.graph, aten.slice.Tensor, (node, -1, 0, length), like)


def _before_softplus(delta: Node) -> tuple[Node, bool]:
    """What softplus was taken of, if delta is its result.

    The operator takes softplus itself, so that delta is quantized before it.
    """
    arguments = (*delta.args[1:], *delta.kwargs)
    if call_name(delta) != "softplus" or arguments:
        return delta, False
    return delta.all_input_nodes[0], True
