"""Write an einsum over groups of channels as the grouped convolution that it is."""

import re
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from qmir_ao.capture.recurrence import call_name
from qmir_ao.capture.unroll import emit
from qmir_ao.passes.base import Pass
from qmir_ao.quant.constants import constant_value
from qmir_ao.quant.patterns import arguments, is_constant

aten = torch.ops.aten
_EQUATION = re.compile(r"(\w)(\w)(\w)(\w),(\w)(\w)(\w)->(\w)(\w)(\w)(\w)")


class SwapEinsum(Pass):
    """Replace the projections of published scans, einsums over four groups, by convolutions.

    An einsum has no weight that a quantizer would look for; a convolution of size 1 in groups is
    the same sum, and an ordinary operator with a weight. Preconditions: two operands, the second a
    parameter; batch, group, channel and position in this order, and none of them repeated. Error:
    the products of a result are added in the order that the convolution chooses.

        before: y = einsum("bkdl,kcd->bkcl", x, w)
        after:  y = conv1d(flatten(x, 1, 2), reshape(w, [K*C, D, 1]), groups=K)
                y = unflatten(y, 1, [K, C])
    """

    def rewrite(self, graph_module: GraphModule) -> int:
        """Replace every einsum of this form."""
        changed = 0
        for node in list(graph_module.graph.nodes):
            found = _operands(node)
            if found is None:
                continue
            shape = constant_value(graph_module, found[1]).shape
            _replace(graph_module, node, *found, tuple(int(s) for s in shape))
            changed += 1
        return changed


def _operands(node: Node) -> tuple[Node, Node] | None:
    if call_name(node) != "einsum":
        return None
    equation, *rest = arguments(node)
    given = rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
    if len(given) != 2 or not all(isinstance(n, Node) for n in given):
        return None
    letters = _EQUATION.fullmatch(str(equation).replace(" ", ""))
    x, weight = given
    if letters is None or not is_constant(weight):
        return None
    batch, group, channel, place, of, out, summed, *result = letters.groups()
    fits = (of, summed) == (group, channel) and result == [batch, group, out, place]
    fits = fits and len({batch, group, channel, place, out}) == 5
    return (x, weight) if fits else None


def _replace(
    graph_module: GraphModule, node: Node, x: Node, weight: Node, shape: tuple[int, ...]
) -> None:
    graph = graph_module.graph
    groups, out, channels = shape
    traced = node.target is torch.einsum or node.target is torch.functional.einsum
    target: Any = F.conv1d if traced else aten.conv1d.default

    def call(called: Any, *args: Any) -> Node:
        return emit(graph, called, args, node)

    with graph.inserting_before(node):
        flat = call(aten.reshape.default, weight, [groups * out, channels, 1])
        y = call(aten.flatten.using_ints, x, 1, 2)
        y = call(target, y, flat, None, [1], [0], [1], groups)
        y = call(aten.unflatten.int, y, 1, [groups, out])
    node.replace_all_uses_with(y)
    graph.erase_node(node)
