"""Fuse the four directions of a cross scan into one operator that reads the image in place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from qmir_ao.capture.recurrence import call_name
from qmir_ao.capture.unroll import emit
from qmir_ao.ops._directions import DIRECTIONS
from qmir_ao.passes.base import Pass, remove_unread
from qmir_ao.passes.cross_scan import find_cross_scans
from qmir_ao.passes.cross_scan_proof import Match
from qmir_ao.passes.evaluate import known_value
from qmir_ao.passes.image_reads import Copies
from qmir_ao.passes.moves import CASTS, asks_size
from qmir_ao.passes.normalize import CONV_DEFAULTS, CONV_NAMES, named_arguments
from qmir_ao.passes.quantizers import quantizer_of, rows_of
from qmir_ao.quant.patterns import CONV_1D, arguments

aten, qmir = torch.ops.aten, torch.ops.qmir


class FuseCrossScan(Pass):
    """Replace cross scan, selective scan and cross merge by `qmir::ss2d_scan`.

    Identity: a projection per pixel commutes with every order of pixels, so delta, B and C of a
    direction are the reordered projections of the image itself, and `ss2d_scan` reorders them where
    it reads. A grouped convolution over four copies of the image is one convolution of the image.

        before: xs = cat([s, flip(s)]), s = stack([rows(x), columns(x)])
                delta, B, C = projections(xs)
                y = selective_scan(xs, delta, A, B, C, D, bias)
                out = sum of y's directions, each read back into the image
        after:  delta, B, C = projections(x)
                out = ss2d_scan(x, delta, A, B, C, D, bias)

    Preconditions: one scan of four groups, or several scans without quantizers that make four, in
    the directions rows, columns, rows from the end, columns from the end; nothing else reads a
    reordered tensor or a scan's result; a quantizer between the image and `u` has a static step. A
    DLS there stays, and with it the cross scan: it takes the standard deviation of the four copies,
    which divides by 4n - 1 where the image's divides by n - 1. So the pass runs before quantizers
    are inserted, and again at lowering for graphs that were prepared elsewhere. A match is proven
    by evaluation before anything is changed (see `cross_scan`).

    Error: equal operands give equal results, but for the order in which the four results are added
    where the network adds them otherwise than (rows + rows back) + (columns + columns back): three
    roundings of 2^-24 of the sum of their magnitudes on either side. Projections add their
    products in the order that a kernel chooses for the other shape. Dynamic quantizers of delta, B
    and C see the same values of a sample in another order: their steps are equal up to the rounding
    of the statistics, and codes agree but within 1e-5 of a step of a rounding boundary.
    """

    ensures = ("image_scans_get_images",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Fuse every proven cross scan; anything else stays as it is."""
        changed = 0
        for match in find_cross_scans(graph_module):
            _fuse(graph_module, match)
            remove_unread(graph_module)
            changed += 1
        return changed


def _fuse(graph_module: GraphModule, match: Match) -> None:
    graph, images = graph_module.graph, _Images(graph_module, match)
    readers = {*match.projections, *match.scans}
    first, like = next(n for n in graph.nodes if n in readers), match.scans[0]
    with graph.inserting_before(first):
        height, width = (
            _call(graph, aten.sym_size.int, like, match.image, match.image_layout.index(i))
            for i in "hw"
        )
        u = images.after(match.chain)
        rows = {held.node: images.copies(held) for held in match.copies}
    for node in match.projections:
        held = next((c for c in match.copies if c.node in node.all_input_nodes), None)
        if held is not None and not _project_once(graph_module, node, held, images):
            node.replace_input_with(held.node, rows[held.node])
    for held in match.copies:
        # Also a size that is read off the copies must not keep them.
        held.node.replace_all_uses_with(rows[held.node], delete_user_cb=asks_size)
    with graph.inserting_before(match.scans[-1]):
        operands = [_operands(graph_module, s, (height, width)) for s in match.scans]
        joined = [_joined(graph, p, i) for i, p in enumerate(zip(*operands, strict=True), 1)]
        softplus = arguments(match.scans[0])[7]
        y = _call(graph, qmir.ss2d_scan.default, like, u, *joined, softplus)
        y = _result(graph, y, match)
    match.out.replace_all_uses_with(y)
    for assertion in match.assertions:
        graph.erase_node(assertion)


class _Images:
    """The image after quantizers, and copies of it, each made once."""

    def __init__(self, graph_module: GraphModule, match: Match) -> None:
        self._root, self._graph, self._match = graph_module, graph_module.graph, match
        self._made: dict[tuple[Node, ...], Node] = {}

    def after(self, chain: Sequence[Node]) -> Node:
        """The image (B, D, H, W) after the quantizers and conversions of a chain."""
        key = tuple(chain)
        if key not in self._made:
            self._made[key] = self._make(key)
        return self._made[key]

    def _make(self, chain: tuple[Node, ...]) -> Node:
        if not chain:
            layout = self._match.image_layout
            if layout == "bdhw":
                return self._match.image
            order = [layout.index(letter) for letter in "bdhw"]
            return _call(
                self._graph, aten.permute.default, self._match.scans[0], self._match.image, order
            )
        below, last = self.after(chain[:-1]), chain[-1]
        if _converts_nothing(last, below):
            return below
        new = self._graph.node_copy(last)
        new.args = (below, *last.args[1:])
        _as_recorded(new, below)
        return new

    def copies(self, held: Copies) -> Node:
        """Copies of the image as sequences in the order of the rows, in a layout of `COPIES`."""
        count, image = len(held.orders), self.after(held.chain)
        x = _call(self._graph, aten.flatten.using_ints, held.node, image, 2)
        x = _call(self._graph, aten.unsqueeze.default, held.node, x, 1)
        x = _call(self._graph, aten.expand.default, held.node, x, [-1, count, -1, -1])
        for target, *rest in _LAYOUT_STEPS[held.layout]:
            x = _call(self._graph, target, held.node, x, *rest)
        return x


