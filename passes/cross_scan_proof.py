"""Prove a cross scan: the graph and its fused form give the same on random numbers.

Everything between image and result is made of sums, products, exponentials and data movement, for
which equality at random points means equality; parameters are random as well.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.ops.ss2d_scan import ss2d_scan_ref
from qmir_ao.passes.evaluate import Evaluator, NoValue, in_float64
from qmir_ao.passes.image_reads import (
    CHOICES,
    COPIES,
    RESULTS,
    Copies,
    in_layout,
    sizes_of_image,
)
from qmir_ao.passes.moves import tensor_inputs
from qmir_ao.quant.patterns import arguments

_RELATIVE = 1e-9


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
    parts: list[tuple[Any, ...]] = []
    for scan in match.scans:
        operands = [a for a in (*projected(scan), *arguments(scan)[2:7]) if isinstance(a, Node)]
        values = dict(zip(operands, evaluator.values(operands, given), strict=True))
        delta, B, C = (values[n].unflatten(-1, (height, width)) for n in projected(scan))
        A, D, bias = (None if a is None else values[a] for a in _constants(scan))
        parts.append((delta, A, B, C, D, bias))
    joined: list[Any] = [
        None if p[0] is None else torch.cat(p, dim=0 if i in (1, 4, 5) else 1)
        for i, p in enumerate(zip(*parts, strict=True))
    ]
    softplus = arguments(match.scans[0])[7]
    try:
        given_to_scan: Any = (_hoisted(evaluator, match.chain, x), *joined, softplus)
        y = ss2d_scan_ref(*given_to_scan)
    except RuntimeError as error:
        raise NoValue(str(error)) from error
    return RESULTS[match.out_layout](y)


def projected(scan: Node) -> list[Node]:
    """delta, B and C of a scan."""
    _, delta, _, B, C = arguments(scan)[:5]
    return [delta, B, C]


def _constants(scan: Node) -> list[Any]:
    """A, D and delta bias of a scan."""
    args = arguments(scan)
    return [args[2], *args[5:7]]


def _hoisted(evaluator: Evaluator, chain: Sequence[Node], x: Tensor) -> Tensor:
    for node in chain:
        (x,) = evaluator.values([node], {tensor_inputs(node)[0]: x})
    found: Tensor = in_float64(x)
    return found
