"""Find selective scans that read one image in four directions, and prove what they compute.

Data movement is read off tensors of indices, exactly: which element of the image stands where in
the operand `u`, and which elements of the scans' results are added up where. What lies between,
the projections that make delta, B and C, is proven as a whole: the graph and its fused form give
the same on random float64 numbers with random parameters, at two sizes.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.capture.recurrence import call_name
from qmir_ao.ops._directions import DIRECTIONS, merge, to_images, to_sequences
from qmir_ao.ops.ss2d_scan import ss2d_scan_ref
from qmir_ao.passes.base import remove_unread, writes_near
from qmir_ao.passes.evaluate import Evaluator, NoValue, in_float64, known_value
from qmir_ao.passes.quantizers import quantizer_of, rows_of
from qmir_ao.quant.patterns import arguments, is_constant

qmir = torch.ops.qmir
SCANS = (qmir.selective_scan.default, qmir.selective_scan)
CASTS = frozenset({"float", "to", "_to_copy", "type_as"})
MOVES = frozenset(
    "reshape view _unsafe_view flatten unflatten permute transpose swapaxes movedim flip fliplr "
    "flipud rot90 roll cat concat stack chunk split split_with_sizes tensor_split unbind select "
    "slice narrow getitem squeeze unsqueeze expand repeat contiguous clone detach alias view_as "
    "reshape_as expand_as mT".split()
)
SUMS = frozenset({"add", "sum", "__add__", "__radd__"})
_ASSERTION = torch.ops.aten._assert_tensor_metadata.default
_SIZES = frozenset({"size", "sym_size", "getattr", "dim"})

IMAGES = ("bdhw", "bhwd")
"""Layouts that the image read by the scans may have."""
RESULTS = {
    "bdhw": lambda y: y,
    "bdl": lambda y: y.flatten(2),
    "bhwd": lambda y: y.permute(0, 2, 3, 1),
    "bld": lambda y: y.flatten(2).transpose(1, 2),
}
"""Layouts of the sum of the directions."""
COPIES = {
    "bgdl": lambda x: x,
    "b(gd)l": lambda x: x.flatten(1, 2),
    "bgld": lambda x: x.transpose(2, 3),
    "blgd": lambda x: x.permute(0, 3, 1, 2),
    "bl(gd)": lambda x: x.permute(0, 3, 1, 2).flatten(2),
    "(bg)dl": lambda x: x.flatten(0, 1),
    "(bg)ld": lambda x: x.transpose(2, 3).flatten(0, 1),
}
"""Layouts of G copies of the image as sequences, from (B, G, D, L)."""
# Two sizes without a common factor; a third number would be equal to a group count.
CHOICES = ((2, 3, 5), (3, 5, 2))
_RELATIVE = 1e-9


@dataclasses.dataclass(frozen=True)
class Copies:
    """A node that holds copies of the image as sequences, each in a direction's order."""

    node: Node
    layout: str
    orders: tuple[int, ...]
    chain: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Match:
    """Scans to be replaced, and all that the replacement needs.

    Attributes:
        scans: the scans in the order of their directions.
        image: what they read.
        image_layout: of `IMAGES`.
        channels: D, as far as the graph says.
        chain: quantizers and conversions between the image and `u`, in order.
        copies: the sequences that the projections read.
        projections: nodes between those and the operands delta, B and C.
        out: sum of the directions.
        out_layout: of `RESULTS`.
        assertions: torch.export's, on types of tensors that go.
    """

    scans: tuple[Node, ...]
    image: Node
    image_layout: str
    channels: int
    chain: tuple[Node, ...]
    copies: tuple[Copies, ...]
    projections: tuple[Node, ...]
    out: Node
    out_layout: str
    assertions: tuple[Node, ...]


def tensor_inputs(node: Node) -> list[Node]:
    """Inputs of a data movement or sum that are tensors; its sizes are left out."""
    first: Any = node.args[0] if node.args else None
    if call_name(node) in SUMS:
        return node.all_input_nodes
    listed = first if isinstance(first, list | tuple) else [first]
    return [n for n in listed if isinstance(n, Node)]


