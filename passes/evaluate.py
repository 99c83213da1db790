"""Values of a piece of a graph on stand-in inputs, by which a rewrite is proven before it is made.

Everything is evaluated in float64. Parameters become random numbers of their shape, because a zero
that training will move proves nothing. An activation quantizer becomes a smooth function with the
same dependence on the statistics of its group (sample, token) and on its channel: rounding would
hide small differences and exaggerate others.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qmir_ao.capture.recurrence import call_name
from qmir_ao.ops.selective_scan import selective_scan_ref
from qmir_ao.ops.ss2d_scan import ss2d_scan_ref
from qmir_ao.passes.base import writes
from qmir_ao.passes.quantizers import quantizer_of, rows_of
from qmir_ao.quant.constants import attribute

_REFERENCES = {"selective_scan": selective_scan_ref, "ss2d_scan": ss2d_scan_ref}
_FAILURES = (RuntimeError, TypeError, IndexError, ValueError, AttributeError, KeyError)


class NoValue(Exception):
    """A node cannot be evaluated: a size or tensor from outside, or an operator that writes."""


def known_value(node: Node) -> Any:
    """What the capture recorded of a node's value: a fake tensor, a size, or None."""
    return node.meta.get("val", node.meta.get("example_value"))


class Evaluator:
    """Evaluates nodes of one graph at sizes of its own choice.

    Args:
        graph_module: the graph; it is not changed.
        sizes: value of each dynamic size that is chosen, by its symbolic expression.
        numbers: values are numbers of elements, which quantizers leave as they are.
    """

    def __init__(
        self, graph_module: GraphModule, sizes: Mapping[Any, int], *, numbers: bool = False
    ) -> None:
        self._root, self._sizes, self._numbers = graph_module, dict(sizes), numbers
        self._random = torch.Generator().manual_seed(0)
        self._parameters: dict[Any, Any] = {}

    def random(self, shape: Sequence[int]) -> Tensor:
        """Random numbers between -0.5 and 1.5, the same in every run."""
        x = torch.rand(tuple(shape), generator=self._random, dtype=torch.float64)
        return 2.0 * x - 0.5

    def values(self, nodes: Sequence[Node], given: Mapping[Node, Any]) -> list[Any]:
        """Values of nodes, where those of some are given.

        Raises:
            NoValue: they depend on something that has no value here, or an operator fails.
        """
        known = dict(given)
        for node in self._needed(nodes, known):
            try:
                known[node] = self._run(node, known)
            except _FAILURES as error:
                raise NoValue(f"{node.name}: {error}") from error
        return [known[n] for n in nodes]

    def _needed(self, nodes: Sequence[Node], known: Mapping[Node, Any]) -> list[Node]:
        needed = {n for n in nodes if n not in known}
        todo = list(needed)
        while todo:
            node = todo.pop()
            if self._size(known_value(node)) is not None:
                continue
            for source in node.all_input_nodes:
                if source not in known and source not in needed:
                    needed.add(source)
                    todo.append(source)
        return [n for n in self._root.graph.nodes if n in needed]

    def _size(self, value: Any) -> int | None:
        """A size as a number, where it follows from the chosen ones."""
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            return None
        if isinstance(value, int):
            return value
        expression = value.node.expr
        if expression in self._sizes:
            chosen: int = self._sizes[expression]
            return chosen
        found = expression.subs(self._sizes)
        return int(found) if found.is_Integer else None

    def _run(self, node: Node, known: Mapping[Node, Any]) -> Any:
        value = known_value(node)
        size = self._size(value)
        if size is not None:
            return size
        if node.op == "get_attr":
            return self._parameter(str(node.target), attribute(self._root, str(node.target)))
        if node.op == "placeholder":
            return self._outside(node, value)
        source = quantizer_of(self._root, node)
        if source is not None:
            rows = None if self._numbers else rows_of(self._root, node)
            return _stand_in(rows, known[source])
        if node.op == "call_module":
            return self._call_module(node, known)
        if writes(node):
            raise NoValue(f"{node.name} writes into a tensor")
        return self._call(node, known)

    def _call(self, node: Node, known: Mapping[Node, Any]) -> Any:
        filled: Any = [
            torch.fx.node.map_aggregate(torch.fx.node.map_arg(a, lambda n: known[n]), in_float64)
            for a in (node.args, node.kwargs)
        ]
        args, kwargs = filled
        name = call_name(node)
        if name in _REFERENCES:
            return _REFERENCES[name](*args, **kwargs)
        if name in ("float", "double"):
            return args[0].double()
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return in_float64(node.target(*args, **kwargs))

    def _outside(self, node: Node, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise NoValue(f"input {node.name} has unknown sizes")
        shape = [self._size(s) for s in value.shape]
        sizes = [s for s in shape if s is not None]
        if len(sizes) < len(shape):
            raise NoValue(f"input {node.name} has sizes that were not chosen")
        if node not in self._parameters:
            self._parameters[node] = self.random(sizes)
        found: Tensor = self._parameters[node]
        return found

    def _parameter(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if name not in self._parameters:
            drawn = self.random(value.shape).abs() + 0.1
            if value.is_meta:
                return self._parameters.setdefault(name, drawn)
            # A negative state matrix stays one: the state would grow beyond all digits.
            self._parameters[name] = torch.where(value.detach().cpu() < 0, -drawn, drawn)
        return self._parameters[name]

    def _call_module(self, node: Node, known: Mapping[Node, Any]) -> Any:
        path = str(node.target)
        if path not in self._parameters:
            module: nn.Module = copy.deepcopy(self._root.get_submodule(path)).cpu().double().eval()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(self.random(parameter.shape))
            self._parameters[path] = module
        filled: Any = [
            torch.fx.node.map_arg(a, lambda n: known[n]) for a in (node.args, node.kwargs)
        ]
        with torch.no_grad():
            return self._parameters[path](*filled[0], **filled[1])


def in_float64(value: Any) -> Any:
    """Everything in float64: tensors, and the dtypes that operators are told to use."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().cpu()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def _stand_in(rows: Any, x: Tensor) -> Tensor:
    """For a quantizer: `x` scaled by a statistic of its group, moved by its channel's number."""
    if rows is None:
        return x
    grouped: Tensor = rows.grouped(x)
    dims = list(range(0 if rows.whole_batch else 1, grouped.dim()))
    # With n - 1, as the quantizer has it: copies of a tensor are not the tensor.
    scale = 1.0 + 0.1 * grouped.var(dims, correction=1, keepdim=True) if rows.counts else 1.1
    scaled: Tensor = (grouped * scale).reshape(x.shape)
    if rows.channel_dim is None:
        return scaled
    shape = [1] * x.dim()
    shape[rows.channel_dim] = -1
    numbers = torch.arange(x.shape[rows.channel_dim], dtype=x.dtype, device=x.device)
    return scaled + numbers.reshape(shape)
