"""Put what a module's forward does in the place of its call."""

from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer

from qmir_ao.quant.prepare import is_fake_quantize


class _Inside(Tracer):  # type: ignore[misc]
    """Traces through every module but fake-quantizers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_fake_quantize(m)


class _Call1(nn.Module):
    """A call with the positional arguments of a node alone: the others keep their defaults."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, a: Any) -> Any:
        return self.module(a)


class _Call2(_Call1):
    def forward(self, a: Any, b: Any) -> Any:  # type: ignore[override]
        return self.module(a, b)


def _trace(module: nn.Module, arguments: int) -> Graph | None:
    try:
        graph: Graph = _Inside().trace((_Call1, _Call2)[arguments - 1](module))
    except Exception:  # the forward of a module may do anything, control flow on values included
        return None
    return graph


def inline_forward(graph_module: GraphModule, node: Node, module: nn.Module) -> Any:
    """The result of the forward of the module that `node` calls, emitted at the insertion point.

    Args:
        graph_module: the graph.
        node: a `call_module` node.
        module: what it calls.

    Returns:
        The node, or None where the forward cannot be traced or gives more than one tensor.
    """
    if node.kwargs or not 1 <= len(node.args) <= 2:
        return None
    inner = _trace(module, len(node.args))
    results = [] if inner is None else [n.args[0] for n in inner.nodes if n.op == "output"]
    if inner is None or not isinstance(results[0], Node):
        return None
    known: dict[Node, Any] = {}
    given = iter(node.args)
    for step in inner.nodes:
        if step.op == "placeholder":
            known[step] = next(given)
        elif step.op != "output":
            copied = graph_module.graph.node_copy(step, lambda n: known[n])
            copied.meta = dict(node.meta) | {"qmir_module": str(node.target)}
            if step.op in ("get_attr", "call_module"):
                copied.target = f"{node.target}.{str(step.target).removeprefix('module.')}"
            known[step] = copied
    return known[results[0]]
