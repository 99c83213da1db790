"""Keep equal constants once."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.passes.base import Pass
from qmir_ao.quant.constants import attribute


def constant_key(graph_module: GraphModule, node: Node) -> Any:
    """What two constants have in common if and only if they are equal: type, shape, bytes."""
    value: Tensor = attribute(graph_module, str(node.target)).detach()
    flat = value.cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    layout = str(value.dtype), tuple(value.shape), str(value.device)
    return *layout, hashlib.sha256(data).hexdigest()


class DedupeConstants(Pass):
    """Read equal constants from one place, so that a lowered model holds each of them once.

    A module that is called twice has its weights folded twice, and many quantizers start from the
    same scalars. Equal means equal in type, shape and bytes: 0.0 and -0.0 differ, a NaN equals
    itself. Exact. Only for graphs that no longer train: parameters that are equal now may part.

        before: a = get_attr[x]; b = get_attr[y], x and y hold the same bytes
        after:  a serves both
    """

    requires = ("FoldWeights",)
    ensures = ("constants_are_held_once",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Merge equal constants; counts those that went."""
        first: dict[Any, Node] = {}
        gone = set()
        for node in list(graph_module.graph.nodes):
            if node.op != "get_attr":
                continue
            kept = first.setdefault(constant_key(graph_module, node), node)
            if kept is node:
                continue
            if node.target != kept.target:
                gone.add(str(node.target))
            node.replace_all_uses_with(kept)
            graph_module.graph.erase_node(node)
        return len(gone)


def repeated_constants(graph_module: GraphModule) -> list[Node]:
    """Constants whose bytes are held under an earlier name already."""
    seen: dict[Any, str] = {}
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            key = constant_key(graph_module, node)
            if seen.setdefault(key, str(node.target)) != str(node.target):
                found.append(node)
    return found
