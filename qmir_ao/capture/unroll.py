"""Write a `torch` scan operator out step by step, where nothing better can be done with it."""

from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import Graph, GraphModule, Node

from qmir_ao.errors import CaptureError

aten = torch.ops.aten


def emit(
    graph: Graph,
    target: Any,
    args: tuple[Any, ...],
    like: Node,
    kwargs: dict[str, Any] | None = None,
) -> Node:
    """Add a call at the insertion point, with its shape and the origin of `like`."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {k: v for k, v in like.meta.items() if k not in ("val", "example_value")}
    known: list[Any] = []

    def value(n: Node) -> Any:
        known.append(n.meta.get("val"))
        return known[-1]

    given: Any = torch.fx.node.map_arg((args, kwargs or {}), value)
    mode = detect_fake_mode([v for v in known if isinstance(v, Tensor)])
    # The call of a quantizer has no recorded value, and what reads it gets none either.
    if mode is not None and all(v is not None for v in known):
        with mode:
            node.meta["val"] = target(*given[0], **given[1])
    return node


def unroll_scan(graph_module: GraphModule, node: Node) -> list[Node]:
    """Replace a scan operator by its body, once for each step.

    Returns:
        The copies of the nodes of the body.

    Raises:
        CaptureError: the number of steps is dynamic.
    """
    arguments: Any = node.args
    body_node, init, xs, more = arguments
    length = xs[0].meta["val"].shape[0]
    if not isinstance(length, int):
        raise CaptureError(
            f"node {node.name} is a scan of a dynamic number of steps that is no selective scan; "
            "pass dynamic_shapes that fix the dimension it runs over"
        )
    graph, body = graph_module.graph, getattr(graph_module, str(body_node.target))
    copies: list[Node] = []
    states, rows = list(init), []
    with graph.inserting_before(node):
        for i in range(length):
            steps = [emit(graph, aten.select.int, (x, 0, i), node) for x in xs]
            results = _inline(graph, body, [*states, *steps, *more], node, copies)
            states = results[: len(init)]
            rows.append(results[len(init) :])
        stacked = [
            emit(graph, aten.stack.default, (list(r),), node) for r in zip(*rows, strict=True)
        ]
    outputs = [*states, *stacked]
    for user in list(node.users):
        position: Any = user.args[1]
        user.replace_all_uses_with(outputs[position])
        graph.erase_node(user)
    graph.erase_node(node)
    return copies


def _inline(
    graph: Graph, body: GraphModule, given: list[Any], like: Node, copies: list[Node]
) -> list[Any]:
    known: dict[Node, Any] = {}
    inputs = iter(given)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(inputs)
        elif node.op == "output":
            return [known[n] for n in node.args[0]]
        elif node.op == "call_function":
            args, kwargs = (
                torch.fx.node.map_arg(a, lambda n: known[n]) for a in (node.args, node.kwargs)
            )
            known[node] = emit(graph, node.target, args, like, kwargs)
            copies.append(known[node])
        else:
            raise CaptureError(
                f"node {like.name} is a scan whose body reads {node.target!r}; give it to the scan "
                "as an operand"
            )
    return []
