"""Which operators move data without computing, and which only read sizes."""

from typing import Any

import torch
from torch.fx import GraphModule, Node

import qmir_ao.ops.selective_scan  # noqa: F401  (defines the operator named below)
from qmir_ao.capture.recurrence import call_name
from qmir_ao.passes.quantizers import quantizer_of, rows_of

qmir = torch.ops.qmir
SCANS = (qmir.selective_scan.default, qmir.selective_scan)
CASTS = frozenset({"float", "to", "_to_copy", "type_as"})
MOVES = frozenset(
    "reshape view _unsafe_view flatten unflatten permute transpose swapaxes movedim flip fliplr "
    "flipud rot90 roll cat concat stack chunk split split_with_sizes tensor_split unbind select "
    "slice narrow getitem squeeze unsqueeze expand repeat contiguous clone detach alias view_as "
    "reshape_as expand_as mT".split()
)
SUMS = frozenset({"add", "sum", "__add__", "__radd__"})
ASSERTION = torch.ops.aten._assert_tensor_metadata.default
_SIZES = frozenset({"size", "sym_size", "getattr", "dim"})


def tensor_inputs(node: Node) -> list[Node]:
    """Inputs of a data movement or sum that are tensors; its sizes are left out."""
    first: Any = node.args[0] if node.args else None
    if call_name(node) in SUMS:
        return node.all_input_nodes
    listed = first if isinstance(first, list | tuple) else [first]
    return [n for n in listed if isinstance(n, Node)]


def only_moves(graph_module: GraphModule, node: Node) -> bool:
    """Whether a node moves values, converts them, or quantizes them as `_hoistable` says."""
    name = call_name(node)
    if name == "getitem":
        index: Any = node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        return not any(isinstance(i, Node) for i in parts)
    return name in MOVES or name in CASTS or _hoistable(graph_module, node)


def _hoistable(graph_module: GraphModule, node: Node) -> bool:
    """Whether a quantizer of activations does to the image what it does to its four copies."""
    rows = None
    if quantizer_of(graph_module, node) is not None:
        rows = rows_of(graph_module, node)
    return rows is not None and rows.ignores_order and not rows.counts


def asks_size(node: Node) -> bool:
    """Whether a node reads a size, not values."""
    return call_name(node) in _SIZES
