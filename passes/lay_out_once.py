"""Put a tensor in memory once where both kernels of a quantizer would each make a copy of it."""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qmir_ao.capture.recurrence import call_name
from qmir_ao.passes.base import Pass, writes_near

aten, qmir = torch.ops.aten, torch.ops.qmir
_READERS = (qmir.dls_qparams.default, qmir.dls_quantize.default)
_TURNS = frozenset({"permute", "transpose", "swapaxes", "movedim", "t", "mT"})
_PIECES = frozenset({"split", "split_with_sizes", "chunk", "unbind", "select", "slice", "narrow"})
_KEEPS_STRIDES = frozenset({"add", "sub", "mul", "silu", "gelu", "relu", "sigmoid", "neg", "exp"})


class LayOutOnce(Pass):
    """Insert one `contiguous` before statistics and codes of a tensor that lies otherwise.

    Kernels read tensors row by row and copy any other one first: the one for the statistics and the
    one for the codes made the same copy each. `contiguous` returns a tensor that lies in rows as it
    is, so a wrong guess costs nothing; only tensors that a permutation or a piece of another one
    goes into are considered. Who else reads the tensor reads it as before. Exact.

        before: s, b = dls_qparams(x, ...); q = dls_quantize(x, s, b, ...)
        after:  y = contiguous(x); s, b = dls_qparams(y, ...); q = dls_quantize(y, s, b, ...)
    """

    requires = ("ConvertQuantizers",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Insert a `contiguous` for every such tensor."""
        graph, changed = graph_module.graph, 0
        if writes_near(list(graph.nodes)):
            return 0  # a copy of a tensor that is written to is another tensor
        for node in list(graph.nodes):
            readers = [u for u in node.users if u.target in _READERS and u.args[0] is node]
            if len({u.target for u in readers}) < len(_READERS) or not may_lie_otherwise(node):
                continue
            with graph.inserting_after(node):
                copy = graph.call_function(aten.contiguous.default, (node,))
            copy.meta = dict(node.meta)
            for reader in readers:
                reader.update_arg(0, copy)
            changed += 1
        return changed


def may_lie_otherwise(node: Node) -> bool:
    """Whether a permuted tensor or a piece of one reaches `node` with its strides."""
    while True:
        name = call_name(node)
        if name in _TURNS or name in _PIECES:
            return True
        source: Any = node.args[0] if node.args else None
        through = name in _KEEPS_STRIDES or node.target is operator.getitem
        if not through or not isinstance(source, Node):
            return False
        node = source
