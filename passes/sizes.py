"""Sizes of tensors in terms of each other, for graphs whose capture recorded none.

An export records every shape; a symbolic trace none. What operators do to sizes says enough to see
that two tensors have the same: a size is a number or a symbol, the dimension of the tensor where it
first appeared. What an operator not named here makes is unknown.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.capture.recurrence import call_name
from qmir_ao.ops.chain_quantize import ChainArgs
from qmir_ao.passes.evaluate import known_value
from qmir_ao.quant.constants import attribute
from qmir_ao.quant.patterns import arguments

aten, qmir = torch.ops.aten, torch.ops.qmir

Sizes = tuple[Any, ...]
"""Numbers, symbols of an export, or pairs (node, dimension)."""

_MAKE_FLOATS = frozenset(
    {"layer_norm", "dls_dequantize", "selective_scan_q", "ss2d_scan_q", "adaptive_avg_pool2d"}
)
_KEEP_TYPE = frozenset(
    "silu gelu relu sigmoid tanh leaky_relu softmax neg exp contiguous clone roll permute reshape "
    "view new_ones".split()
)
_ELEMENTWISE = frozenset(
    "silu gelu relu sigmoid tanh leaky_relu layer_norm softmax neg exp contiguous clone roll "
    "dls_quantize dls_dequantize selective_scan_q ss2d_scan_q".split()
)
_BROADCASTS = frozenset({"add", "sub", "mul", "div", "truediv"})
_CONVOLUTIONS = (aten.conv2d.default, qmir.conv2d.default)
_LINEARS = (aten.linear.default, qmir.linear.default)
_SPLITS = frozenset({"chunk", "split", "split_with_sizes"})


@dataclasses.dataclass
class Known:
    """What is known of a graph's tensors.

    Attributes:
        sizes: of each tensor whose rank is certain.
        floats: the tensors that are certain to be float32.
    """

    sizes: dict[Node, Sizes] = dataclasses.field(default_factory=dict)
    floats: set[Node] = dataclasses.field(default_factory=set)

    def alike(self, a: Node, b: Node) -> bool:
        """Whether two tensors are float32 of the same sizes."""
        return {a, b} <= self.floats and a in self.sizes and self.sizes[a] == self.sizes.get(b)


def known_sizes(graph_module: GraphModule) -> Known:
    """What a graph says of its tensors."""
    known = Known()
    for node in graph_module.graph.nodes:
        value = known_value(node)
        if value is None and node.op == "get_attr":
            value = attribute(graph_module, str(node.target))
        if value is None:
            sizes = _of_node(graph_module, node, known.sizes)
            is_float = _is_float(node, known.floats)
        elif isinstance(value, Tensor):
            sizes = tuple(s if isinstance(s, int) else s.node.expr for s in value.shape)
            is_float = value.dtype == torch.float32
        else:
            continue
        if sizes is not None:
            known.sizes[node] = sizes
        if is_float:
            known.floats.add(node)
    return known


def _is_float(node: Node, floats: set[Node]) -> bool:
    """Whether a node makes float32 in a network of that type."""
    name = call_name(node)
    if node.target in (*_CONVOLUTIONS, *_LINEARS) or name in _MAKE_FLOATS:
        return True
    operands = node.all_input_nodes
    if name in _BROADCASTS:
        return bool(operands) and floats.issuperset(operands)
    source: Any = node.args[0] if node.args else None
    if name == "getitem" and isinstance(source, Node) and call_name(source) in _SPLITS:
        source = source.args[0]
    elif name not in _KEEP_TYPE:
        return False
    return source in floats


def _of_node(graph_module: GraphModule, node: Node, found: Mapping[Node, Sizes]) -> Sizes | None:
    if node.op not in ("call_function", "call_method"):
        return None
    source = node.args[0] if node.args else None
    if node.target in _CONVOLUTIONS:
        return _convolved(graph_module, node, found)
    sizes = found.get(source) if isinstance(source, Node) else None
    name = call_name(node)
    if name in _BROADCASTS:
        return _broadcast([found.get(a) if isinstance(a, Node) else () for a in node.args[:2]])
    if name in ("reshape", "view", "new_ones"):
        return _listed(node, found)
    if name == "getitem" and isinstance(source, Node) and call_name(source) in _SPLITS:
        return _piece(source, arguments(node)[1], found)
    quantized = _quantized(node)
    if quantized is not None:
        return found.get(quantized)
    if sizes is None:
        return None
    if node.target in _LINEARS:
        features = _features(graph_module, node)
        return None if features is None else (*sizes[:-1], features)
    rule = _RULES.get(name)
    return rule(node, sizes) if rule is not None else sizes if name in _ELEMENTWISE else None


def _quantized(node: Node) -> Node | None:
    """The tensor whose codes a node is, where they come from an operator with several results."""
    if node.target is not operator.getitem:
        return None
    source, index = arguments(node)
    if not isinstance(source, Node) or source.target is not qmir.chain_quantize.default:
        return None
    args = ChainArgs(*arguments(source))
    quantized: Any = args.x
    return quantized if index == 0 and args.gate is None else None


def _shaped_like(node: Any) -> Any:
    """The first tensor that has the shape of a node, as far as is certain."""
    while isinstance(node, Node):
        source: Any = _quantized(node)
        if source is None and call_name(node) in _ELEMENTWISE:
            source = node.args[0]
        if not isinstance(source, Node):
            break
        node = source
    return node


def _features(graph_module: GraphModule, node: Node) -> int | None:
    if node.target is qmir.linear.default:
        return int(arguments(node)[8])
    weight: Any = arguments(node)[1]
    if weight.op != "get_attr":
        return None
    return int(attribute(graph_module, str(weight.target)).shape[0])


def _convolved(graph_module: GraphModule, node: Node, found: Mapping[Node, Sizes]) -> Sizes | None:
    args = arguments(node)
    if node.target is qmir.conv2d.default:
        size, (stride, padding, dilation) = args[9], args[10:13]
    elif args[1].op == "get_attr" and len(args) > 5 and not isinstance(args[4], str):
        size = tuple(attribute(graph_module, str(args[1].target)).shape)
        stride, padding, dilation = args[3:6]
    else:
        return None
    source = _shaped_like(args[0])
    before = found.get(args[0], ((source, 0), None, (source, 2), (source, 3)))
    if len(before) != 4:
        return None
    spatial = []
    for i in (0, 1):
        kept = stride[i] == 1 and 2 * padding[i] == dilation[i] * (size[2 + i] - 1)
        spatial.append(before[2 + i] if kept else (node, 2 + i))
    return (before[0], int(size[0]), *spatial)


def _broadcast(operands: Sequence[Sizes | None]) -> Sizes | None:
    if any(sizes is None for sizes in operands):
        return None
    left, right = (sizes or () for sizes in operands)
    rank = max(len(left), len(right))
    result = []
    for a, b in zip(_padded(left, rank), _padded(right, rank), strict=True):
        if a != b and 1 not in (a, b):
            return None
        result.append(b if a == 1 else a)
    return tuple(result)


def _padded(sizes: Sizes, rank: int) -> Sizes:
    return (1,) * (rank - len(sizes)) + sizes


def _size(argument: Any, found: Mapping[Node, Sizes]) -> Any:
    """A size that is a number or read off a tensor; None of others."""
    if isinstance(argument, int):
        return argument if argument >= 0 else None
    if not isinstance(argument, Node):
        return None
    name, args = call_name(argument), arguments(argument)
    if name == "getitem" and isinstance(args[0], Node) and isinstance(args[1], int):
        shape = args[0]
        reads = (call_name(shape) == "size" and len(shape.args) == 1) or (
            shape.target is getattr and shape.args[1] == "shape"
        )
        return _entry(shape.args[0], args[1], found) if reads else None
    if name in ("size", "sym_size") and len(args) == 2 and isinstance(args[1], int):
        return _entry(args[0], args[1], found)
    return None


def _entry(tensor: Any, index: int, found: Mapping[Node, Sizes]) -> Any:
    sizes = found.get(tensor)
    if sizes is None:
        return (_shaped_like(tensor), index)
    return sizes[index] if -len(sizes) <= index < len(sizes) else None


def _listed(node: Node, found: Mapping[Node, Sizes]) -> Sizes | None:
    """The sizes that a call names, as a list or one by one; symbols for what is computed."""
    given = arguments(node)[1:]
    flat = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    if not flat or any(isinstance(a, list | tuple) or _is_shape(a) for a in flat):
        return None
    sizes = (_size(a, found) for a in flat)
    return tuple((node, i) if s is None else s for i, s in enumerate(sizes))


def _is_shape(argument: Any) -> bool:
    """Whether an argument is a whole shape, of which nobody knows how many sizes it has."""
    return isinstance(argument, Node) and (
        argument.target is getattr or (call_name(argument) == "size" and len(argument.args) == 1)
    )


def _piece(split: Node, index: Any, found: Mapping[Node, Sizes]) -> Sizes | None:
    args = arguments(split)
    sizes = found.get(args[0])
    parts: Any = args[1] if len(args) > 1 else None
    dim: Any = split.kwargs.get("dim", args[2] if len(args) > 2 else 0)
    if sizes is None or not isinstance(dim, int) or not -len(sizes) <= dim < len(sizes):
        return None
    whole = sizes[dim]
    if isinstance(parts, list | tuple):
        part = parts[index]
    elif call_name(split) == "chunk" and isinstance(whole, int) and whole % parts == 0:
        part = whole // parts
    else:
        return None
    result = list(sizes)
    result[dim] = part
    return tuple(result) if isinstance(part, int) else None


def permutation(node: Node) -> tuple[int, ...] | None:
    """Dimensions of a permute in their new order, counted from 0; None of any other node."""
    if call_name(node) != "permute" or node.kwargs:
        return None
    given = arguments(node)[1:]
    order = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    if not all(isinstance(d, int) for d in order):
        return None
    return tuple(d % len(order) for d in order)


def _permuted(node: Node, sizes: Sizes) -> Sizes | None:
    order = permutation(node)
    if order is None or len(order) != len(sizes):
        return None
    return tuple(sizes[d] for d in order)


def _pooled(node: Node, sizes: Sizes) -> Sizes | None:
    size: Any = arguments(node)[1] if len(node.args) > 1 else None
    wanted = list(size) if isinstance(size, list | tuple) else [size, size]
    whole = len(sizes) >= 3 and len(wanted) == 2 and all(isinstance(s, int) for s in wanted)
    return (*sizes[:-2], *wanted) if whole else None


_RULES: dict[str, Callable[[Node, Sizes], Sizes | None]] = {
    "permute": _permuted,
    "adaptive_avg_pool2d": _pooled,
}
