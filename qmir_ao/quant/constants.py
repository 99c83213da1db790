"""Values of graph nodes that depend on parameters only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


def attribute(graph_module: GraphModule, target: str) -> Any:
    """Value of a dotted attribute path."""
    value: Any = graph_module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def constant_value(graph_module: GraphModule, node: Node) -> Any:
    """Evaluate a node of which `patterns.is_constant` holds; modules on the way are called."""
    known: dict[Node, Any] = {}
    with torch.no_grad():
        for step in _in_order(node):
            known[step] = _evaluate(graph_module, step, known)
    return known[node]


def _in_order(node: Node) -> list[Node]:
    needed = {node}
    todo = [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                todo.append(source)
    return [n for n in node.graph.nodes if n in needed]


def _evaluate(graph_module: GraphModule, node: Node, known: dict[Node, Any]) -> Any:
    if node.op == "get_attr":
        return attribute(graph_module, str(node.target))
    args = torch.fx.node.map_arg(node.args, lambda n: known[n])
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: known[n])
    if node.op == "call_module":
        return graph_module.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def register_constant(graph_module: GraphModule, name: str, value: Tensor) -> str:
    """Register `value` as a buffer under a free name derived from `name`; return that name."""
    base = name.replace(".", "_")
    free, index = base, 0
    while hasattr(graph_module, free):
        index += 1
        free = f"{base}_{index}"
    graph_module.register_buffer(free, value.detach().clone())
    return free


def sizes_of(value: Sequence[int] | int, rank: int) -> list[int]:
    """A stride, padding or dilation given as a number or a sequence, as a list of `rank`."""
    return [int(value)] * rank if isinstance(value, int) else [int(v) for v in value]