def _as_recorded(quantizer: Node, source: Node) -> None:
    """Record for a quantizer, which keeps shape and type, what is recorded of its input."""
    for key in ("val", "example_value"):
        quantizer.meta.pop(key, None)
        if key in source.meta:
            quantizer.meta[key] = source.meta[key]


def _converts_nothing(node: Node, source: Node) -> bool:
    """Whether a conversion is to the type that is there, as far as is known."""
    types = {getattr(known_value(n), "dtype", None) for n in (node, source)}
    return call_name(node) in CASTS and len(types) == 1 and None not in types


_FLATTEN, _PERMUTE = aten.flatten.using_ints, aten.permute.default
_LAYOUT_STEPS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "bgdl": (),
    "b(gd)l": ((_FLATTEN, 1, 2),),
    "bgld": ((_PERMUTE, [0, 1, 3, 2]),),
    "blgd": ((_PERMUTE, [0, 3, 1, 2]),),
    "bl(gd)": ((_PERMUTE, [0, 3, 1, 2]), (_FLATTEN, 2, 3)),
    "(bg)dl": ((_FLATTEN, 0, 1),),
    "(bg)ld": ((_PERMUTE, [0, 1, 3, 2]), (_FLATTEN, 0, 1)),
}


def _call(graph: Graph, target: Any, like: Node, *args: Any) -> Node:
    return emit(graph, target, args, like)


def _project_once(graph_module: GraphModule, node: Node, held: Copies, images: _Images) -> bool:
    """Replace a convolution over four copies of the image by one over the image."""
    if node.target not in CONV_1D or held.layout != "b(gd)l" or len(held.orders) != DIRECTIONS:
        return False
    x, weight, bias, stride, padding, _, groups = named_arguments(node, CONV_NAMES, CONV_DEFAULTS)
    plain = stride in (1, [1], (1,)) and padding in (0, [0], (0,), "valid")
    if x is not held.node or groups != DIRECTIONS or not plain:
        return False
    graph = graph_module.graph
    with graph.inserting_before(node):
        flat = _with_one_more_dimension(graph_module, node, weight)
        sizes = ([1, 1], [0, 0], [1, 1], 1)
        target = F.conv2d if node.target is F.conv1d else aten.conv2d.default
        y = _call(graph, target, node, images.after(held.chain), flat, bias, *sizes)
        y = _call(graph, aten.flatten.using_ints, node, y, 2)
    node.replace_all_uses_with(y)
    return True


def _with_one_more_dimension(graph_module: GraphModule, node: Node, weight: Node) -> Node:
    """The weight of a one-dimensional convolution for a two-dimensional one.

    A quantized weight is enlarged before its quantizer, which lowering looks for next to the
    convolution.
    """
    graph = graph_module.graph
    source = quantizer_of(graph_module, weight)
    if source is None:
        return _call(graph, aten.unsqueeze.default, node, weight, -1)
    new = graph.node_copy(weight) if len(weight.users) > 1 else weight
    with graph.inserting_before(new):
        enlarged = _call(graph, aten.unsqueeze.default, node, source, -1)
    new.args = (enlarged, *weight.args[1:])
    _as_recorded(new, enlarged)
    return new


def _operands(graph_module: GraphModule, scan: Node, size: tuple[Node, Node]) -> list[Any]:
    _, delta, A, B, C, D, bias, _ = arguments(scan)
    delta, B, C = (_as_image(graph_module, scan, x, size) for x in (delta, B, C))
    return [delta, A, B, C, D, bias]


def _as_image(graph_module: GraphModule, scan: Node, x: Node, size: tuple[Node, Node]) -> Node:
    """Sequences in the order of the rows as images; unfolded before their quantizer, if any.

    Lowering looks for the codes of an operand next to the scan.
    """
    graph, source = graph_module.graph, quantizer_of(graph_module, x)
    rows = None if source is None else rows_of(graph_module, x)
    if source is None or rows is None or not rows.ignores_order:
        return _call(graph, aten.unflatten.int, scan, x, -1, list(size))
    with graph.inserting_before(x):
        unfolded = _call(graph, aten.unflatten.int, x, source, -1, list(size))
    x.args = (unfolded, *x.args[1:])
    _as_recorded(x, unfolded)
    return x


def _joined(graph: Graph, parts: Sequence[Any], position: int) -> Any:
    """One operand from those of several scans; `position` is that of the operand."""
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    per_channel = position in (2, 5, 6)
    return _call(graph, aten.cat.default, parts[0], list(parts), 0 if per_channel else 1)


def _result(graph: Graph, y: Node, match: Match) -> Node:
    steps: dict[str, tuple[tuple[Any, ...], ...]] = {
        "bdhw": (),
        "bdl": ((_FLATTEN, 2),),
        "bhwd": ((_PERMUTE, [0, 2, 3, 1]),),
        "bld": ((_FLATTEN, 2), (_PERMUTE, [0, 2, 1])),
    }
    for target, *rest in steps[match.out_layout]:
        y = _call(graph, target, match.out, y, *rest)
    return y
