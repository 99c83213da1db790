"""Channel shifts of activations as biases: what a layer adds for x_hat = value - offset.

A linear layer loses W @ offset, whatever the input. What a convolution loses depends on the place
where it pads zeros, so `qmir::conv2d` takes the offset itself.

Where weight and offset are constants of the graph everything is computed here, in float64; where
they are inputs of it (torch.compile) the same becomes operators.
"""

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
