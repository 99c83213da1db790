"""Residual sums and activations behind an integer operator, in its operator."""

import dataclasses
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from qmir_ao.passes.base import Pass, writes_near
from qmir_ao.passes.chain import PARTS, module_of_part
from qmir_ao.passes.drop_identity import DropIdentity
from qmir_ao.passes.epilogues import OWN_ARGUMENTS, epilogue_of, own_arguments
from qmir_ao.passes.lay_out_once import may_lie_otherwise
from qmir_ao.passes.lower import SOURCE
from qmir_ao.passes.sizes import Known, known_sizes, permutation
from qmir_ao.quant.patterns import arguments

aten, qmir = torch.ops.aten, torch.ops.qmir

_SUMS = (operator.add, torch.add, aten.add.Tensor, "add")
_PRODUCTS = (operator.mul, torch.mul, aten.mul.Tensor, "mul")
_RELUS = (aten.relu.default, torch.relu, F.relu, "relu")


@dataclasses.dataclass(frozen=True)
class _Producer:
    """An integer operator whose result nothing reads but one node, perhaps permuted."""

    node: Node
    permute: Node | None

    @property
    def features(self) -> int:
        """Output channels."""
        args = arguments(self.node)
        return int(args[8] if self.node.target is qmir.linear.default else args[9][0])

    def channel_dim(self, rank: int) -> int:
        """Where the channels are in what is read."""
        if self.node.target is qmir.linear.default:
            return rank - 1
        order = None if self.permute is None else permutation(self.permute)
        return 1 if order is None else order.index(1)


@dataclasses.dataclass(frozen=True)
class _Residual:
    """What is added: a tensor of the same size, and the factors of its channels.

    `leads` where it is the sum's first operand, whose order in memory the result takes.
    """

    tensor: Node
    scale: Node | None
    product: Node | None
    leads: bool


