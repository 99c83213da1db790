"""Statistics, channel shift and codes of an activation in one operator."""

import dataclasses
import operator

import torch
from torch.fx import GraphModule, Node

import qmir_ao.ops.chain_quantize  # noqa: F401  (defines the operator named below)
from qmir_ao.passes.base import Pass, writes_near
from qmir_ao.passes.chain import PARTS
from qmir_ao.passes.lower import SOURCE
from qmir_ao.quant.constants import attribute
from qmir_ao.quant.patterns import arguments

aten, qmir = torch.ops.aten, torch.ops.qmir

_KEPT = ("val", "tensor_meta", "example_value")


@dataclasses.dataclass(frozen=True)
class _Quantizer:
    """One predicted grid and the one tensor that is quantized on it."""

    x: Node
    offset: Node | None
    dim: int
    statistics: str
    grid: tuple[Node, Node]
    codes: Node


class FuseDlsStatistics(Pass):
    """Compute an activation's statistics, its channel shift and its codes in one operator.

    The tensor is read where it lies: sliced or permuted ones are no longer copied, once for the
    statistics and once for the codes, and the shifted tensor is never written. Exact: the sums run
    over the same values in the same order.

        before: y = add(x, shift); s, b = dls_qparams(y, ...); q = dls_quantize(y, s, b, ...)
        after:  q, s, b = chain_quantize(x, offset=shift, ...)

    The sum stays where something else reads it too.
    """

    requires = ("LowerLinear", "LowerConv", "LowerScan")

    def rewrite(self, graph_module: GraphModule) -> int:
        """Fuse every quantizer of the graph."""
        if writes_near(list(graph_module.graph.nodes)):
            return 0  # the operator reads its operand where the codes were made
        changed = 0
        for node in list(graph_module.graph.nodes):
            if node.target is not qmir.dls_qparams.default:
                continue
            found = _find(graph_module, node)
            if found is not None:
                _fuse(graph_module, node, found)
                changed += 1
        return changed


def _find(graph_module: GraphModule, predicted: Node) -> _Quantizer | None:
    parts = {arguments(user)[1]: user for user in predicted.users}
    if set(parts) != {0, 1} or len(predicted.users) != 2:
        return None
    grid = parts[0], parts[1]
    codes = [user for user in grid[0].users if user.target is qmir.dls_quantize.default]
    if len(codes) != 1 or arguments(codes[0])[1:3] != grid:
        return None
    rows, _, _, low, high, per_tensor, _ = arguments(predicted)
    source = arguments(codes[0])[0]
    if arguments(codes[0])[3:] != (low, high):
        return None
    tokens = rows.target is aten.flatten.using_ints and arguments(rows) == (source, 0, -2)
    if rows is not source and not tokens:
        return None
    statistics = "token" if tokens else "tensor" if per_tensor else "sample"
    x, offset, dim = _shifted(graph_module, source, {rows, predicted, codes[0]})
    if tokens and dim != -1:
        x, offset, dim = source, None, -1
    return _Quantizer(x, offset, dim, statistics, grid, codes[0])


def _shifted(
    graph_module: GraphModule, source: Node, readers: set[Node]
) -> tuple[Node, Node | None, int]:
    """x, the shift of its channels and their dimension, where `source` is their sum."""
    if source.target is aten.add.Tensor and SOURCE in source.meta and readers >= set(source.users):
        x, offset = arguments(source)
        if isinstance(offset, Node) and offset.op == "get_attr":
            shape = attribute(graph_module, str(offset.target)).shape
            if shape and shape[0] == shape.numel():
                return x, offset, -len(shape)
    return source, None, -1


def _fuse(graph_module: GraphModule, predicted: Node, found: _Quantizer) -> None:
    _, w, v, low, high, _, cap = arguments(predicted)
    graph = graph_module.graph
    chain = (None, None, None, "none", None, "none", found.offset)
    settings = (w, v, found.dim, low, high, found.statistics, cap)
    with graph.inserting_before(found.codes):
        new = graph.call_function(qmir.chain_quantize.default, (found.x, *chain, *settings))
        results = [graph.call_function(operator.getitem, (new, i)) for i in range(3)]
    new.meta = dict(found.codes.meta)
    new.meta[PARTS] = () if found.offset is None else ("",)
    for old, result in zip((found.codes, *found.grid), results, strict=True):
        result.meta = {k: v for k, v in old.meta.items() if k in _KEPT}
        old.replace_all_uses_with(result)
    for old in (found.codes, *found.grid, predicted):
        graph.erase_node(old)
