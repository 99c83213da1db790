"""What must hold of a graph between passes."""

from torch import Tensor
from torch.fx import GraphModule

from qmir_ao.errors import PassOrderError
from qmir_ao.quant.constants import attribute


def check_invariants(graph_module: GraphModule, after: str) -> None:
    """Raise `PassOrderError` if a pass left a malformed graph.

    Checks that nodes are in order (lint), that every attribute exists and is a tensor, and that
    exactly one output exists.
    """
    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        raise PassOrderError(f"graph is malformed after {after}: {error}") from error
    outputs = [n for n in graph_module.graph.nodes if n.op == "output"]
    if len(outputs) != 1:
        raise PassOrderError(f"graph has {len(outputs)} outputs after {after}, expected 1")
    for node in graph_module.graph.nodes:
        if node.op != "get_attr":
            continue
        try:
            value = attribute(graph_module, str(node.target))
        except AttributeError as error:
            raise PassOrderError(
                f"node {node.name} reads {node.target!r}, which {after} removed"
            ) from error
        if not isinstance(value, Tensor):
            raise PassOrderError(
                f"node {node.name} reads {node.target!r}, a {type(value).__name__} after {after}"
            )
