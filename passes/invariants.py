"""What must hold of a graph between passes, by name: each check yields what breaks it.

`check_invariants` runs the ones that hold always (`ALWAYS`) and those that passes ensured so far.
"""

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

import qmir_ao.ops.chain_quantize
import qmir_ao.ops.conv2d
import qmir_ao.ops.linear
import qmir_ao.ops.selective_scan_q
import qmir_ao.ops.ss2d_scan_q  # noqa: F401  (define the operators named below)
from qmir_ao.capture.recurrence import call_name
from qmir_ao.errors import PassOrderError
from qmir_ao.passes.base import writes
from qmir_ao.passes.dedupe_constants import repeated_constants
from qmir_ao.passes.drop_identity import identities
from qmir_ao.passes.epilogues import OWN_ARGUMENTS
from qmir_ao.passes.evaluate import known_value
from qmir_ao.passes.fold import unfolded
from qmir_ao.passes.moves import MOVES
from qmir_ao.passes.share_quantize import repeated_quantizers
from qmir_ao.quant.constants import attribute
from qmir_ao.quant.patterns import arguments, module_of
from qmir_ao.quant.prepare import is_fake_quantize

aten, qmir = torch.ops.aten, torch.ops.qmir

CODES: dict[Any, tuple[int, ...]] = {
    qmir.linear.default: (0,),
    qmir.conv2d.default: (0,),
    qmir.linear_moments.default: (0,),
    qmir.conv2d_moments.default: (0,),
    qmir.selective_scan_q.default: (0, 3, 7, 10),
    qmir.ss2d_scan_q.default: (0, 3, 7, 10),
    qmir.ss2d_scan_q_moments.default: (0, 3, 7, 10),
}
"""Operands that are codes of activations."""
_PACKED = tuple(OWN_ARGUMENTS)
_CODE_TYPES = (torch.int8, torch.uint8)


def _nodes_in_order(graph_module: GraphModule) -> Iterator[str]:
    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        yield f"the graph is malformed: {error}"
    outputs = [n for n in graph_module.graph.nodes if n.op == "output"]
    if len(outputs) != 1:
        yield f"the graph has {len(outputs)} outputs, expected 1"


def _attributes_are_tensors(graph_module: GraphModule) -> Iterator[str]:
    for node in graph_module.graph.nodes:
        if node.op != "get_attr":
            continue
        try:
            value = attribute(graph_module, str(node.target))
        except AttributeError:
            yield f"node {node.name} reads {node.target!r}, which was removed"
            continue
        if not isinstance(value, Tensor):
            yield f"node {node.name} reads {node.target!r}, a {type(value).__name__}"


def _one_vocabulary(graph_module: GraphModule) -> Iterator[str]:
    for node in graph_module.graph.nodes:
        convolves = node.target in (F.conv1d, F.conv2d)
        named = any(isinstance(a, str) for a in (*arguments(node), *node.kwargs.values()))
        if node.target is F.linear or (convolves and not named):
            yield f"node {node.name} calls {call_name(node)} of torch.nn.functional"


def _image_scans_get_images(graph_module: GraphModule) -> Iterator[str]:
    for node in graph_module.graph.nodes:
        if node.target not in (qmir.ss2d_scan.default, qmir.ss2d_scan):
            continue
        for position, rank in ((0, 4), (1, 4), (3, 5), (4, 5)):
            value = known_value(arguments(node)[position])
            if isinstance(value, Tensor) and value.dim() != rank:
                yield f"node {node.name} gets operand {position} of rank {value.dim()}, not {rank}"


def _quantizers_are_operators(graph_module: GraphModule) -> Iterator[str]:
    for node in graph_module.graph.nodes:
        module = module_of(graph_module, node)
        if module is not None and is_fake_quantize(module) and hasattr(module, "convert"):
            yield f"node {node.name} still calls the fake-quantizer {node.target}"


def _constants_are_folded(graph_module: GraphModule) -> Iterator[str]:
    for node in unfolded(graph_module):
        yield f"node {node.name} computes a constant"