class FuseEpilogue(Pass):
    """Take a residual sum and a ReLU into the integer operator whose result they read.

    The result before them is never written: x + conv(y), x * skip_scale + linear(y), relu(conv(y)),
    also where a permute stands behind a convolution. Then the residual is read as it lies, and the
    result lies like it. A sum is taken where nothing else reads the operator's result, the other
    operand is a float32 tensor of its size, no other call of the operator's module stands in
    between, and no view of the sum would miss its order in memory;
    factors, where they are one constant for each channel. The channel shift of a quantizer stays
    its own (`FuseDlsStatistics`). Other activations round otherwise than torch's and are left to
    the quantizer that reads them (`FuseNormChain`). Exact: every operation rounds as it did.

        before: y = linear(q, ...); out = relu(add(mul(x, scale), y))
        after:  out = linear(q, ..., residual=x, residual_scale=scale, activation="relu")
    """

    requires = ("DropIdentity",)
    breaks = ("codes_are_made_once",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Fuse every sum and ReLU that qualifies."""
        if writes_near(list(graph_module.graph.nodes)):
            return 0  # a residual is read earlier or later than by the sum
        changed = 0
        known = known_sizes(graph_module)
        moved = False
        for node in list(graph_module.graph.nodes):
            if _is_plain(node, _SUMS, 2) and SOURCE not in node.meta:
                found = _sum(node, known)
            elif _is_plain(node, _RELUS, 1):
                found = _producer(arguments(node)[0]), None
            else:
                continue
            producer, residual = found
            if producer is None or epilogue_of(producer.node).activation != "none":
                continue
            if _passes_a_call(producer.node, node):
                continue
            if residual is None:
                _add_relu(node, producer)
            else:
                _add_residual(node, producer, residual)
            moved |= producer.permute is not None
            changed += 1
        if moved:
            # A permute now stands behind the operator where a sum did, before other permutes.
            DropIdentity().rewrite(graph_module)
        return changed


def _passes_a_call(producer: Node, end: Node) -> bool:
    """Whether another call of the same module stands in between.

    The calls of a module are told apart by their order; see `backend/comparison.py`.
    """
    module, node = module_of_part(producer), producer.next
    while node is not end:
        if node.target in OWN_ARGUMENTS and module_of_part(node) == module:
            return True
        node = node.next
    return False


def _is_plain(node: Node, targets: tuple[Any, ...], operands: int) -> bool:
    """Whether a node calls one of the targets on tensors alone: no `alpha`, nothing in place."""
    if node.op not in ("call_function", "call_method") or node.target not in targets:
        return False
    options = {k: v for k, v in node.kwargs.items() if (k, v) != ("inplace", False)}
    values = [a for a in node.args if isinstance(a, Node)]
    return not options and len(node.args) == len(values) == operands


def _producer(node: Node) -> _Producer | None:
    """The integer operator whose result a node is, if nothing else reads it."""
    permute = None
    if permutation(node) is not None:
        permute, node = node, arguments(node)[0]
        if len(permute.users) != 1 or node.target is not qmir.conv2d.default:
            return None
    if node.target not in OWN_ARGUMENTS or len(node.users) != 1:
        return None
    return _Producer(node, permute)


def _sum(node: Node, known: Known) -> tuple[_Producer | None, _Residual | None]:
    left, right = arguments(node)
    for own, other in ((right, left), (left, right)):
        producer = _producer(own)
        if (
            producer is not None
            and own is not other
            and epilogue_of(producer.node).residual is None
            and known.alike(own, other)
            and not _would_turn(producer, other, other is left)
        ):
            return producer, _residual(other, producer, known, other is left)
    return None, None


def _would_turn(producer: _Producer, other: Node, leads: bool) -> bool:
    """Whether an image would come to lie as its residual, while the sum lay in rows.

    Views of a sum may rely on its order in memory, which is that of its first operand.
    """
    in_rows = producer.node.target is qmir.conv2d.default and producer.permute is None
    return in_rows and not leads and may_lie_otherwise(other)


def _residual(node: Node, producer: _Producer, known: Known, leads: bool) -> _Residual:
    """The operand of a sum, without the factors of its channels if that is all it is made of."""
    if _is_plain(node, _PRODUCTS, 2) and len(node.users) == 1:
        left, right = arguments(node)
        for tensor, scale in ((left, right), (right, left)):
            if _is_channelwise(scale, producer, known) and known.alike(tensor, node):
                return _Residual(tensor, scale, node, leads)
    return _Residual(node, None, None, leads)


def _is_channelwise(scale: Node, producer: _Producer, known: Known) -> bool:
    """Whether a node is a constant of one value for each output channel, along their dimension."""
    if scale.op != "get_attr" or scale not in known.floats:
        return False
    shape = known.sizes[scale]
    rank = 4 if producer.node.target is qmir.conv2d.default else len(shape)
    behind = rank - 1 - producer.channel_dim(rank)
    wanted = (producer.features, *(1 for _ in range(behind)))
    ahead = shape[: max(len(shape) - len(wanted), 0)]
    return len(shape) <= rank and all(s == 1 for s in ahead) and shape[len(ahead) :] == wanted


def _add_residual(node: Node, producer: _Producer, residual: _Residual) -> None:
    graph, new, tensor = node.graph, producer.node, residual.tensor
    order = None if producer.permute is None else permutation(producer.permute)
    with graph.inserting_before(node):
        if order is not None:
            back = [order.index(d) for d in range(len(order))]
            tensor = graph.call_function(aten.permute.default, (tensor, back))
        elif new.target is qmir.conv2d.default and not residual.leads:
            # Costs nothing where the residual lies in rows, as seems certain; see `_would_turn`.
            tensor = graph.call_function(aten.contiguous.default, (tensor,))
    if tensor is not residual.tensor and "val" in new.meta:
        tensor.meta["val"] = new.meta["val"]
    new.args = (*own_arguments(new), tensor, residual.scale, "none")
    new.meta[PARTS] = tuple(
        module_of_part(part) for part in (node, residual.product) if part is not None
    )
    _put_in_place(node, producer)
    if residual.product is not None and not residual.product.users:
        graph.erase_node(residual.product)


def _add_relu(node: Node, producer: _Producer) -> None:
    new = producer.node
    end = epilogue_of(new)
    new.args = (*own_arguments(new), *end._replace(activation="relu"))
    new.meta[PARTS] = (*new.meta.get(PARTS, ()), module_of_part(node))
    _put_in_place(node, producer)


def _put_in_place(node: Node, producer: _Producer) -> None:
    """Let the operator stand where the node stood, behind all of its operands."""
    node.prepend(producer.node)
    result = producer.node
    if producer.permute is not None:
        node.prepend(producer.permute)
        result = producer.permute
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
