"""Find selective scans that read one image in four directions, whoever wrote them.

Data movement is read off tensors of indices, exactly: which element of the image stands where in
the operand `u`, and which elements of the scans' results are added up where. What lies between,
the projections that make delta, B and C, is proven as a whole (`cross_scan_proof`).
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.capture.recurrence import call_name
from qmir_ao.ops._directions import DIRECTIONS, merge, to_images
from qmir_ao.passes.base import remove_unread, writes_near
from qmir_ao.passes.cross_scan_proof import Match, projected, prove
from qmir_ao.passes.evaluate import Evaluator, NoValue, known_value
from qmir_ao.passes.image_reads import (
    CHOICES,
    IMAGES,
    RESULTS,
    in_layout,
    read_copies,
    sizes_of_image,
)
from qmir_ao.passes.moves import (
    ASSERTION,
    CASTS,
    MOVES,
    SCANS,
    SUMS,
    asks_size,
    only_moves,
    tensor_inputs,
)
from qmir_ao.passes.quantizers import quantizer_of
from qmir_ao.quant.patterns import arguments, is_constant


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
            found = read_copies(graph_module, u, image, layout, rows // groups, "b(gd)l")
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
        if not only_moves(graph_module, last):
            return
        open_nodes.remove(last)
        open_nodes.update(tensor_inputs(last))
        if not open_nodes:
            return


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
        held = read_copies(graph_module, entry, first.image, first.layout, first.channels)
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
    wanted = [a for scan in scans for a in (arguments(scan)[0], *projected(scan))]
    above = _above(wanted)
    moved, made = {image}, set()
    for node in image.graph.nodes:
        inputs = [n for n in node.all_input_nodes if n in moved or n in made]
        if node not in above or node is image or not inputs:
            continue
        if asks_size(node) or isinstance(known_value(node), int | torch.SymInt):
            continue
        tensors = tensor_inputs(node)
        if only_moves(graph_module, node) and tensors and moved.issuperset(tensors):
            moved.add(node)
        else:
            made.add(node)
    readers = made | set(scans)
    for node in made | (moved - {image}):
        for user in node.users:
            known = user in readers or user in moved or asks_size(user)
            if not known and user.target is not ASSERTION:
                return None
    entries = {n for reader in readers for n in reader.all_input_nodes if n in moved}
    entries -= {arguments(scan)[0] for scan in scans} - {
        n for reader in made for n in reader.all_input_nodes
    }
    entries.discard(image)
    nodes = image.graph.nodes
    ordered = (tuple(n for n in nodes if n in kind) for kind in (made, entries))
    return (*ordered, moved - {image})  # type: ignore[return-value]


def _above(nodes: Sequence[Node]) -> set[Node]:
    found, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


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
    return all(u is out or u in inside or u.target is ASSERTION for u in users)


def _inside(scans: Sequence[Node], out: Node) -> set[Node]:
    """The scans and what lies between them and `out`."""
    below = set(scans)
    for node in out.graph.nodes:
        if below.intersection(node.all_input_nodes):
            below.add(node)
    return (_above([out]) & below) - {out}


def _assertions(nodes: Sequence[Node]) -> tuple[Node, ...]:
    found = {user: None for node in nodes for user in node.users if user.target is ASSERTION}
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
