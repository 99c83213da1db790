"""Remove operators that return what they get."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.capture.recurrence import call_name
from qmir_ao.passes.base import Pass, remove_unread, writes_near
from qmir_ao.passes.evaluate import known_value
from qmir_ao.passes.lower import code_range
from qmir_ao.passes.sizes import Known, known_sizes
from qmir_ao.quant.patterns import arguments

aten, qmir = torch.ops.aten, torch.ops.qmir
_WHOLE = 2**62
_SAME = frozenset({"alias", "detach", "lift_fresh", "lift_fresh_copy"})
_RESHAPES = frozenset(
    "reshape view _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as".split()
)
_TURNS = frozenset({"permute", "transpose", "swapaxes", "movedim", "t", "mT"})
_CASTS = frozenset({"to", "_to_copy", "float", "type_as"})


class DropIdentity(Pass):
    """Remove operators, and pairs of them, whose result is their input.

    Aliases, detached tensors and conversions to the type that is there; permutations and
    transpositions that undo each other (others in a row become one); flips that undo each other;
    reshapes back to the shape that was there; slices and expansions that keep everything; pieces of
    a split put together again in their order; products with ones (what is left of stochastic depth
    after training); a quantizer of values that are codes on its own grid; and whatever nothing
    reads. What cannot be decided without sizes that the graph does not know
    stays. For graphs that no longer train: `detach` means something before. Exact; codes of codes
    are, as long as |shift| is below 2^21 steps, where float32 still separates neighbours.

        before: y = permute(permute(x, [0, 2, 3, 1]), [0, 3, 1, 2])     after: y = x
                q2 = dls_quantize(dls_dequantize(q, s, b), s, b, ...)   q2 = q
    """

    requires = ("ConvertQuantizers",)
    ensures = ("no_identity_is_left", "everything_is_read")
    breaks = ("codes_are_made_once",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Remove identities until none is left; counts the operators that went."""
        graph = graph_module.graph
        if writes_near(list(graph.nodes)):
            return 0  # a copy of a tensor that is written to is no identity
        changed, known = 0, known_sizes(graph_module)
        for node in list(graph.nodes):
            new = same_as(node) or _times_one(node, known)
            if new is None:
                changed += _merge_turns(graph_module, node)
                continue
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            changed += 1
        return changed + remove_unread(graph_module)


def same_as(node: Node) -> Node | None:
    """The earlier node that has the value of `node`, where `node` changes nothing."""
    if node.op not in ("call_function", "call_method"):
        return None
    source: Any = node.args[0] if node.args else None
    name = call_name(node)
    if name in ("cat", "concat"):
        return _put_together(node)
    if not isinstance(source, Node):
        return None
    if name in _SAME:
        return source
    rule = next((rule for names, rule in _RULES if name in names), None)
    return None if rule is None else rule(node, source)


def _times_one(node: Node, known: Known) -> Node | None:
    """The operand that a product with ones has the shape and values of."""
    if call_name(node) != "mul" or len(node.args) != 2 or node.kwargs:
        return None
    left, right = arguments(node)
    for kept, ones in ((left, right), (right, left)):
        if isinstance(ones, Node) and call_name(ones) == "new_ones" and ones in known.floats:
            return kept if isinstance(kept, Node) and known.alike(kept, node) else None
    return None


def shape_of(node: Node) -> tuple[Any, ...] | None:
    """Sizes that the capture recorded, symbols by their expressions; None where unknown."""
    value = known_value(node)
    if not isinstance(value, Tensor):
        return None
    return tuple(s if isinstance(s, int) else s.node.expr for s in value.shape)


def _no_conversion(node: Node, source: Node) -> Node | None:
    values = known_value(node), known_value(source)
    if not all(isinstance(v, Tensor) for v in values):
        return None
    after, before = values
    copies = node.kwargs.get("memory_format") not in (None, torch.preserve_format)
    return (
        source
        if (after.dtype, after.device) == (before.dtype, before.device) and not copies
        else None
    )


def _same_sizes(node: Node, source: Node) -> Node | None:
    """The earlier tensor of the same order of elements that a reshape gives the shape of again."""
    shape, current = shape_of(node), source
    if call_name(source) == "unsqueeze" and call_name(node) == "squeeze":
        dims = [n.kwargs.get("dim", arguments(n)[1:2]) for n in (node, source)]
        if dims[0] and dims[0] == dims[1]:
            return _inner(source)
    while shape is not None:
        if shape == shape_of(current):
            return current
        if call_name(current) not in _RESHAPES:
            return None
        current = _inner(current)
    return None


def _inner(node: Node) -> Node:
    found: Node = arguments(node)[0]
    return found


def _turn(node: Node) -> tuple[int, ...] | None:
    """The order of dimensions that a permutation gives, where its rank is known."""
    name, args = call_name(node), arguments(node)
    if name == "permute":
        dims = node.kwargs.get("dims", args[1] if len(args) == 2 else args[1:])
        dims = dims if isinstance(dims, list | tuple) else [dims]
        if not all(isinstance(d, int) for d in dims):
            return None
        return tuple(d % len(dims) for d in dims)
    value = known_value(node)
    if name not in ("transpose", "swapaxes") or not isinstance(value, Tensor) or node.kwargs:
        return None
    first, second = (d % value.dim() for d in args[1:3])
    order = list(range(value.dim()))
    order[first], order[second] = second, first
    return tuple(order)


