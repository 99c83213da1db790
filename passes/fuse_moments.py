"""Statistics of a quantizer's input by the integer operator that makes it."""

import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.ops._directions import DIRECTIONS
from qmir_ao.ops.chain_quantize import ChainArgs
from qmir_ao.passes.base import Pass, writes_near
from qmir_ao.passes.chain import PARTS, is_permute, reads_shape
from qmir_ao.passes.channel_map import View, follow, path_from, whole
from qmir_ao.passes.epilogues import MOMENTS, OWN_ARGUMENTS, epilogue_of, own_arguments
from qmir_ao.passes.sizes import Known, known_sizes, permutation
from qmir_ao.quant.constants import attribute, register_constant
from qmir_ao.quant.patterns import arguments

qmir = torch.ops.qmir


@dataclasses.dataclass
class _Producer:
    """An integer operator, the quantizers of its results, and what each channel is shifted by."""

    node: Node
    offset: Tensor
    known: Tensor
    readers: list[tuple[Node, Tensor]] = dataclasses.field(default_factory=list)

    def take(self, quantizer: Node, channels: Tensor, offset: Tensor) -> bool:
        """Add a quantizer, unless another one shifts the same channels otherwise."""
        flat = channels.flatten()
        if bool((self.known[flat] & (self.offset[flat] != offset.flatten())).any()):
            return False
        self.offset[flat], self.known[flat] = offset.flatten(), True
        self.readers.append((quantizer, flat))
        return True


