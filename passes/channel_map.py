"""Which channels of an operator's result a view of it holds.

What a view does to dimensions says so without their sizes: a dimension counts samples, positions or
channels, and several may count channels together. Views that leave positions out, or mix what
dimensions count, are not followed.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qmir_ao.capture.recurrence import call_name
from qmir_ao.passes.sizes import Known, permutation
from qmir_ao.quant.patterns import arguments

SAMPLES, POSITIONS, CHANNELS = "samples", "positions", "channels"
_KEEP = frozenset({"contiguous", "clone", "detach", "alias"})
_SPLITS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split"})


@dataclasses.dataclass(frozen=True)
class View:
    """A view of a result, all positions of some channels of each sample.

    Attributes:
        dims: what each dimension counts; the first one counts samples.
        channels: numbers of the channels, with one dimension for each that counts channels.
    """

    dims: tuple[str, ...]
    channels: Tensor

    def axis(self, dim: int) -> int | None:
        """Which dimension of `channels` a dimension of the view is, or None."""
        dim %= len(self.dims)
        return self.dims[:dim].count(CHANNELS) if self.dims[dim] == CHANNELS else None


def whole(rank: int, dim: int, features: int) -> View:
    """The result itself, with its channels in one dimension."""
    dims = [SAMPLES, *[POSITIONS] * (rank - 1)]
    dims[dim] = CHANNELS
    return View(tuple(dims), torch.arange(features))


def follow(path: Sequence[Node], view: View, known: Known) -> View | None:
    """The view at the end of a path of nodes, each of which reads the one before it.

    Args:
        path: nodes from the first view on; pieces of a split as the split and its `getitem`.
        view: what the first one reads.
        known: sizes of the graph's tensors.

    Returns:
        The view, or None where a node is not understood.
    """
    nodes = list(path)
    while nodes and view is not None:
        node = nodes.pop(0)
        name = call_name(node)
        if name in _SPLITS:
            if not nodes or call_name(nodes[0]) != "getitem":
                return None
            found = _piece(node, nodes.pop(0), view)
        elif name in _KEEP:
            found = view
        else:
            rule = _RULES.get(name)
            found = None if rule is None else rule(node, view, known)
        if found is None:
            return None
        view = found
    return view


def path_from(source_of: Callable[[Node], bool], end: Node) -> tuple[Node, list[Node]] | None:
    """The nearest node above `end` for which `source_of` holds, and the views between them."""
    path: list[Node] = []
    node = end
    while not source_of(node):
        name = call_name(node)
        first: Any = node.args[0] if node.args else None
        if not isinstance(first, Node) or name not in _VIEWS:
            return None
        path.insert(0, node)
        node = first
    return node, path


def _pick(view: View, dim: int, keep: Any, *, drop: bool = False) -> View | None:
    axis = view.axis(dim)
    if axis is None:
        return None
    index: list[Any] = [slice(None)] * view.channels.dim()
    index[axis] = keep
    dims = list(view.dims)
    if drop:
        del dims[dim % len(dims)]
    return View(tuple(dims), view.channels[tuple(index)])


def _length(view: View, dim: int) -> int | None:
    axis = view.axis(dim)
    return None if axis is None else view.channels.shape[axis]


def _piece(split: Node, item: Node, view: View) -> View | None:
    given: dict[str, Any] = dict(zip(("x", "parts", "dim"), arguments(split), strict=False))
    given |= split.kwargs
    parts = given.get("parts", given.get("chunks", given.get("split_size_or_sections")))
    dim, index = given.get("dim", 0), arguments(item)[1]
    if not isinstance(dim, int) or not isinstance(index, int):
        return None
    length = _length(view, dim)
    if length is None:
        return None
    if call_name(split) == "chunk" and isinstance(parts, int):
        parts = math.ceil(length / parts)
    elif call_name(split) == "tensor_split":
        return None
    if isinstance(parts, int):
        ranges = [(at, min(at + parts, length)) for at in range(0, length, parts)]
    elif isinstance(parts, list | tuple) and all(isinstance(p, int) for p in parts):
        ends = [sum(parts[: i + 1]) for i in range(len(parts))]
        ranges = list(zip([0, *ends], ends, strict=False))
    else:
        return None
    if not -len(ranges) <= index < len(ranges):
        return None
    return _pick(view, dim, slice(*ranges[index]))


def _permuted(node: Node, view: View, known: Known) -> View | None:
    order = permutation(node)
    return None if order is None else _reordered(view, order)


def _transposed(node: Node, view: View, known: Known) -> View | None:
    given = arguments(node)[1:]
    if len(given) != 2 or not all(isinstance(d, int) for d in given):
        return None
    order = list(range(len(view.dims)))
    a, b = (d % len(order) for d in given)
    order[a], order[b] = b, a
    return _reordered(view, order)


def _reordered(view: View, order: Sequence[int]) -> View | None:
    if len(order) != len(view.dims) or order[0] != 0:
        return None
    axes = [axis for axis in (view.axis(d) for d in order) if axis is not None]
    return View(tuple(view.dims[d] for d in order), view.channels.permute(axes))


def _sliced(node: Node, view: View, known: Known) -> View | None:
    given: tuple[Any, ...] = (*arguments(node), *(0, None, None, 1)[len(node.args) - 1 :])
    _, dim, start, end, step = given
    start, end = 0 if start is None else start, sys.maxsize if end is None else end
    if not all(isinstance(n, int) for n in (dim, start, end, step)):
        return None
    if (start, end, step) == (0, sys.maxsize, 1):
        return view
    return _pick(view, dim, slice(start, end, step))


def _narrowed(node: Node, view: View, known: Known) -> View | None:
    _, dim, start, length = arguments(node)
    if not all(isinstance(n, int) for n in (dim, start, length)) or start < 0:
        return None
    return _pick(view, dim, slice(start, start + length))


def _selected(node: Node, view: View, known: Known) -> View | None:
    _, dim, index = arguments(node)
    if not isinstance(dim, int) or not isinstance(index, int):
        return None
    return _pick(view, dim, index, drop=True)


def _indexed(node: Node, view: View, known: Known) -> View | None:
    """Slices of a tensor, as a symbolic trace records them."""
    index: Any = arguments(node)[1]
    parts = index if isinstance(index, tuple) else (index,)
    if len(parts) > len(view.dims) or not all(isinstance(p, slice) for p in parts):
        return None
    found: View | None = view
    for dim, part in enumerate(parts):
        bounds = (part.start, part.stop, part.step)
        if found is None or not all(b is None or isinstance(b, int) for b in bounds):
            return None
        found = found if part == slice(None) else _pick(found, dim, part)
    return found


def _squeezed(node: Node, view: View, known: Known) -> View | None:
    """Without a dimension of size 1, which counts positions."""
    given = arguments(node)[1:]
    if len(given) != 1 or not isinstance(given[0], int):
        return None
    dims, dim = list(view.dims), given[0] % len(view.dims)
    if dims.pop(dim) != POSITIONS:
        return None
    return View(tuple(dims), view.channels)


def _unsqueezed(node: Node, view: View, known: Known) -> View | None:
    dim = arguments(node)[1]
    if not isinstance(dim, int):
        return None
    dims, dim = list(view.dims), dim % (len(view.dims) + 1)
    return View((*dims[:dim], POSITIONS, *dims[dim:]), view.channels) if dim else None


def _flattened(node: Node, view: View, known: Known) -> View | None:
    given = arguments(node)[1:]
    if not all(isinstance(d, int) for d in given):
        return None
    rank = len(view.dims)
    first, last = (d % rank for d in (*given, *(0, -1)[len(given) :]))
    counted = set(view.dims[first : last + 1])
    if len(counted) != 1 or SAMPLES in counted:
        return view if first == last else None
    dims = (*view.dims[:first], view.dims[first], *view.dims[last + 1 :])
    if counted == {POSITIONS}:
        return View(dims, view.channels)
    axis = view.dims[:first].count(CHANNELS)
    return View(dims, view.channels.flatten(axis, axis + last - first))


def _reshaped(node: Node, view: View, known: Known) -> View | None:
    source: Any = node.args[0]
    before, after = known.sizes.get(source), known.sizes.get(node)
    if after is None or (before is not None and before[0] != after[0]):
        return None
    if before is None and not _takes_samples(node, after):
        return None
    kinds = view.dims[1:]
    middle = [i for i, kind in enumerate(kinds) if kind == CHANNELS]
    if middle != list(range(middle[0], middle[-1] + 1)):
        return None
    if middle[0] == 0:
        sizes = _factors(after[1:], view.channels.numel())
        dims = (CHANNELS,) * len(sizes or ()) + (POSITIONS,) * (len(after) - 1 - len(sizes or ()))
    elif middle[-1] == len(kinds) - 1:
        sizes = _factors(tuple(reversed(after[1:])), view.channels.numel())
        sizes = None if sizes is None else tuple(reversed(sizes))
        dims = (POSITIONS,) * (len(after) - 1 - len(sizes or ())) + (CHANNELS,) * len(sizes or ())
    else:
        return None
    return None if sizes is None else View((SAMPLES, *dims), view.channels.reshape(sizes))


def _takes_samples(node: Node, after: Sequence[Any]) -> bool:
    """Whether the first size of a reshape is read off its operand, whose sizes are unknown."""
    return bool(after[0] == (node.args[0], 0))


def _factors(sizes: Sequence[Any], count: int) -> tuple[int, ...] | None:
    """The first sizes, whose product is `count`, or None where there are none."""
    product, taken = 1, 0
    while product != count or taken == 0:
        if taken == len(sizes) or not isinstance(sizes[taken], int) or sizes[taken] == 0:
            return None
        product *= sizes[taken]
        taken += 1
        if count % product:
            return None
    return tuple(sizes[:taken])


_RULES: dict[str, Callable[[Node, View, Known], View | None]] = {
    "permute": _permuted,
    "transpose": _transposed,
    "slice": _sliced,
    "narrow": _narrowed,
    "select": _selected,
    "getitem": _indexed,
    "squeeze": _squeezed,
    "unsqueeze": _unsqueezed,
    "flatten": _flattened,
    "reshape": _reshaped,
    "view": _reshaped,
    "_unsafe_view": _reshaped,
}
_VIEWS = frozenset(_RULES) | _KEEP | _SPLITS