def _turned_back(node: Node, source: Node) -> Node | None:
    outer = _turn(node)
    if outer is not None and outer == tuple(range(len(outer))):
        return source
    if call_name(source) not in _TURNS:
        return None
    first = _inner(source)
    inner = _turn(source)
    if outer is not None and inner is not None:
        undone = tuple(inner[d] for d in outer) == tuple(range(len(outer)))
        return first if undone else None
    swaps = call_name(node) == call_name(source) in ("transpose", "swapaxes")
    same = set(arguments(node)[1:3]) == set(arguments(source)[1:3])
    return first if swaps and same and not node.kwargs and not source.kwargs else None


def _merge_turns(graph_module: GraphModule, node: Node) -> int:
    """Make a permutation of a permutation one."""
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, Node) or call_name(node) != "permute":
        return 0
    outer = _turn(node)
    inner = _turn(source) if call_name(source) in _TURNS else None
    if outer is None or inner is None:
        return 0
    order = [inner[d] for d in outer]
    by_method = node.op == "call_method"
    node.args = (_inner(source), *order) if by_method else (_inner(source), order)
    node.kwargs = {}
    return 1


def _flipped_back(node: Node, source: Node) -> Node | None:
    if call_name(source) != "flip":
        return None
    dims = [_dims(n) for n in (node, source)]
    value = known_value(node)
    if isinstance(value, Tensor):
        dims = [{d % value.dim() for d in found} for found in dims]
    return _inner(source) if dims[0] == dims[1] else None


def _dims(node: Node) -> set[Any]:
    given: Any = node.kwargs.get("dims", arguments(node)[1:])
    flat = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    return set(flat)


def _whole_slice(node: Node, source: Node) -> Node | None:
    args = (*arguments(node), *(0, None, None, 1)[len(node.args) - 1 :])
    dim, start, end, step = args[1:5]
    if node.kwargs or start not in (None, 0) or step != 1:
        return None
    if end is None or (isinstance(end, int) and end >= _WHOLE):
        return source
    shape, size = shape_of(source), known_value(end) if isinstance(end, Node) else end
    if shape is None or not isinstance(size, int | torch.SymInt):
        return None
    known = size if isinstance(size, int) else size.node.expr
    return source if shape[dim] == known else None


def _whole_index(node: Node, source: Node) -> Node | None:
    index = arguments(node)[1]
    parts = index if isinstance(index, tuple) else (index,)
    whole = all(p is Ellipsis or (isinstance(p, slice) and p == slice(None)) for p in parts)
    # `x[:]` of a list or of a size is no tensor, but itself all the same.
    return source if whole and parts else None


def _same_shape(node: Node, source: Node) -> Node | None:
    shape = shape_of(node)
    return source if shape is not None and shape == shape_of(source) else None


def _put_together(node: Node) -> Node | None:
    """The tensor whose pieces, all of them in their order, are concatenated."""
    args = arguments(node)
    parts: Any = args[0] if args else node.kwargs.get("tensors")
    dim: Any = node.kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if not isinstance(parts, list | tuple) or not parts:
        return None
    if len(parts) == 1:
        return parts[0] if isinstance(parts[0], Node) else None
    pieces = parts[0].args[0] if isinstance(parts[0], Node) and parts[0].args else None
    if not isinstance(pieces, Node) or call_name(pieces) not in _SPLITS:
        return None
    whole = all(
        isinstance(p, Node) and call_name(p) == "getitem" and p.args == (pieces, i)
        for i, p in enumerate(parts)
    )
    count, along = _split(pieces)
    value = known_value(node)
    if isinstance(value, Tensor):
        dim, along = dim % value.dim(), along % value.dim()
    source = _inner(pieces)
    return source if whole and count == len(parts) and dim == along else None


_SPLITS = frozenset({"split_with_sizes", "split", "chunk"})


def _split(node: Node) -> tuple[int | None, int]:
    """Number of pieces where it is certain, and the dimension."""
    args = arguments(node)
    sizes = args[1] if len(args) > 1 else next(iter(node.kwargs.values()), None)
    dim: Any = node.kwargs.get("dim", args[2] if len(args) > 2 else 0)
    if isinstance(sizes, list | tuple):
        return len(sizes), dim
    value = known_value(node)
    return (len(value) if isinstance(value, list | tuple) else None), dim


def _own_grid(node: Node, source: Node) -> Node | None:
    """Codes whose dequantized values are quantized again with the same step and shift."""
    if source.target is not qmir.dls_dequantize.default:
        return None
    codes, *grid = arguments(source)
    low, high = arguments(node)[3:5]
    if list(arguments(node)[1:3]) != grid or codes.target is not qmir.dls_quantize.default:
        return None
    inner = code_range(codes)
    return codes if low <= inner[0] and inner[1] <= high else None


_RULES: tuple[tuple[frozenset[str], Callable[[Node, Node], Node | None]], ...] = (
    (_CASTS, _no_conversion),
    (_RESHAPES, _same_sizes),
    (_TURNS, _turned_back),
    (frozenset({"flip"}), _flipped_back),
    (frozenset({"slice"}), _whole_slice),
    (frozenset({"getitem"}), _whole_index),
    (frozenset({"expand"}), _same_shape),
    (frozenset({"dls_quantize"}), _own_grid),
)


def identities(graph_module: GraphModule) -> list[Node]:
    """Operators that `DropIdentity` would remove."""
    if writes_near(list(graph_module.graph.nodes)):
        return []
    known = known_sizes(graph_module)
    nodes = graph_module.graph.nodes
    return [n for n in nodes if same_as(n) is not None or _times_one(n, known) is not None]
