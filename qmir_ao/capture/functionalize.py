"""Turn in-place operators of a captured graph into pure ones.

Quantizers and passes take it that a node has one value. With `y.mul_(2)` a tensor has one value
before and another one afterwards, and so have all views of it: a quantizer that both readers share
would give one of them the wrong one.
"""

import inspect
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from qmir_ao.errors import CaptureError

aten = torch.ops.aten

_AUGMENTED: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
}
_SAME = (aten.alias.default, aten.detach.default, aten.dropout.default)
_RESHAPES = (
    aten.view.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.unflatten.int,
)
# Views or copies, as the memory happens to be laid out.
_EITHER = "reshape flatten contiguous to float type_as unflatten".split()
_VIEWS = (
    "view transpose permute squeeze unsqueeze t mT select narrow expand expand_as view_as detach "
    "swapaxes movedim getitem getattr split chunk unbind dropout"
).split()
_SAME_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


def functionalize(graph_module: GraphModule) -> int:
    """Rewrite every in-place operator, in place.

    Args:
        graph_module: a graph of either capture, in evaluation.

    Returns:
        How many operators were rewritten.

    Raises:
        CaptureError: a result depends on state that the forward changes, or on a view that cannot
            be brought up to date; with the node, the module and the line.
    """
    nodes = [n for n in graph_module.graph.nodes if _mutated(graph_module, n) is not None]
    for node in nodes:
        _rewrite(graph_module, node)
    for module in graph_module.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    if nodes:
        graph_module.graph.eliminate_dead_code()
        graph_module.graph.lint()
        graph_module.recompile()
    return len(nodes)


def shows(graph_module: GraphModule) -> bool:
    """Whether anything but the result of an in-place operator sees what it changed."""
    graph = graph_module.graph
    found = ((n, _mutated(graph_module, n)) for n in graph.nodes)
    return any(
        changed is not None and (_later(node, changed) or _stale(graph_module, node, changed))
        for node, changed in found
    )


def _mutated(graph_module: GraphModule, node: Node) -> Node | None:
    """The tensor that a node changes, or None."""
    target: Any = node.target
    changes = False
    if node.op == "call_function":
        if isinstance(target, torch._ops.OpOverload):
            arguments = target._schema.arguments
            first = arguments[0].alias_info if arguments else None
            changes = first is not None and first.is_write
        else:
            changes = target in _AUGMENTED or _inplace_argument(node) is not None
    elif node.op == "call_method":
        changes = target.endswith("_") and not target.endswith("__")
    elif node.op == "call_module":
        changes = getattr(graph_module.get_submodule(target), "inplace", False) is True
    first_argument = node.args[0] if changes and node.args else None
    return first_argument if isinstance(first_argument, Node) else None


def _inplace_argument(node: Node) -> int | str | None:
    """Where a function of torch.nn.functional was told to work in place."""
    if node.kwargs.get("inplace") is True:
        return "inplace"
    if getattr(F, getattr(node.target, "__name__", ""), None) is not node.target:
        return None
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    at = names.index("inplace") if "inplace" in names else len(node.args)
    return at if at < len(node.args) and node.args[at] is True else None


def _source(graph_module: GraphModule, node: Node) -> Node | None:
    """The tensor that a node is a view of, or None."""
    if not node.args or not isinstance(node.args[0], Node):
        return None
    target: Any = node.target
    shares = False
    if node.op == "call_function" and isinstance(target, torch._ops.OpOverload):
        arguments, returns = target._schema.arguments, target._schema.returns
        shares = target in _SAME or (
            bool(arguments and returns)
            and arguments[0].alias_info is not None
            and returns[0].alias_info is not None
        )
    elif node.op == "call_module":
        shares = isinstance(graph_module.get_submodule(target), _SAME_MODULES)
    elif node.op in ("call_function", "call_method"):
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        shares = name in _VIEWS or name in _EITHER
    return node.args[0] if shares else None


def _chain(graph_module: GraphModule, node: Node) -> list[Node]:
    """The node and what it is a view of, down to the tensor that owns the memory."""
    chain = [node]
    while (source := _source(graph_module, chain[-1])) is not None:
        chain.append(source)
    return chain


def _later(node: Node, changed: Node) -> list[Node]:
    """Readers of the changed tensor itself that come after the change."""
    return [user for user in changed.users if node < user]


def _stale(graph_module: GraphModule, node: Node, changed: Node) -> list[Node]:
    """Other names of the same memory that are read after the change."""
    root = _chain(graph_module, changed)[-1]
    aliases: dict[Node, None] = {root: None}
    for other in graph_module.graph.nodes:
        if other is node:
            break
        if _source(graph_module, other) in aliases:
            aliases[other] = None
    return [a for a in aliases if a is not changed and any(node < user for user in a.users)]


