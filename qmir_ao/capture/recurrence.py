"""Find a selective scan written as a plain loop over time, or as `torch` scan operator, in a graph.

    h = exp(delta[i] * A) * h + delta[i] * B[i] * u[i];    y[i] = sum(C[i] * h) (+ D * u[i])

The search reads operand candidates off the last step of a stack of results. It may guess wrong:
`recurrence_check` then evaluates the matched part of the graph on random numbers.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule, Node

PRODUCTS = frozenset({"mul", "multiply", "einsum", "matmul", "bmm", "__mul__"})
SUMS = frozenset({"add", "iadd", "__add__"})
_TURNED = frozenset({"permute", "transpose", "movedim"})
_SAME = frozenset({"unsqueeze", "expand", "contiguous", "clone", "alias"})
_WHOLE = 2**62


def call_name(node: Node) -> str:
    """Short name of what a node calls, the same for torch, tensor methods and aten."""
    if node.op not in ("call_function", "call_method"):
        return ""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    return str(packet.__name__ if packet is not None else getattr(target, "__name__", target))


def _indices(node: Node) -> tuple[Any, ...]:
    """Index of a `getitem` on a tensor, as a tuple."""
    index: Any = node.args[1]
    return tuple(index) if isinstance(index, tuple | list) else (index,)


def _keeps_all(node: Node) -> bool:
    """Whether a slice or index keeps every element in its order."""
    args: tuple[Any, ...] = node.args
    if call_name(node) == "slice":
        bounds: list[Any] = [*args[2:], *(None, None, 1)[len(args) - 2 :]]
        start, end, step = bounds
        return start in (0, None) and (end is None or _is_whole(end)) and step == 1
    if node.target is operator.getitem:
        return all(i in (None, Ellipsis) or i == slice(None) for i in _indices(node))
    return False


def _keeps_dtype(node: Node) -> bool:
    """Whether a conversion gives the dtype that was there before, as far as is known."""
    if call_name(node) not in ("to", "_to_copy", "float"):
        return False
    dtypes = [getattr(n.meta.get("val"), "dtype", None) for n in (node, node.all_input_nodes[0])]
    return dtypes[0] is not None and dtypes[0] == dtypes[1]


def _is_whole(end: Any) -> bool:
    return isinstance(end, int) and end >= _WHOLE


@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of a product: the operator that computes it and the operand it would be."""

    core: Node
    leaf: Node


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Operands that a recurrence may have; `root` is the tensor that the operator would give."""

    root: Node
    u: Node
    delta: Node
    A: Node
    B: Node
    C: Node
    D: Node | None
    length: int | None

    @property
    def operands(self) -> dict[str, Node]:
        """The operands by name, without an absent D."""
        named = {k: getattr(self, k) for k in ("u", "delta", "A", "B", "C", "D")}
        return {k: v for k, v in named.items() if v is not None}


class Step:
    """How one time step reads its operands.

    Args:
        length: number of steps of an unrolled loop; None for a scan operator.
        sources: for a scan operator, the outer node of each placeholder of its body.
    """

    def __init__(self, length: int | None, sources: dict[Node, Node]) -> None:
        self.length, self.sources = length, sources

    def _whole(self, node: Node) -> Node | None:
        """The sequence of which `node` is the last element."""
        args: tuple[Any, ...] = node.args
        if node in self.sources:
            return self.sources[node]
        if self.length is None:
            return None
        last = (self.length - 1, -1)
        if call_name(node) == "select" and args[2] in last:
            return node.all_input_nodes[0]
        if node.target is not operator.getitem:
            return None
        below = node.all_input_nodes[0]
        if call_name(below) == "unbind":
            return below.all_input_nodes[0] if args[1] in last else None
        numbers = [i for i in _indices(node) if isinstance(i, int)]
        others = [i for i in _indices(node) if not isinstance(i, int)]
        plain = all(i in (None, Ellipsis) or i == slice(None) for i in others)
        return below if len(numbers) == 1 and numbers[0] in last and plain else None

    def factors(self, node: Node) -> list[Factor]:
        """Factors of a node, through products, sums over the state and changes of shape."""
        core, whole = node, None
        while True:
            name = call_name(core)
            plain = name in _SAME | _TURNED | {"sum", "squeeze"}
            if plain or _keeps_all(core) or _keeps_dtype(core):
                core = core.all_input_nodes[0]
            elif whole is None and (found := self._whole(core)) is not None:
                core = whole = found
            else:
                break
        if call_name(core) in PRODUCTS:
            return [f for source in core.all_input_nodes for f in self.factors(source)]
        return [Factor(core, operand(node if whole is None else whole))]


def operand(node: Node) -> Node:
    """A node without what only turns it, adds dimensions of size 1 or copies."""
    while call_name(node) in _SAME | _TURNED or _keeps_all(node) or _keeps_dtype(node):
        node = node.all_input_nodes[0]
    return node


def _split(step: Step, y: Node) -> Iterator[tuple[Node, Node, list[Factor]]]:
    """(state, C, factors of D * u) of the result of a step."""
    parts: list[tuple[Node, Node | None]] = [(y, None)]
    if call_name(y) in SUMS and len(y.all_input_nodes) == 2:
        first, second = y.all_input_nodes
        parts += [(first, second), (second, first)]
    for product, rest in parts:
        found = step.factors(product)
        skip = [] if rest is None else step.factors(rest)
        for state, other in itertools.permutations(found, 2) if len(found) == 2 else ():
            if call_name(state.core) in SUMS and len(state.core.all_input_nodes) == 2:
                yield state.core, other.leaf, skip


def _update(step: Step, state: Node) -> Iterator[tuple[Node, ...]]:
    """(delta, A, u, B) of exp(delta * A) * h + delta * B * u, in every possible order."""
    for decayed, added in itertools.permutations(state.all_input_nodes):
        kept = step.factors(decayed)
        decay = [f.core for f in kept if call_name(f.core) == "exp"]
        if len(kept) != 2 or len(decay) != 1:
            continue
        exponent = [f.leaf for f in step.factors(decay[0].all_input_nodes[0])]
        new = [f.leaf for f in step.factors(added)]
        if len(exponent) != 2 or len(new) != 3:
            continue
        for delta, A in itertools.permutations(exponent):
            if delta in new:
                rest = [n for n in new if n is not delta]
                yield from ((delta, A, u, B) for u, B in itertools.permutations(rest, 2))


def _candidates(step: Step, y: Node, state: Node | None, root: Node) -> Iterator[Candidate]:
    for found, C, skip in _split(step, y):
        if state is not None and found is not state:
            continue
        for delta, A, u, B in _update(step, found):
            for D in _skip(skip, u):
                yield from _with_outer_skip(
                    step, Candidate(root, u, delta, A, B, C, D, step.length)
                )


def _skip(factors: list[Factor], u: Node) -> list[Node | None]:
    if not factors:
        return [None]
    leaves = [f.leaf for f in factors]
    return [n for n in leaves if n is not u] if len(leaves) == 2 and u in leaves else []


def _with_outer_skip(step: Step, found: Candidate) -> Iterator[Candidate]:
    """First with D * u where it is added to the stacked results, then without."""
    root, users = found.root, list(found.root.users)
    while len(users) == 1 and call_name(users[0]) in _TURNED:
        root, users = users[0], list(users[0].users)
    if found.D is None and len(users) == 1 and call_name(users[0]) in SUMS:
        others = [n for n in users[0].all_input_nodes if n is not root]
        skips = _skip(step.factors(others[0]), found.u) if len(others) == 1 else []
        yield from (dataclasses.replace(found, root=users[0], D=D) for D in skips)
    yield found


def unrolled(node: Node) -> Iterator[Candidate]:
    """Candidates of a loop whose results `node` stacks."""
    if call_name(node) not in ("stack", "cat") or not node.args:
        return
    rows: Any = node.args[0]
    if isinstance(rows, tuple | list) and len(rows) > 1 and all(isinstance(r, Node) for r in rows):
        yield from _candidates(Step(len(rows), {}), operand(rows[-1]), None, node)


def scan_operator(graph_module: GraphModule, node: Node) -> Iterator[Candidate]:
    """Candidates of a `torch._higher_order_ops.scan` with one state and one result."""
    if call_name(node) != "scan" or len(node.args) != 4:
        return
    arguments: Any = node.args
    body_node, init, xs, more = arguments
    if not isinstance(body_node, Node) or len(init) != 1:
        return
    body = getattr(graph_module, str(body_node.target))
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    outer = [*init, *xs, *more]
    results = next(n for n in body.graph.nodes if n.op == "output").args[0]
    used = [u for u in node.users if u.users]
    if len(results) != 2 or len(used) != 1 or used[0].args[1] != 1 or len(inputs) != len(outer):
        return
    sources = {i: o for i, o in zip(inputs[1:], outer[1:], strict=True) if isinstance(o, Node)}
    yield from _candidates(Step(None, sources), results[1], results[0], used[0])


def state_updates(node: Node) -> list[Node]:
    """The nodes that update a state from step to step, where `node` stacks one row of each step.

    Empty where the rows are not made of a state h = a * h + b of at least three steps.
    """
    rows: Any = node.args[0] if node.args else None
    if call_name(node) not in ("stack", "cat") or not isinstance(rows, tuple | list):
        return []
    if len(rows) < 3:
        return []
    found = max((_updates(row) for row in (rows[-1], rows[0])), key=len)
    return found if sum(call_name(n) in SUMS for n in found) >= 2 else []


def _updates(row: Any) -> list[Node]:
    """The sums and products that lead from the first state to the one of a row."""
    found: list[Node] = []
    state = _nearest_sum(row) if isinstance(row, Node) else None
    while state is not None:
        kept = [(p, s) for p in state.all_input_nodes if (s := _previous(p)) is not None]
        if not kept:
            break
        found += [state, *(n for n in state.all_input_nodes if call_name(n) in PRODUCTS)]
        state = kept[0][1]
    return found


def _previous(product: Node) -> Node | None:
    """The state that a product scales."""
    if call_name(product) not in PRODUCTS:
        return None
    sums = (operand(n) for n in product.all_input_nodes)
    return next((n for n in sums if call_name(n) in SUMS), None)


def _nearest_sum(row: Node) -> Node | None:
    """The first sum of two tensors on the way from a row to its state."""
    todo, seen = [row], {row}
    while todo:
        node = todo.pop(0)
        if call_name(node) in SUMS and any(_previous(n) for n in node.all_input_nodes):
            return node
        if call_name(node) in PRODUCTS | SUMS | _SAME | _TURNED | {"sum", "squeeze"}:
            fresh = [n for n in node.all_input_nodes if n not in seen]
            seen.update(fresh)
            todo += fresh
    return None