def _weights_are_packed(graph_module: GraphModule) -> Iterator[str]:
    for node in graph_module.graph.nodes:
        sources = arguments(node)[:4]
        if node.target is qmir.rfa_fake_quant.default and all(
            isinstance(s, Node) and s.op == "get_attr" for s in sources
        ):
            yield f"node {node.name} keeps a float weight that is a constant"
        if node.target is qmir.rfa_dequantize.default and arguments(node)[0].op == "get_attr":
            packed = attribute(graph_module, str(arguments(node)[0].target))
            if packed.dtype != torch.uint8:
                yield f"node {node.name} reads packed weights of type {packed.dtype}"


def _integers_get_codes(graph_module: GraphModule) -> Iterator[str]:
    for node in graph_module.graph.nodes:
        for position in CODES.get(node.target, ()):
            source = _origin(arguments(node)[position])
            if not _makes_codes(graph_module, source):
                yield f"node {node.name} gets operand {position} from {source.name}, not from codes"
        if node.target in _PACKED:
            packed = arguments(node)[3]
            value = attribute(graph_module, packed.target) if packed.op == "get_attr" else None
            if value is not None and value.dtype != torch.uint8:
                yield f"node {node.name} reads packed weights of type {value.dtype}"


def _origin(node: Node) -> Node:
    """Where codes were made, before they were moved."""
    while (
        call_name(node) in MOVES
        and node.args
        and isinstance(node.args[0], Node)
        and node.args[0].target is not qmir.chain_quantize.default
    ):
        node = node.args[0]
    return node


def _makes_codes(graph_module: GraphModule, node: Node) -> bool:
    if node.target is qmir.dls_quantize.default:
        return True
    if node.target is operator.getitem:
        source, index = arguments(node)
        return source.target is qmir.chain_quantize.default and index == 0
    if node.op == "get_attr":
        return attribute(graph_module, str(node.target)).dtype in _CODE_TYPES
    if node.op == "placeholder":
        value = known_value(node)
        return not isinstance(value, Tensor) or value.dtype in _CODE_TYPES
    return call_name(node) in ("to", "_to_copy") and any(
        a in _CODE_TYPES for a in (*node.args, *node.kwargs.values())
    )


def _codes_are_made_once(graph_module: GraphModule) -> Iterator[str]:
    for node in repeated_quantizers(graph_module):
        yield f"node {node.name} makes codes that exist already"


def _constants_are_held_once(graph_module: GraphModule) -> Iterator[str]:
    for node in repeated_constants(graph_module):
        yield f"node {node.name} reads {node.target!r}, whose bytes another name holds as well"


def _no_identity_is_left(graph_module: GraphModule) -> Iterator[str]:
    for node in identities(graph_module):
        yield f"node {node.name} returns what it gets"


def _everything_is_read(graph_module: GraphModule) -> Iterator[str]:
    for node in graph_module.graph.nodes:
        if not node.users and not node.is_impure() and not writes(node):
            yield f"nothing reads node {node.name}"


Check = Callable[[GraphModule], Iterator[str]]
ALWAYS: dict[str, Check] = {
    "attributes_are_tensors": _attributes_are_tensors,
    "nodes_in_order": _nodes_in_order,
    "integers_get_codes": _integers_get_codes,
}
"""What holds after every pass."""
INVARIANTS: dict[str, Check] = {
    "one_vocabulary": _one_vocabulary,
    "image_scans_get_images": _image_scans_get_images,
    "quantizers_are_operators": _quantizers_are_operators,
    "constants_are_folded": _constants_are_folded,
    "weights_are_packed": _weights_are_packed,
    "codes_are_made_once": _codes_are_made_once,
    "constants_are_held_once": _constants_are_held_once,
    "no_identity_is_left": _no_identity_is_left,
    "everything_is_read": _everything_is_read,
}
"""What passes may ensure."""


def check_invariants(graph_module: GraphModule, after: str, ensured: Iterable[str] = ()) -> None:
    """Raise `PassOrderError` if a pass left a malformed graph or broke what was ensured.

    Args:
        graph_module: the graph.
        after: name of the pass that ran.
        ensured: names of the invariants that this pass and earlier ones ensure.
    """
    checks = ALWAYS | {name: INVARIANTS[name] for name in ensured}
    for name, check in checks.items():
        broken = next(check(graph_module), None)
        if broken is not None:
            raise PassOrderError(f"{name} does not hold after {after}: {broken}")
