"""One quantizer where several would make the same codes."""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

import qmir_ao.ops.chain_quantize  # noqa: F401  (defines the operator named below)
from qmir_ao.capture.recurrence import call_name
from qmir_ao.passes.base import Pass, remove_unread, writes_near
from qmir_ao.passes.dedupe_constants import constant_key
from qmir_ao.passes.moves import MOVES
from qmir_ao.quant.patterns import arguments

aten, qmir = torch.ops.aten, torch.ops.qmir
_INSIDE = (
    qmir.dls_qparams.default,
    qmir.dls_quantize.default,
    qmir.chain_quantize.default,
    operator.getitem,
)


class ShareQuantize(Pass):
    """Let consumers of one tensor share its codes where their quantizers have equal parameters.

    Two quantizers make the same codes where all they do is the same: data movement before them,
    channel shift, statistics, step, shift and range, with constants equal in type, shape and bytes.
    The later one's readers then read the codes, step and shift of the earlier one. Quantizers that
    differ in anything stay as they are, with what they do to their input. Exact.

        before: q1 = dls_quantize(x, s1, b1, -8, 7); q2 = dls_quantize(x, s2, b2, -8, 7)
        after:  q1, s1 and b1 serve both, where (s1, b1) and (s2, b2) come from equal parameters
    """

    requires = ("ConvertQuantizers",)
    ensures = ("codes_are_made_once",)
    breaks = ("no_identity_is_left",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Merge equal quantizers; counts those that went."""
        if writes_near(list(graph_module.graph.nodes)):
            return 0  # two reads of a tensor that is written to may differ
        pairs = _equal_pairs(graph_module)
        for first, again in pairs:
            for old, new in zip(arguments(again)[1:3], arguments(first)[1:3], strict=True):
                if isinstance(old, Node) and isinstance(new, Node) and old is not new:
                    old.replace_all_uses_with(new)
            again.replace_all_uses_with(first)
            graph_module.graph.erase_node(again)
        if pairs:
            remove_unread(graph_module)
        return len(pairs)


def _equal_pairs(
    graph_module: GraphModule, targets: tuple[Any, ...] = (qmir.dls_quantize.default,)
) -> list[tuple[Node, Node]]:
    """Each quantize operator whose codes an earlier one makes, with the earlier one before it."""
    keys: dict[Node, Any] = {}
    numbers: dict[Any, int] = {}
    first: dict[Any, Node] = {}
    pairs = []
    for node in graph_module.graph.nodes:
        key: Any = node
        if node.op == "get_attr":
            key = constant_key(graph_module, node)
        elif _belongs_to_quantizer(node):
            key = _structure(node, keys)
        # Keys of keys would grow with the depth of the graph: equal ones share a number.
        keys[node] = numbers.setdefault(key, len(numbers))
        if node.target in targets:
            kept = first.setdefault(keys[node], node)
            if kept is not node:
                pairs.append((kept, node))
    return pairs


def _belongs_to_quantizer(node: Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    prepares = node.target is aten.add.Tensor and "qmir_source" in node.meta
    return node.target in _INSIDE or call_name(node) in MOVES or prepares


def _structure(node: Node, keys: dict[Node, Any]) -> Any:
    """Operator and operands, a node among them by its key."""
    operands: Any = torch.fx.node.map_arg(
        (node.args, node.kwargs),
        lambda n: _Operand(keys[n]),  # type: ignore[arg-type, return-value]
    )
    return node.op, node.target, repr(operands)


class _Operand:
    def __init__(self, key: Any) -> None:
        self.key = key

    def __repr__(self) -> str:
        return f"<{self.key}>"


def repeated_quantizers(graph_module: GraphModule) -> list[Node]:
    """Quantize operators, fused ones too, whose codes an earlier one makes already."""
    if writes_near(list(graph_module.graph.nodes)):
        return []
    found = _equal_pairs(graph_module, (qmir.dls_quantize.default, qmir.chain_quantize.default))
    return [again for _, again in found]