class FuseMoments(Pass):
    """Let an integer operator find the statistics of its results for the quantizers that read them.

    A quantizer with one step for each sample reads its input twice, for the statistics and for the
    codes. Where a convolution, a linear layer or a scan of an image made it, as a whole or pieces
    of its channels, the statistics follow from those of the channels, which the operator finds
    while a tile is at hand; the input is read once. An activation between them, which nothing else
    reads, goes into the operator's epilogue. Quantizers of tokens read once anyway.

        before: y = conv2d(q, ...); r, s, b = chain_quantize(y, activation="gelu", offset=shift)
        after:  y, m = conv2d_moments(q, ..., activation="gelu", moments_offset=shift)
                r, s, b = chain_quantize(y, offset=shift, moments=m)

    The values are the same ones; they are added up in another order, in double precision. A step or
    shift, rounded to float32, then differs less than once in a million times, by one unit.
    """

    requires = ("FuseNormChain",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Fuse every quantizer that qualifies."""
        nodes = list(graph_module.graph.nodes)
        if writes_near(nodes):
            return 0  # the operator sees its results before something writes into them
        known = known_sizes(graph_module)
        producers: dict[Node, _Producer] = {}
        for node in nodes:
            if node.target is qmir.chain_quantize.default:
                _match(graph_module, node, known, producers)
        for producer in producers.values():
            _fuse(graph_module, producer)
        return sum(len(p.readers) for p in producers.values())


def _is_producer(node: Node) -> bool:
    return node.target in MOMENTS


def _match(
    graph_module: GraphModule, node: Node, known: Known, producers: dict[Node, _Producer]
) -> None:
    args = ChainArgs(*arguments(node))
    moves = args.activation != "none"
    if not args._replace(activation="none").may_have_moments or args.moments is not None:
        return
    found = path_from(_is_producer, _node(args.x))
    if found is None:
        return
    source, path = found
    if moves and not _may_activate(source, path, node):
        return
    view = _view(graph_module, source, path, known)
    offset = None if view is None else _offset(graph_module, args, view)
    if view is None or offset is None:
        return
    features = _features(graph_module, source)
    producer = producers.setdefault(
        source, _Producer(source, torch.zeros(features), torch.zeros(features, dtype=torch.bool))
    )
    if producer.take(node, view.channels, offset) and moves:
        _move_activation(source, node, args)


def _node(value: Any) -> Node:
    assert isinstance(value, Node)
    return value


def _features(graph_module: GraphModule, node: Node) -> int:
    """Channels of a producer's result; 0 where nothing says so."""
    args = arguments(node)
    if node.target is qmir.linear.default:
        return int(args[8])
    if node.target is qmir.conv2d.default:
        return int(args[9][0])
    decays = args[6]  # those of four directions
    if decays.op != "get_attr":
        return 0
    return int(attribute(graph_module, str(decays.target)).shape[0]) // DIRECTIONS


def _view(graph_module: GraphModule, source: Node, path: list[Node], known: Known) -> View | None:
    """Which channels the end of the path holds."""
    features = _features(graph_module, source)
    if source.target is not qmir.linear.default:
        return follow(path, whole(4, 1, features), known) if features else None
    sizes = known.sizes.get(source)
    # A symbolic trace knows no ranks, but a permute names one.
    ranks = [len(order) for n in path if is_permute(n) and (order := permutation(n)) is not None]
    rank = len(sizes) if sizes is not None else ranks[0] if ranks else 0
    return follow(path, whole(rank, -1, features), known) if rank > 1 else None


def _offset(graph_module: GraphModule, args: ChainArgs, view: View) -> Tensor | None:
    """What is added to each channel of a view, in its order; None where that is unknown."""
    if args.offset is None:
        return torch.zeros(view.channels.shape)
    given: Tensor = attribute(graph_module, str(_node(args.offset).target))
    shift = given.detach().float().reshape(-1)
    if shift.numel() == 1:
        return shift.expand(view.channels.shape)
    axis = view.axis(args.dim)
    if axis is None or view.channels.shape[axis] != shift.numel():
        return None
    behind = view.channels.dim() - 1 - axis
    return shift.reshape(-1, *[1] * behind).expand(view.channels.shape)


def _may_activate(source: Node, path: list[Node], quantizer: Node) -> bool:
    """Whether nothing but the quantizer reads the result, so that it may be activated."""
    if source.target not in OWN_ARGUMENTS or epilogue_of(source).activation != "none":
        return False
    for node, reader in zip([source, *path], [*path, quantizer], strict=True):
        if any(user is not reader and not reads_shape(user) for user in node.users):
            return False
    return True


def _move_activation(source: Node, quantizer: Node, args: ChainArgs) -> None:
    end = epilogue_of(source)._replace(activation=args.activation)
    source.args = (*own_arguments(source), *end)
    quantizer.update_arg(ChainArgs._fields.index("activation"), "none")
    # The chain's parts are an activation and, it may be, a shift; see `parts_of`.
    activation, *rest = quantizer.meta[PARTS]
    quantizer.meta[PARTS] = tuple(rest)
    source.meta[PARTS] = (*source.meta.get(PARTS, ()), activation)


def _fuse(graph_module: GraphModule, producer: _Producer) -> None:
    """Change the operator in place: reports and comparisons know it by its name."""
    if not producer.readers:
        return
    node, graph = producer.node, graph_module.graph
    with graph.inserting_before(node):
        shift = _shift(graph_module, producer)
    with graph.inserting_after(node):
        y = graph.call_function(operator.getitem, (node, 0))
    with graph.inserting_after(y):
        moments = graph.call_function(operator.getitem, (node, 1))
    y.meta = {"val": value} if (value := node.meta.pop("val", None)) is not None else {}
    node.replace_all_uses_with(y, delete_user_cb=lambda user: user not in (y, moments))
    end = epilogue_of(node) if node.target in OWN_ARGUMENTS else ()
    node.args = (*own_arguments(node), *end, shift)
    node.target = MOMENTS[node.target]
    every = torch.arange(producer.offset.numel())
    for quantizer, channels in producer.readers:
        chosen = None
        if not torch.equal(channels, every):
            with graph.inserting_before(quantizer):
                chosen = _constant(graph_module, f"{quantizer.name}_channels", channels)
        own = arguments(quantizer)[: ChainArgs._fields.index("moments")]
        quantizer.args = (*own, moments, chosen)


def _shift(graph_module: GraphModule, producer: _Producer) -> Node | None:
    """What is added to each channel, the quantizer's own constant where that is all of it."""
    if not bool((producer.offset != 0).any()):
        return None
    quantizer, channels = producer.readers[0]
    own: Any = ChainArgs(*arguments(quantizer)).offset
    if own is not None and torch.equal(channels, torch.arange(producer.offset.numel())):
        value = attribute(graph_module, str(own.target))
        if torch.equal(value.reshape(-1), producer.offset):
            return graph_module.graph.get_attr(str(own.target))
    return _constant(graph_module, f"{producer.node.name}_moments_offset", producer.offset)


def _constant(graph_module: GraphModule, name: str, value: Tensor) -> Node:
    return graph_module.graph.get_attr(register_constant(graph_module, name, value))