def _moves(graph_module: GraphModule, node: Node) -> bool:
    name = call_name(node)
    if name == "getitem":
        index: Any = node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        return not any(isinstance(i, Node) for i in parts)
    return name in MOVES or name in CASTS or _hoistable(graph_module, node)


def _hoistable(graph_module: GraphModule, node: Node) -> bool:
    """Whether a quantizer of activations does to the image what it does to its four copies."""
    rows = None
    if quantizer_of(graph_module, node) is not None:
        rows = rows_of(graph_module, node)
    return rows is not None and rows.ignores_order and not rows.counts


def find_cross_scans(graph_module: GraphModule) -> Iterator[Match]:
    """Proven matches, one after the other; the graph may be rewritten between them."""
    done: set[Node] = set()
    if any(n.target in SCANS for n in graph_module.graph.nodes):
        remove_unread(graph_module)  # sizes that a trace unpacked are no readers
    scans = [n for n in graph_module.graph.nodes if n.target in SCANS]
    readings = [r for scan in scans for r in _readings(graph_module, scan)]
    for wanted in _sets_of_directions(readings):
        members = {r.scan for r in wanted}
        if members & done:
            continue
        match = _complete(graph_module, wanted)
        if match is not None and prove(graph_module, match):
            done |= members
            yield match


@dataclasses.dataclass(frozen=True)
class _Reading:
    """How one scan reads an image: the directions of its groups."""

    scan: Node
    image: Node
    layout: str
    channels: int
    orders: tuple[int, ...]
    chain: tuple[Node, ...]


def _sets_of_directions(readings: Sequence[_Reading]) -> Iterator[list[_Reading]]:
    """Readings of one image that have every direction once, nearest image first."""
    families: dict[Any, dict[tuple[int, ...], _Reading]] = {}
    for r in readings:
        of_one = families.setdefault((r.image, r.layout, r.channels), {})
        if r.orders in of_one:
            of_one[()] = r  # one direction twice: which one belongs to the sum cannot be told
        of_one[r.orders] = r
    for family in families.values():
        ordered = [family[orders] for orders in sorted(family)]
        if [o for r in ordered for o in r.orders] == list(range(DIRECTIONS)) and () not in family:
            yield ordered


