"""Layer norm, activation and gate before a quantizer, in its operator."""

from typing import Any

import torch
from torch.fx import GraphModule, Node

import qmir_ao.ops.chain_quantize  # noqa: F401  (defines the operator named below)
from qmir_ao.ops.chain_quantize import ChainArgs
from qmir_ao.passes.base import Pass, writes_near
from qmir_ao.passes.chain import (
    PARTS,
    Chain,
    find_chain,
    is_permute,
    module_of_part,
    reads_shape,
)
from qmir_ao.quant.constants import attribute
from qmir_ao.quant.patterns import arguments

aten, qmir = torch.ops.aten, torch.ops.qmir

WIDEST = 4
"""Bits up to which codes are fused with float arithmetic; see `FuseNormChain`."""


class FuseNormChain(Pass):
    """Take a layer norm, an activation and a gate into the operator that quantizes their result.

    The float tensors in between are never written: out_norm(y) * silu(z), ln(x), silu(conv(x)),
    gelu(conv(x)), also behind a permute. A node is taken where nothing but the chain reads its
    value; reads of its shape go to its operand. Norms over another dimension than that of the
    channel shift, and gates behind a permute, stay.

        before: y = mul(layer_norm(x, [C], w, b), silu(z)); q, s, b = chain_quantize(y, ...)
        after:  q, s, b = chain_quantize(x, w, b, eps, gate=z, gate_activation="silu", ...)

    Bounded, not exact: norm and activations round by a few units of 2^-24 otherwise than torch's,
    the step follows. At most 4 bits a code then moves only where its value lies within 1e-5 of a
    step from a rounding boundary, in less than one of 100,000 places (tests/passes); wider codes,
    of which as many units make more of a step, are left alone. What that makes of whole networks
    is in docs/performance.md.
    """

    requires = ("FuseDlsStatistics",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Fuse the chain before every quantizer that has none yet."""
        if writes_near(list(graph_module.graph.nodes)):
            return 0  # a chain reads its operands later than the nodes it stands for
        changed = 0
        for node in list(graph_module.graph.nodes):
            if node.target is not qmir.chain_quantize.default:
                continue
            args = ChainArgs(*arguments(node))
            if not args.is_plain or (args.quant_max - args.quant_min).bit_length() > WIDEST:
                continue
            chain = _matched(graph_module, args)
            if chain.absorbed:
                _fuse(graph_module, node, args, chain)
                changed += 1
        return changed


def _node(value: Any) -> Node:
    assert isinstance(value, Node)
    return value


def _is_read_once(node: Node, role: str) -> bool:
    """Whether only the chain reads a node's value; a product and a permute change its shape."""
    values = [user for user in node.users if not reads_shape(user)]
    return len(values) == 1 and (role not in ("gate", "permute") or len(node.users) == 1)


def _matched(graph_module: GraphModule, args: ChainArgs) -> Chain:
    end = _node(args.x)
    chain = find_chain(end, _is_read_once)
    if chain.norm is None or _fits(graph_module, args, chain.axis):
        return chain
    return find_chain(end, lambda node, role: role != "norm" and _is_read_once(node, role))


def _fits(graph_module: GraphModule, args: ChainArgs, axis: int) -> bool:
    """Whether a norm over `axis` shares its dimension with the channel shift and the tokens."""
    if args.statistics == "token" and axis != -1:
        return False
    if args.offset is None or args.dim == axis:
        return True
    offset: torch.Tensor = attribute(graph_module, str(_node(args.offset).target))
    return offset.numel() == 1


def _fuse(graph_module: GraphModule, node: Node, args: ChainArgs, chain: Chain) -> None:
    graph, x = graph_module.graph, chain.x
    if chain.permute is not None:
        with graph.inserting_before(node):
            x = graph.call_function(aten.permute.default, (x, list(chain.permute)))
    norm: tuple[Any, ...] = (None, None, None)
    if chain.norm is not None:
        norm = (chain.norm.weight, chain.norm.bias, chain.norm.eps)
    gate = (chain.activation, chain.gate, chain.gate_activation, args.offset)
    dim = args.dim if chain.norm is None else chain.axis
    node.args = (x, *norm, *gate, args.scale_weights, args.shift_weights, dim, *args[11:])
    arithmetic = (old for old, _ in chain.absorbed if not is_permute(old))
    node.meta[PARTS] = (*map(module_of_part, arithmetic), *node.meta[PARTS])
    for old, operand in chain.absorbed:
        for user in list(old.users):
            if reads_shape(user):
                user.replace_input_with(old, operand)
