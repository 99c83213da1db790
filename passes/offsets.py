"""Channel shifts of activations as biases: what a layer adds for x_hat = value - offset.

A linear layer loses W @ offset, whatever the input; so does a convolution without padding. With
zero padding the loss depends on the place: `qmir::conv2d_offset`.

Where weight and offset are constants of the graph everything is computed here, in float64; where
they are inputs of it (torch.compile) the same becomes operators.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.quant.constants import constant_value, register_constant
from qmir_ao.quant.patterns import is_constant

aten = torch.ops.aten


def _known(graph_module: GraphModule, *nodes: Any) -> list[Tensor | None] | None:
    """Values in float64, None for an absent operand; None where one is an input of the graph."""
    if not all(node is None or is_constant(node) for node in nodes):
        return None
    return [None if n is None else constant_value(graph_module, n).double() for n in nodes]


def _constant(graph_module: GraphModule, name: str, value: Tensor) -> Node:
    return graph_module.graph.get_attr(register_constant(graph_module, name, value.float()))


def linear_bias(graph_module: GraphModule, bias: Any, offset: Node, weight: Node) -> Node:
    """Bias of a linear layer without the offset of its input."""
    known = _known(graph_module, bias, offset, weight)
    if known is not None:
        b, o, w = known
        assert o is not None and w is not None
        lost = w @ o.reshape(-1).expand(w.shape[1])
        return _constant(graph_module, "_qmir_bias", -lost if b is None else b - lost)
    graph = graph_module.graph
    flat = graph.call_function(aten.reshape.default, (offset, [-1]))
    lost_node = graph.call_function(aten.linear.default, (flat, weight))
    if bias is None:
        return graph.call_function(aten.neg.default, (lost_node,))
    return graph.call_function(aten.sub.Tensor, (bias, lost_node))


def conv_bias(
    graph_module: GraphModule,
    bias: Any,
    offset: Node,
    weight: Node,
    size: Sequence[int],
    groups: int,
) -> Node:
    """Bias of a convolution without padding and without the offset of its input."""
    known = _known(graph_module, bias, offset, weight)
    split, shape = [groups, size[0] // groups, size[1], -1], [groups, 1, size[1], 1]
    if known is not None:
        b, o, w = known
        assert o is not None and w is not None
        spread = o.reshape(-1).expand(groups * size[1]).reshape(shape)
        lost = (w.reshape(split) * spread).sum((2, 3)).reshape(-1)
        return _constant(graph_module, "_qmir_bias", -lost if b is None else b - lost)
    graph = graph_module.graph
    spread_node = graph.call_function(aten.reshape.default, (offset, shape))
    grouped = graph.call_function(aten.reshape.default, (weight, split))
    product = graph.call_function(aten.mul.Tensor, (grouped, spread_node))
    summed = graph.call_function(aten.sum.dim_IntList, (product, [2, 3]))
    lost_node = graph.call_function(aten.reshape.default, (summed, [-1]))
    if bias is None:
        return graph.call_function(aten.neg.default, (lost_node,))
    return graph.call_function(aten.sub.Tensor, (bias, lost_node))
