"""What a tensor holds of an image: read off tensors of element numbers, exactly."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.capture.recurrence import call_name
from qmir_ao.ops._directions import DIRECTIONS, to_sequences
from qmir_ao.passes.evaluate import Evaluator, NoValue, known_value
from qmir_ao.passes.moves import CASTS, tensor_inputs
from qmir_ao.passes.quantizers import quantizer_of

IMAGES = ("bdhw", "bhwd")
"""Layouts that the image read by the scans may have."""
RESULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bdhw": lambda y: y,
    "bdl": lambda y: y.flatten(2),
    "bhwd": lambda y: y.permute(0, 2, 3, 1),
    "bld": lambda y: y.flatten(2).transpose(1, 2),
}
"""Layouts of the sum of the directions."""
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
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


@dataclasses.dataclass(frozen=True)
class Copies:
    """A node that holds copies of the image as sequences, each in a direction's order."""

    node: Node
    layout: str
    orders: tuple[int, ...]
    chain: tuple[Node, ...]


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


def read_copies(
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
