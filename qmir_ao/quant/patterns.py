"""What can be quantized, as data: operator targets of both captures, and their operand roles."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

import qmir_ao.ops.selective_scan
import qmir_ao.ops.ss2d_scan  # noqa: F401  (define the operators named below)

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Pattern:
    """One quantizable operator.

    Attributes:
        kind: name in reports: "linear", "conv" or "selective_scan".
        targets: call targets that mean it, in an exported or a symbolically traced graph.
        modules: module classes that mean it, for the symbolic trace and for `QConfigMapping`.
        activations: positions of the operands that DLS quantizes.
        weight: position of the operand that RFA quantizes, or None.
    """

    kind: str
    targets: tuple[Any, ...]
    modules: tuple[type[nn.Module], ...]
    activations: tuple[int, ...]
    weight: int | None


LINEAR = Pattern("linear", (aten.linear.default, F.linear), (nn.Linear,), (0,), 1)
CONV = Pattern(
    "conv",
    (
        aten.conv2d.default,
        aten.conv1d.default,
        aten.conv2d.padding,
        aten.conv1d.padding,
        F.conv2d,
        F.conv1d,
    ),
    (nn.Conv2d, nn.Conv1d),
    (0,),
    1,
)
SCAN = Pattern(
    "selective_scan",
    (
        torch.ops.qmir.selective_scan.default,
        torch.ops.qmir.selective_scan,
        torch.ops.qmir.ss2d_scan.default,
        torch.ops.qmir.ss2d_scan,
    ),
    (),
    (0, 1, 2, 3, 4, 5, 6),
    None,
)
CONV_1D = (aten.conv1d.default, aten.conv1d.padding, F.conv1d)
PATTERNS = (LINEAR, CONV, SCAN)
_BY_TARGET = {target: p for p in PATTERNS for target in p.targets}

POOLS: tuple[Any, ...] = (
    aten.adaptive_avg_pool2d.default,
    F.adaptive_avg_pool2d,
    nn.AdaptiveAvgPool2d,
)
SHUFFLES: tuple[Any, ...] = (aten.pixel_shuffle.default, F.pixel_shuffle, nn.PixelShuffle)


def module_of(graph_module: GraphModule, node: Node) -> nn.Module | None:
    """The module a `call_module` node calls, or None."""
    if node.op != "call_module":
        return None
    return graph_module.get_submodule(str(node.target))


def match(graph_module: GraphModule, node: Node) -> Pattern | None:
    """The pattern that `node` is an instance of, or None."""
    if node.op == "call_function":
        return _BY_TARGET.get(node.target)
    module = module_of(graph_module, node)
    if module is None:
        return None
    return next((p for p in PATTERNS if p.modules and isinstance(module, p.modules)), None)


def is_one_of(graph_module: GraphModule, node: Node, targets: tuple[Any, ...]) -> bool:
    """Whether `node` calls one of the functions or module classes in `targets`."""
    if node.op == "call_function":
        return node.target in targets
    module = module_of(graph_module, node)
    classes = tuple(t for t in targets if isinstance(t, type))
    return module is not None and isinstance(module, classes)


def arguments(node: Node) -> tuple[Any, ...]:
    """Positional arguments of a node; FX's own type for them is a union nobody can index."""
    return node.args


def operand(node: Node, position: int) -> Node | None:
    """The graph node at an operand position, or None where it is absent or a constant."""
    arg = node.args[position] if position < len(node.args) else None
    return arg if isinstance(arg, Node) else None


def module_path(node: Node) -> str:
    """Dotted path of the module this node came from; "" for the root or where unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else str(entry)
    if node.op == "call_module":
        return str(node.target)
    # Strict exports prefix the path with the name of the traced argument.
    return path.removeprefix("L['self'].").replace("['", ".").replace("']", "")


def module_classes(node: Node) -> list[Any]:
    """Classes of the innermost module of this node, as objects or qualified names."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    return [entries[-1][1]] if entries and isinstance(entries[-1], tuple) else []


def is_constant(node: Node, seen: dict[Node, bool] | None = None) -> bool:
    """Whether a node depends on parameters and buffers only, never on an input."""
    seen = {} if seen is None else seen
    if node not in seen:
        if node.op == "get_attr":
            seen[node] = True
        elif node.op in ("placeholder", "output"):
            seen[node] = False
        else:
            inputs = node.all_input_nodes
            seen[node] = bool(inputs) and all(is_constant(i, seen) for i in inputs)
    return seen[node]


def unquantizable(graph_module: GraphModule, node: Node, pattern: Pattern) -> str | None:
    """Why an operator cannot be quantized, whatever its QConfig says, or None."""
    module = module_of(graph_module, node)
    if module is not None and type(module) not in pattern.modules:
        return f"its module is a {type(module).__name__}; capture with example_inputs"
    mode = getattr(module, "padding_mode", "zeros")
    if mode != "zeros":
        return f"the module pads by {mode!r} before it convolves; capture with example_inputs"
    if module is None and pattern.weight is not None:
        if {"input", "weight"} & node.kwargs.keys():
            return "its operands are passed by name; pass them by position"
        weight = operand(node, pattern.weight)
        if weight is None or not is_constant(weight):
            return "its weight is computed from an input"
    value = node.meta.get("val")
    rank = {CONV.kind: 3 if node.target in CONV_1D else 4, LINEAR.kind: 1}.get(pattern.kind, 0)
    if isinstance(value, torch.Tensor) and value.dim() < rank:
        return "its input has no batch dimension"
    return None


def downstream(node: Node, stop: Callable[[Node], bool]) -> list[Node]:
    """Nodes reached from `node` towards the output; the walk does not go beyond `stop` nodes."""
    return _walk(node, lambda n: list(n.users), stop)


def upstream(node: Node, stop: Callable[[Node], bool]) -> list[Node]:
    """Nodes reached from `node` towards the inputs; the walk does not go beyond `stop` nodes."""
    return _walk(node, lambda n: n.all_input_nodes, stop)


def _walk(
    node: Node, step: Callable[[Node], list[Node]], stop: Callable[[Node], bool]
) -> list[Node]:
    found: dict[Node, None] = {}
    todo = step(node)
    while todo:
        current = todo.pop()
        if current not in found:
            found[current] = None
            if not stop(current):
                todo.extend(step(current))
    return list(found)
