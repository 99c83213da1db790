"""Activation quantizers in a graph before conversion: where they are and what they depend on."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import qmir_ao.ops.dls_fake_quant  # noqa: F401  (defines the operator named below)
from qmir_ao.quant._bases import QmirFakeQuantize
from qmir_ao.quant.patterns import arguments, module_of

qmir = torch.ops.qmir


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the step of a quantizer is shared by, and whether channels differ.

    Attributes:
        whole_batch: one step for all samples.
        tokens: a step for each row of the last dimension.
        channel_dim: dimension along which the shift differs, or None.
        counts: whether the step depends on how often values occur: a sample's standard deviation
            divides by n - 1, so that four copies of a tensor have another one.
    """

    whole_batch: bool
    tokens: bool
    channel_dim: int | None
    counts: bool

    def grouped(self, x: Tensor) -> Tensor:
        """`x` with its groups along dimension 0."""
        return x.flatten(0, -2) if self.tokens and x.dim() > 2 else x

    @property
    def ignores_order(self) -> bool:
        """Whether the same values of a sample in another order or shape get the same codes."""
        return not self.tokens and self.channel_dim is None


def quantizer_of(graph_module: GraphModule, node: Node) -> Node | None:
    """What a fake-quantizer, module or operator, quantizes; None for any other node."""
    if node.op == "call_module":
        found = isinstance(module_of(graph_module, node), QmirFakeQuantize)
    else:
        found = node.target in (qmir.dls_fake_quant.default, qmir.rfa_fake_quant.default)
    source: Any = node.args[0] if found else None
    return source if isinstance(source, Node) else None


def rows_of(graph_module: GraphModule, node: Node) -> Rows | None:
    """How an activation quantizer groups its input; None for one of weights."""
    if node.target is qmir.rfa_fake_quant.default:
        return None
    if node.target is qmir.dls_fake_quant.default:
        return Rows(bool(arguments(node)[5]), False, None, True)
    module: Any = module_of(graph_module, node)
    if module.quantizes_weights:
        return None
    whole = not module.dynamic or bool(getattr(module, "per_tensor", False))
    channel_dim = getattr(module, "channel_dim", None)
    return Rows(whole, bool(getattr(module, "tokens", False)), channel_dim, bool(module.dynamic))