def _rewrite(graph_module: GraphModule, node: Node) -> None:
    changed = _mutated(graph_module, node)
    assert changed is not None
    graph, root = graph_module.graph, _chain(graph_module, changed)[-1]
    if root.op == "get_attr":
        _check_state(node, root)
    stale = _stale(graph_module, node, changed)
    with graph.inserting_before(node):
        new = _pure(graph_module, node)
        new.meta = dict(node.meta)
        updates = {changed: new} | dict(_updated(graph_module, node, changed, new, stale))
    for old, current in updates.items():
        for user in [u for u in old.users if node < u]:
            user.replace_input_with(old, current)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _pure(graph_module: GraphModule, node: Node) -> Node:
    """The same arithmetic with a result of its own."""
    graph, target = graph_module.graph, node.target
    if node.op == "call_module":
        return graph.call_module(str(target), node.args, node.kwargs)
    if node.op == "call_method":
        name = str(target)[:-1]
        if not hasattr(Tensor, name):
            raise _refuse(node, f"{target}() has no form that works out of place")
        return graph.call_method(name, node.args, node.kwargs)
    if target in (aten.copy_.default, aten.zero_.default):  # aten.copy has no derivative
        value = graph.call_function(aten.zeros_like.default, node.args[:1])
        if target is aten.copy_.default:
            value = graph.call_function(aten.add.Tensor, (value, node.args[1]))
        return value
    if isinstance(target, torch._ops.OpOverload):
        packet = getattr(getattr(torch.ops, target.namespace), target._opname.rstrip("_"), None)
        functional = getattr(packet, target._overloadname or "default", None)
        if functional is None:
            raise _refuse(node, f"{target} has no form that works out of place")
        return graph.call_function(functional, node.args, node.kwargs)
    if target in _AUGMENTED:
        return graph.call_function(_AUGMENTED[target], node.args, node.kwargs)
    at, args, kwargs = _inplace_argument(node), list(node.args), dict(node.kwargs)
    if isinstance(at, int):
        args[at] = False
    else:
        kwargs["inplace"] = False
    assert callable(target)
    return graph.call_function(target, tuple(args), kwargs)


def _updated(
    graph_module: GraphModule, node: Node, changed: Node, new: Node, stale: list[Node]
) -> Iterator[tuple[Node, Node]]:
    """Current values of the other names of the memory that `node` changes."""
    if not stale:
        return
    chain = _chain(graph_module, changed)
    values = {changed: new}
    for view, base in itertools.pairwise(chain):
        values[base] = _put_back(graph_module.graph, node, view, base, values[view])
    for alias in stale:
        for step in reversed(_chain(graph_module, alias)):
            if step not in values:
                source: Any = step.args[0]
                if _name(step) in _EITHER:
                    raise _refuse(node, f"{step.name} may share its memory, or not")
                values[step] = graph_module.graph.node_copy(
                    step, lambda n, source=source: values[source] if n is source else n
                )
        yield alias, values[alias]


def _name(node: Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._opname)
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))


def _put_back(graph: Graph, node: Node, view: Node, base: Node, value: Node) -> Node:
    """The tensor `base` after its view `view` took the values `value`."""
    call: Callable[..., Node] = graph.call_function
    target, rest = view.target, view.args[1:]
    if target in _SAME:
        made = value
    elif target is aten.slice.Tensor:
        made = call(aten.slice_scatter.default, (base, value, *rest))
    elif target is aten.select.int:
        made = call(aten.select_scatter.default, (base, value, *rest))
    elif target is aten.transpose.int:
        made = call(target, (value, *rest))
    elif target is aten.permute.default:
        order: Any = rest[0]
        back = sorted(range(len(order)), key=lambda i: order[i] % len(order))
        made = call(target, (value, back))
    elif target in _RESHAPES:
        made = call(aten.view_as.default, (value, base))
    else:
        raise _refuse(node, f"{view.name} is a view that cannot be written through")
    if made is not value:
        made.meta = dict(base.meta)
    return made


def _check_state(node: Node, root: Node) -> None:
    """Refuse a change of a buffer or parameter that any result depends on."""
    seen: set[Node] = set()
    todo = [root]
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                raise _refuse(
                    node,
                    f"the forward changes {root.target!r}, which its result depends on; a captured "
                    "network keeps no state from one call to the next",
                )
            if user not in seen:
                seen.add(user)
                todo.append(user)


def _refuse(node: Node, reason: str) -> CaptureError:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((e[0] if isinstance(e, tuple) else e for e in reversed(stack.values())), "")
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    places = [line.strip() for line in trace if line.strip().startswith("File ")]
    where = (f" in module {path!r}" if path else "") + (f" at {places[-1]}" if places else "")
    return CaptureError(
        f"node {node.name} ({node.target}) works in place{where}: {reason}. Write it out of place, "
        "such as x = x + y instead of x += y"
    )
