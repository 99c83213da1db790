"""Chains of float operators that end in a quantizer: what `FuseNormChain` fuses, as a match.

From the quantizer up: a permute or a product with a gate, an activation, a layer norm.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from qmir_ao.ops.chain_quantize import ChainArgs
from qmir_ao.quant.patterns import arguments, module_path

aten = torch.ops.aten

PARTS = "qmir_parts"
"""Key of `node.meta` of a `qmir::chain_quantize`: the module of each float operator that it stands
for, in the order of `parts_of`."""

_ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    torch.relu: "relu",
    F.relu: "relu",
    "relu": "relu",
    aten.sigmoid.default: "sigmoid",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
    aten.silu.default: "silu",
    F.silu: "silu",
    aten.gelu.default: "gelu",
    F.gelu: "gelu",
}
_PRODUCTS = (operator.mul, torch.mul, aten.mul.Tensor, "mul")
_NORMS = (aten.layer_norm.default, F.layer_norm)
_PERMUTES = (aten.permute.default, torch.permute, "permute")
_SHAPE_READERS = (aten.sym_size.int, "size", "dim")
_NORM_NAMES = ("input", "normalized_shape", "weight", "bias", "eps")


def parts_of(node: Node) -> list[str]:
    """Names of the float operators that a `qmir::chain_quantize` stands for."""
    args = ChainArgs(*arguments(node))
    activations = (
        name.removesuffix("_tanh")
        for name in (args.gate_activation, args.activation)
        if name != "none"
    )
    return [
        *(["mul"] if args.gate is not None else []),
        *activations,
        *(["layer_norm"] if args.norm_eps is not None else []),
        *(["add"] if args.offset is not None else []),
    ]


def module_of_part(node: Node) -> str:
    """Dotted path of the module that a float operator came from."""
    return str(node.meta.get("qmir_module") or module_path(node))


@dataclasses.dataclass(frozen=True)
class Norm:
    """A layer norm over the last dimension."""

    weight: Node | None
    bias: Node | None
    eps: float


@dataclasses.dataclass(frozen=True)
class Chain:
    """What a quantizer's input is made of.

    Attributes:
        x: the tensor that the chain starts from.
        permute: order of dimensions between the chain and the quantizer, or None.
        norm: layer norm of x, or None.
        activation: of the norm's result, "none" or a name of `qmir::chain_quantize`.
        gate: factor, or None.
        gate_activation: like `activation`.
        absorbed: the nodes that the chain stands for, and their main operands.
    """

    x: Node
    permute: tuple[int, ...] | None = None
    norm: Norm | None = None
    activation: str = "none"
    gate: Node | None = None
    gate_activation: str = "none"
    absorbed: tuple[tuple[Node, Node], ...] = ()

    @property
    def axis(self) -> int:
        """Where the norm's dimension lies in what is quantized, counted from the end."""
        order = self.permute or (0,)
        return order.index(len(order) - 1) - len(order)


def find_chain(end: Node, may_take: Callable[[Node, str], bool]) -> Chain:
    """The longest chain that ends in `end`.

    Args:
        end: what the quantizer reads.
        may_take: whether the chain may stand for a node in a role: "permute", "gate" (the
            multiplication), "activation", "gate_activation" or "norm".
    """
    x, permute, gate, gate_activation = end, None, None, "none"
    absorbed: list[tuple[Node, Node]] = []
    dims = _order(x)
    if dims is not None and may_take(x, "permute"):
        permute = dims
        absorbed.append((x, arguments(x)[0]))
        x = arguments(x)[0]
    elif (factors := _factors(x)) is not None and may_take(x, "gate"):
        absorbed.append((x, factors[0]))
        x, gate = factors
        gate, gate_activation = _activated(gate, "gate_activation", may_take, absorbed)
    x, activation = _activated(x, "activation", may_take, absorbed)
    norm = norm_of(x)
    if norm is not None and may_take(x, "norm"):
        absorbed.append((x, arguments(x)[0]))
        x = arguments(x)[0]
    else:
        norm = None
    if norm is None and gate is None and activation == "none":
        return Chain(end)
    return Chain(x, permute, norm, activation, gate, gate_activation, tuple(absorbed))


def _activated(
    node: Node,
    role: str,
    may_take: Callable[[Node, str], bool],
    absorbed: list[tuple[Node, Node]],
) -> tuple[Node, str]:
    name = activation_of(node)
    if name is None or not may_take(node, role):
        return node, "none"
    source: Node = node.all_input_nodes[0]
    absorbed.append((node, source))
    return source, name


def activation_of(node: Node) -> str | None:
    """Name of the activation that a node computes, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = _ACTIVATIONS.get(node.target)
    if name is None or len(node.all_input_nodes) != 1:
        return None
    options = dict(node.kwargs)
    if options.pop("inplace", False):
        return None
    if name == "gelu":
        kind = options.pop("approximate", "none")
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(kind))
    return name if not options and len(node.args) == 1 else None


def norm_of(node: Node) -> Norm | None:
    """The layer norm over one dimension that a node computes, or None."""
    if node.target not in _NORMS:
        return None
    given: dict[str, Any] = dict(zip(_NORM_NAMES, arguments(node), strict=False)) | node.kwargs
    size, weight, bias = (given.get(name) for name in ("normalized_shape", "weight", "bias"))
    eps = given.get("eps", 1e-5)
    known = isinstance(size, list | tuple) and len(size) == 1 and isinstance(eps, float)
    operands = isinstance(weight, Node | None) and isinstance(bias, Node | None)
    return Norm(weight, bias, eps) if known and operands else None


def _factors(node: Node) -> tuple[Node, Node] | None:
    """Operands of a product: the one with a layer norm first, else the left one."""
    if node.target not in _PRODUCTS or len(node.args) != 2 or node.kwargs:
        return None
    left, right = arguments(node)
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    return (right, left) if _has_norm(right) and not _has_norm(left) else (left, right)


def _has_norm(node: Node) -> bool:
    inner = node.all_input_nodes[0] if activation_of(node) is not None else node
    return norm_of(inner) is not None


def reads_shape(node: Node) -> bool:
    """Whether a node reads the sizes of its operand, not its values."""
    return node.target in _SHAPE_READERS or (
        node.target is getattr and arguments(node)[1] == "shape"
    )


def is_permute(node: Node) -> bool:
    """Whether a node reorders the dimensions of its operand."""
    return node.target in _PERMUTES


def _order(node: Node) -> tuple[int, ...] | None:
    """Dimensions of a permute, counted from 0, or None."""
    if not is_permute(node) or node.kwargs:
        return None
    dims = arguments(node)[1:]
    if len(dims) == 1 and isinstance(dims[0], list | tuple):
        dims = tuple(dims[0])
    if not all(isinstance(d, int) for d in dims):
        return None
    return tuple(d % len(dims) for d in dims)