def _readings(graph_module: GraphModule, scan: Node) -> Iterator[_Reading]:
    u, _, A = arguments(scan)[:3]
    if not isinstance(u, Node) or not isinstance(A, Node):
        return
    rows = _rows(graph_module, A)
    for image in _cuts(graph_module, u):
        for layout, groups in itertools.product(IMAGES, (DIRECTIONS, 1, 2)):
            if rows is None or rows % groups:
                continue
            found = _read(graph_module, u, image, layout, rows // groups, "b(gd)l")
            if found is not None and len(found.orders) == groups:
                yield _Reading(scan, image, layout, rows // groups, found.orders, found.chain)
                break


def _rows(graph_module: GraphModule, A: Node) -> int | None:
    """Number of channels of all groups: rows of the state matrix."""
    known = known_value(A)
    if isinstance(known, Tensor):
        return known.shape[0] if isinstance(known.shape[0], int) else None
    if not is_constant(A):
        return None
    try:
        (value,) = Evaluator(graph_module, {}).values([A], {})
    except NoValue:
        return None
    return int(value.shape[0])


def _cuts(graph_module: GraphModule, node: Node) -> Iterator[Node]:
    """Nodes that all data of `node` comes through, by data movement alone; the nearest first."""
    place = {n: i for i, n in enumerate(graph_module.graph.nodes)}
    open_nodes = {node}
    while True:
        last = max(open_nodes, key=place.__getitem__)
        if len(open_nodes) == 1:
            yield last
        if not _moves(graph_module, last):
            return
        open_nodes.remove(last)
        open_nodes.update(tensor_inputs(last))
        if not open_nodes:
            return


def sizes_of_image(image: Node, layout: str, channels: int, choice: Sequence[int]) -> Any:
    """Sizes (B, D, H, W) for an evaluation, and what the symbols among them stand for.

    Returns:
        Sizes and symbols, or None where the image has another rank or number of channels.
    """
    known = known_value(image)
    batch, height, width = choice
    wanted = {"b": batch, "d": channels, "h": height, "w": width}
    symbols: dict[Any, int] = {}
    if isinstance(known, Tensor):
        if known.dim() != len(layout):
            return None
        for letter, size in zip(layout, known.shape, strict=True):
            if isinstance(size, int):
                if letter == "d" and size != channels:
                    return None
                wanted[letter] = size
            else:
                symbols.setdefault(size.node.expr, wanted[letter])
                wanted[letter] = symbols[size.node.expr]
    elif known is not None:
        return None
    return [wanted[letter] for letter in "bdhw"], symbols


def in_layout(x: Tensor, layout: str) -> Tensor:
    """An image (B, D, H, W) in another layout."""
    return x.permute(["bdhw".index(letter) for letter in layout])


def _read(
    graph_module: GraphModule, node: Node, image: Node, layout: str, channels: int, *layouts: str
) -> Copies | None:
    """Read off how `node` holds the image: as which copies, in which layout and orders."""
    found: list[tuple[str, tuple[int, ...]]] = []
    for choice in CHOICES:
        chosen = sizes_of_image(image, layout, channels, choice)
        if chosen is None:
            return None
        sizes, symbols = chosen
        numbers = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
        try:
            (value,) = Evaluator(graph_module, symbols, numbers=True).values(
                [node], {image: in_layout(numbers, layout)}
            )
        except NoValue:
            return None
        if not isinstance(value, Tensor):
            return None
        orders = _orders(value.long(), numbers, layouts or tuple(COPIES))
        if orders is None:
            return None
        found.append(orders)
    chain = _chain(graph_module, node, image)
    if found[0] != found[1] or chain is None:
        return None
    return Copies(node, *found[0], chain)


def _orders(
    value: Tensor, numbers: Tensor, layouts: Sequence[str]
) -> tuple[str, tuple[int, ...]] | None:
    """Layout of copies of the image's element numbers, and the direction that each copy has."""
    groups, rest = divmod(value.numel(), numbers.numel())
    if rest or groups not in (1, 2, DIRECTIONS):
        return None
    batch, channels = numbers.shape[:2]
    four = to_sequences(numbers.unsqueeze(1).expand(-1, DIRECTIONS, -1, -1, -1))
    group = torch.arange(groups).reshape(1, -1, 1, 1).expand(batch, -1, channels, four.shape[-1])
    for layout in layouts:
        place = COPIES[layout](group)
        if place.shape != value.shape:
            continue
        same = [
            COPIES[layout](four[:, i : i + 1].expand(-1, groups, -1, -1)) == value
            for i in range(DIRECTIONS)
        ]
        found = [[i for i in range(DIRECTIONS) if same[i][place == g].all()] for g in range(groups)]
        if all(found):
            return layout, tuple(f[0] for f in found)
    return None


def _chain(graph_module: GraphModule, node: Node, image: Node) -> tuple[Node, ...] | None:
    """Quantizers and conversions on all ways from the image to `node`; None where ways differ."""
    way = between(node, image)
    special = [n for n in way if call_name(n) in CASTS or quantizer_of(graph_module, n) is not None]
    for one in special:
        if node is not one and image in between(node, image, without=one):
            return None
    return tuple(special)


def between(node: Node, image: Node, without: Node | None = None) -> list[Node]:
    """Data movement from the image to `node`, in order; with the image where it is reached."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current in found or current is without:
            continue
        found.add(current)
        if current is not image:
            todo.extend(tensor_inputs(current))
    if without is None:
        found.discard(image)
    return [n for n in node.graph.nodes if n in found]


def _complete(graph_module: GraphModule, readings: list[_Reading]) -> Match | None:
    first = readings[0]
    scans = tuple(r.scan for r in readings)
    if len(scans) > 1 and not _combinable(graph_module, readings):
        return None
    if any(r.chain != first.chain for r in readings):
        return None
    region = _projections(graph_module, scans, first.image)
    if region is None:
        return None
    projections, entries, moved = region
    copies = []
    for entry in entries:
        held = _read(graph_module, entry, first.image, first.layout, first.channels)
        if held is None:
            return None
        if any(held.orders):  # rows stay as they are
            copies.append(held)
    found = _sum_of(graph_module, first, scans)
    if found is None or writes_near([first.image, *projections, *entries]):
        return None
    return Match(
        scans=scans,
        image=first.image,
        image_layout=first.layout,
        channels=first.channels,
        chain=first.chain,
        copies=tuple(copies),
        projections=projections,
        out=found[0],
        out_layout=found[1],
        assertions=_assertions([*moved, *projections, *_inside(scans, found[0])]),
    )


def _combinable(graph_module: GraphModule, readings: Sequence[_Reading]) -> bool:
    """Whether several scans can be one: quantized operands have steps of their own and cannot."""
    present = {tuple(a is None for a in arguments(r.scan)[5:7]) for r in readings}
    softplus = {arguments(r.scan)[7] for r in readings}
    operands = [a for r in readings for a in arguments(r.scan)[:7] if isinstance(a, Node)]
    quantized = any(quantizer_of(graph_module, a) is not None for a in operands)
    return len(present) == len(softplus) == 1 and not quantized


def _projections(
    graph_module: GraphModule, scans: Sequence[Node], image: Node
) -> tuple[tuple[Node, ...], tuple[Node, ...], set[Node]] | None:
    """Nodes between copies of the image and delta, B and C; the copies that they read; all copies.

    None where anything but the scans reads one of them: the others would see another order.
    """
    wanted = [a for scan in scans for a in (arguments(scan)[0], *_made(scan))]
    above = _above(wanted)
    moved, made = {image}, set()
    for node in image.graph.nodes:
        inputs = [n for n in node.all_input_nodes if n in moved or n in made]
        if node not in above or node is image or not inputs:
            continue
        if call_name(node) in _SIZES or isinstance(known_value(node), int | torch.SymInt):
            continue
        tensors = tensor_inputs(node)
        if _moves(graph_module, node) and tensors and moved.issuperset(tensors):
            moved.add(node)
        else:
            made.add(node)
    readers = made | set(scans)
    for node in made | (moved - {image}):
        for user in node.users:
            known = user in readers or user in moved or asks_size(user)
            if not known and user.target is not _ASSERTION:
                return None
    entries = {n for reader in readers for n in reader.all_input_nodes if n in moved}
    entries -= {arguments(scan)[0] for scan in scans} - {
        n for reader in made for n in reader.all_input_nodes
    }
    entries.discard(image)
    nodes = image.graph.nodes
    ordered = (tuple(n for n in nodes if n in kind) for kind in (made, entries))
    return (*ordered, moved - {image})  # type: ignore[return-value]


def _made(scan: Node) -> list[Node]:
    """delta, B and C of a scan."""
    _, delta, _, B, C = arguments(scan)[:5]
    return [delta, B, C]


def _above(nodes: Sequence[Node]) -> set[Node]:
    found, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def asks_size(node: Node) -> bool:
    """Whether a node reads a size, not values."""
    return call_name(node) in _SIZES


def _sum_of(
    graph_module: GraphModule, reading: _Reading, scans: Sequence[Node]
) -> tuple[Node, str] | None:
    """The first node that is the sum of all directions, and its layout."""
    reached, candidates = set(scans), []
    for node in scans[0].graph.nodes:
        inputs = tensor_inputs(node) if call_name(node) in MOVES | SUMS | CASTS else []
        if inputs and reached.issuperset(inputs):
            reached.add(node)
            if call_name(node) in SUMS or len(scans) == 1:
                candidates.append(node)
    for node in candidates:
        layout = _summed_as(graph_module, reading, scans, node)
        if layout is not None:
            return (node, layout) if _only_through(scans, node) else None
    return None


def _only_through(scans: Sequence[Node], out: Node) -> bool:
    """Whether `out` is all that depends on the results of the scans, their sizes included."""
    inside = _inside(scans, out)
    users = {user for node in inside for user in node.users}
    return all(u is out or u in inside or u.target is _ASSERTION for u in users)


def _inside(scans: Sequence[Node], out: Node) -> set[Node]:
    """The scans and what lies between them and `out`."""
    below = set(scans)
    for node in out.graph.nodes:
        if below.intersection(node.all_input_nodes):
            below.add(node)
    return (_above([out]) & below) - {out}


def _assertions(nodes: Sequence[Node]) -> tuple[Node, ...]:
    found = {user: None for node in nodes for user in node.users if user.target is _ASSERTION}
    return tuple(found)


def _summed_as(
    graph_module: GraphModule, reading: _Reading, scans: Sequence[Node], node: Node
) -> str | None:
    """Layout in which `node` is the sum of the directions: tried on random integers, exactly."""
    layouts = set(RESULTS)
    for choice in CHOICES:
        chosen = sizes_of_image(reading.image, reading.layout, reading.channels, choice)
        if chosen is None:
            return None
        (batch, channels, height, width), symbols = chosen
        evaluator = Evaluator(graph_module, symbols, numbers=True)
        generator = torch.Generator().manual_seed(1)
        shape = (batch, DIRECTIONS, channels, height * width)
        drawn = torch.randint(-(2**40), 2**40, shape, generator=generator)
        groups = DIRECTIONS // len(scans)
        parts = [part.flatten(1, 2) for part in drawn.split(_groups(scans, groups), dim=1)]
        image = in_layout(torch.zeros(batch, channels, height, width), reading.layout)
        given = dict(zip(scans, parts, strict=True)) | {reading.image: image}
        try:
            (value,) = evaluator.values([node], given)
        except NoValue:
            return None
        if not isinstance(value, Tensor):
            return None
        want = merge(to_images(drawn, height, width))
        layouts = {
            k
            for k in layouts
            if RESULTS[k](want).shape == value.shape and torch.equal(RESULTS[k](want), value.long())
        }
    return min(layouts, default=None, key=list(RESULTS).index)


def _groups(scans: Sequence[Node], groups: int) -> list[int]:
    return [groups] * len(scans)


def prove(graph_module: GraphModule, match: Match) -> bool:
    """Whether the graph and its fused form give the same at two sizes, on random numbers."""
    for choice in CHOICES:
        chosen = sizes_of_image(match.image, match.image_layout, match.channels, choice)
        if chosen is None:
            return False
        sizes, symbols = chosen
        evaluator = Evaluator(graph_module, symbols)
        x = evaluator.random(sizes)
        given = {match.image: in_layout(x, match.image_layout)}
        try:
            (want,) = evaluator.values([match.out], given)
            got = _fused(evaluator, match, x, given)
        except NoValue:
            return False
        bound = _RELATIVE * float(want.abs().max())
        if want.shape != got.shape or not bool((want - got).abs().max() <= bound):
            return False
    return True


def _fused(evaluator: Evaluator, match: Match, x: Tensor, given: dict[Node, Any]) -> Tensor:
    """The fused form on stand-ins: what `FuseCrossScan` writes into the graph."""
    height, width = x.shape[2:]
    given = dict(given)
    for held in match.copies:
        image = _hoisted(evaluator, held.chain, x)
        rows = image.flatten(2).unsqueeze(1).expand(-1, len(held.orders), -1, -1)
        given[held.node] = COPIES[held.layout](rows)
    parts = []
    for scan in match.scans:
        operands = [a for a in (*_made(scan), *arguments(scan)[2:7]) if isinstance(a, Node)]
        values = dict(zip(operands, evaluator.values(operands, given), strict=True))
        delta, B, C = (values[n].unflatten(-1, (height, width)) for n in _made(scan))
        A, D, bias = (None if a is None else values[a] for a in _constants(scan))
        parts.append((delta, A, B, C, D, bias))
    joined = [
        None if p[0] is None else torch.cat(p, dim=0 if i in (1, 4, 5) else 1)
        for i, p in enumerate(zip(*parts, strict=True))
    ]
    softplus = arguments(match.scans[0])[7]
    try:
        y = ss2d_scan_ref(_hoisted(evaluator, match.chain, x), *joined, softplus)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise NoValue(str(error)) from error
    return RESULTS[match.out_layout](y)


def _constants(scan: Node) -> list[Any]:
    """A, D and delta bias of a scan."""
    args = arguments(scan)
    return [args[2], *args[5:7]]


def _hoisted(evaluator: Evaluator, chain: Sequence[Node], x: Tensor) -> Tensor:
    for node in chain:
        (x,) = evaluator.values([node], {tensor_inputs(node)[0]: x})
    return in_float64(x)
