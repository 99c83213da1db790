"""Prove a recurrence candidate by evaluation: random float64 numbers through both forms.

Everything between operands and result is made of sums, products, exponentials and data movement,
for which equality at random points means equality.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.capture.operands import attribute, evaluate_constant
from qmir_ao.capture.recurrence import Candidate, call_name
from qmir_ao.ops.selective_scan import selective_scan_ref

_ALLOWED = frozenset(
    "mul multiply add iadd sub neg exp einsum matmul bmm sum select slice getitem unsqueeze "
    "squeeze expand permute transpose movedim contiguous clone alias stack cat unbind repeat "
    "repeat_interleave view reshape to _to_copy float double type_as type size sym_size getattr "
    "zeros zeros_like new_zeros full full_like new_full scan __mul__ __add__ flatten t mT".split()
)
_FILLED = frozenset({"zeros", "zeros_like", "new_zeros"})
_TOLERANCE = 1e-9

SEQUENCE, STATES = ("bel", "ble", "lbe"), ("bnl", "bln", "lbn", "bknl", "blkn", "lbkn")
MATRIX, VECTOR = ("en", "ne"), ("e",)


class _NoMatch(Exception):
    """The part of the graph cannot be evaluated: an operator that is not allowed, or a size."""


@dataclasses.dataclass(frozen=True)
class Match:
    """A proven candidate: which letter each dimension of each operand and of the result is."""

    candidate: Candidate
    layouts: dict[str, str]
    result: str


def prove(graph_module: GraphModule, candidate: Candidate) -> Match | None:
    """The layouts under which the operator gives the same as the graph, or None."""
    known = {name: _sizes(graph_module, n) for name, n in candidate.operands.items()}
    results: dict[Any, Tensor | None] = {}
    for layouts in _layouts(candidate, known):
        sizes = _letters(candidate, known, layouts)
        if sizes is None:
            continue
        shapes = {
            name: known[name] or tuple(sizes[letter] for letter in layout)
            for name, layout in layouts.items()
        }
        key = tuple(shapes.items())
        values = _random(shapes)
        if key not in results:
            results[key] = _evaluate_root(graph_module, candidate, values, sizes)
        got = results[key]
        if got is None:
            continue
        want = _reference(values, layouts, sizes["l"])
        for result in SEQUENCE:
            moved = want.permute(["bel".index(letter) for letter in result])
            if got.shape == moved.shape and torch.allclose(got, moved, rtol=1e-7, atol=_TOLERANCE):
                return Match(candidate, layouts, result)
    return None


def _sizes(graph_module: GraphModule, node: Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    if value is None:
        value = evaluate_constant(graph_module, node)
    if not isinstance(value, Tensor):
        return None
    return tuple(_hint(s) for s in value.shape)


def _hint(size: Any) -> int:
    """A size as a number, without fixing a dynamic one to it."""
    return size if isinstance(size, int) else int(size.node.hint)


def _layouts(candidate: Candidate, known: dict[str, Any]) -> Iterator[dict[str, str]]:
    choices = {"u": SEQUENCE, "delta": SEQUENCE, "A": MATRIX, "B": STATES, "C": STATES, "D": VECTOR}
    names = list(candidate.operands)
    blind = known["u"] is None
    for chosen in itertools.product(*(choices[n] for n in names)):
        layouts = dict(zip(names, chosen, strict=True))
        if any(known[n] is not None and len(known[n]) != len(layouts[n]) for n in names):
            continue
        # Without sizes (a symbolic trace) only equal layouts are tried, and no groups.
        same = layouts["u"] == layouts["delta"] and layouts["B"] == layouts["C"]
        if blind and not (same and len(layouts["B"]) == 3):
            continue
        yield layouts


def _letters(
    candidate: Candidate, known: dict[str, Any], layouts: dict[str, str]
) -> dict[str, int] | None:
    """Size of each letter, or None where two operands disagree."""
    sizes: dict[str, int] = {} if candidate.length is None else {"l": candidate.length}
    for name, layout in layouts.items():
        for letter, size in zip(layout, known[name] or (), strict=False):
            # A loop may read only the first steps of a longer sequence.
            longer = letter == "l" and candidate.length is not None and size > sizes["l"]
            if not longer and sizes.setdefault(letter, size) != size:
                return None
    if not {"e", "n", "l"} <= sizes.keys() or sizes["e"] % sizes.setdefault("k", 1):
        return None
    taken = set(sizes.values())
    sizes.setdefault("b", next(n for n in range(2, 9) if n not in taken))
    return sizes


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
        for name, shape in shapes.items()
    }
    values["A"] = -values["A"]
    return values


def _reference(values: dict[str, Tensor], layouts: dict[str, str], length: int) -> Tensor:
    def get(name: str, order: str) -> Tensor:
        x = values[name].permute([layouts[name].index(letter) for letter in order])
        return x[..., :length] if order.endswith("l") else x

    u, delta, A = get("u", "bel"), get("delta", "bel"), get("A", "en")
    groups = [
        get(n, "bknl") if len(layouts[n]) == 4 else get(n, "bnl").unsqueeze(1) for n in ("B", "C")
    ]
    B, C = groups
    return selective_scan_ref(u, delta, A, B, C, values.get("D"), None, False)


def _evaluate_root(
    graph_module: GraphModule,
    candidate: Candidate,
    values: dict[str, Tensor],
    sizes: dict[str, int],
) -> Tensor | None:
    known: dict[Node, Any] = {n: values[name] for name, n in candidate.operands.items()}
    try:
        for node in _needed(candidate.root, known):
            known[node] = _run(graph_module, node, known, sizes)
    except (_NoMatch, RuntimeError, TypeError, IndexError, ValueError):
        return None
    found = known[candidate.root]
    return found if isinstance(found, Tensor) else None


def _stops(node: Node) -> bool:
    value = node.meta.get("val")
    filled = call_name(node) in _FILLED and isinstance(value, Tensor)
    return filled or isinstance(value, int | torch.SymInt) or node.op == "get_attr"


def _needed(root: Node, known: dict[Node, Any]) -> list[Node]:
    """Nodes to be evaluated for `root`, in order; the walk ends at what is known."""
    needed, todo = {root}, [root]
    while todo:
        node = todo.pop()
        if _stops(node):
            continue
        for source in node.all_input_nodes:
            if source not in known and source not in needed:
                needed.add(source)
                todo.append(source)
    return [n for n in root.graph.nodes if n in needed]


def _run(
    graph_module: GraphModule, node: Node, known: dict[Node, Any], sizes: dict[str, int]
) -> Any:
    value = node.meta.get("val")
    if node.op == "get_attr":
        return _double(attribute(graph_module, str(node.target)))
    if isinstance(value, int | torch.SymInt):
        return _hint(value)
    name = call_name(node)
    if name in _FILLED and isinstance(value, Tensor):
        return torch.zeros([_hint(s) for s in value.shape], dtype=torch.float64)
    if node.op == "placeholder":
        return _Unknown(sizes["b"])
    if name not in _ALLOWED:
        raise _NoMatch(name)
    filled: Any = [
        torch.fx.node.map_aggregate(torch.fx.node.map_arg(a, lambda n: known[n]), _double)
        for a in (node.args, node.kwargs)
    ]
    args, kwargs = filled
    if name == "scan":
        return _loop(*args)
    if name == "float":
        return args[0].double()
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return _double(node.target(*args, **kwargs))


class _Unknown:
    """An input whose sizes a symbolic trace does not know, except that batch comes first."""

    def __init__(self, batch: int) -> None:
        self.shape = (batch,)

    def size(self, dim: int) -> int:
        """Size of the first dimension; any other one is unknown."""
        if dim != 0:
            raise _NoMatch(f"size of dimension {dim} of an input")
        return self.shape[0]


def _double(value: Any) -> Any:
    """Everything in float64: tensors, and the dtypes that operators are told to use."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().cpu()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def _loop(body: Any, init: Any, xs: Any, more: Any) -> tuple[Tensor, Tensor]:
    """`torch._higher_order_ops.scan` step by step, over dimension 0."""
    (state,) = init
    rows = []
    for i in range(xs[0].shape[0]):
        state, row = body(state, *(x[i] for x in xs), *more)
        rows.append(row)
    return state, torch.stack(rows)
