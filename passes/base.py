"""What a pass is: a named rewrite of a graph with stated needs and effects."""

import abc
from collections.abc import Sequence
from typing import ClassVar

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from qmir_ao.capture.recurrence import call_name

_WRITERS = frozenset({"setitem", "iadd", "isub", "imul", "itruediv"})
_INPLACE_SECOND = frozenset({"relu", "relu6", "silu", "hardtanh", "hardswish"})


def writes(node: Node) -> bool:
    """Whether an operator writes into one of its inputs."""
    if node.op not in ("call_function", "call_method"):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = call_name(node)
    if node.kwargs.get("inplace") or (name in _INPLACE_SECOND and True in node.args[1:2]):
        return True
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITERS


def writes_near(nodes: Sequence[Node]) -> bool:
    """Whether one of these operators writes, or one writes into a result of theirs."""
    return any(writes(n) or any(writes(user) for user in n.users) for n in nodes)


def remove_unread(graph_module: GraphModule) -> int:
    """Erase operators whose results nothing reads and that write nothing; returns how many."""
    before = len(graph_module.graph.nodes)
    # FX takes a method such as `clamp_` for pure.
    graph_module.graph.eliminate_dead_code(lambda n: n.is_impure() or writes(n))
    return before - len(graph_module.graph.nodes)


class Pass(abc.ABC):
    """One rewrite of a graph.

    Attributes:
        requires: names of passes that must have run before this one.
        ensures: names of invariants (`passes/invariants.py`) that hold once this pass ran, and
            until the end of its list; they are checked after it and after every later pass.
        breaks: names of invariants that earlier passes ensured and that this one may undo.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()
    breaks: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """Name in reports and in other passes' `requires`: the class name."""
        return type(self).__name__

    @abc.abstractmethod
    def rewrite(self, graph_module: GraphModule) -> int:
        """Rewrite in place; return how many places changed."""

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Rewrite, clean up and check the graph where something changed."""
        changed = self.rewrite(graph_module)
        if changed:
            remove_unread(graph_module)
            graph_module.graph.lint()
            graph_module.recompile()
        return PassResult(graph_module, changed > 0)
