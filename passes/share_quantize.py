"""One quantizer where several would make the same codes."""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

import qmir_ao.ops.chain_quantize  # noqa: F401  (defines the operator named below)
from qmir_ao.capture.recurrence import call_name
from qmir_ao.passes.base import Pass, writes_near
from qmir_ao.passes.dedupe_constants import constant_key
from qmir_ao.passes.moves import MOVES

aten, qmir = torch.ops.aten, torch.ops.qmir
_QUANTIZATION = (
    qmir.dls_qparams.default,
    qmir.dls_quantize.default,
    qmir.dls_dequantize.default,
    operator.getitem,
)


class ShareQuantize(Pass):
    """Let consumers of one tensor share its codes where their quantizers have equal parameters.

    Two calls of a pure operator with equal operands give equal values, so the later one reads the
    result of the earlier one. That holds for step and shift, codes, dequantized values, and for
    what a quantizer does to its input (channel shift, flattening) and data movement before it.
    Constants are equal if type, shape and bytes are. Exact.

        before: q1 = dls_quantize(x, s1, b1, -8, 7); q2 = dls_quantize(x, s2, b2, -8, 7)
        after:  q1 serves both, where (s1, b1) and (s2, b2) come from equal parameters
    """

    requires = ("ConvertQuantizers",)
    ensures = ("codes_are_made_once",)
    breaks = ("no_identity_is_left",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Merge equal nodes, those of earlier merges included; counts quantizers that went."""
        first: dict[Any, Node] = {}
        keys: dict[Node, Any] = {}
        changed = 0
        if writes_near(list(graph_module.graph.nodes)):
            return 0  # two reads of a tensor that is written to may differ
        for node in list(graph_module.graph.nodes):
            if node.op == "get_attr":
                keys[node] = constant_key(graph_module, node)
            if not _shareable(node):
                continue
            key = _key(node, keys)
            kept = first.setdefault(key, node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                changed += node.target is qmir.dls_quantize.default
                graph_module.graph.erase_node(node)
        return changed


def _shareable(node: Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    prepares = node.target is aten.add.Tensor and "qmir_source" in node.meta
    return node.target in _QUANTIZATION or call_name(node) in MOVES or prepares


def _key(node: Node, keys: dict[Node, Any]) -> Any:
    """What decides the value of a node: operator and operands."""
    operands = torch.fx.node.map_arg(
        (node.args, node.kwargs),
        lambda n: _Operand(keys.get(n, n)),  # type: ignore[arg-type, return-value]
    )
    return node.op, node.target, repr(operands)


class _Operand:
    """An operand in a key: a node by its name, a constant by its contents."""

    def __init__(self, identity: Any) -> None:
        self.identity = identity

    def __repr__(self) -> str:
        return f"<{self.identity}>"


def repeated_quantizers(graph_module: GraphModule) -> list[Node]:
    """Quantize operators, fused ones too, whose codes an earlier one makes already."""
    keys = {
        n: constant_key(graph_module, n) for n in graph_module.graph.nodes if n.op == "get_attr"
    }
    seen: set[Any] = set()
    found = []
    for node in graph_module.graph.nodes:
        if node.target in (qmir.dls_quantize.default, qmir.chain_quantize.default):
            key = _key(node, keys)
            if key in seen:
                found.append(node)
            seen.add(key)
    return found
