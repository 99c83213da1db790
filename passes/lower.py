"""Replace float operators between dequantize and dequantize by integer operators."""

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

import qmir_ao.ops.conv2d
import qmir_ao.ops.dls_fake_quant
import qmir_ao.ops.linear
import qmir_ao.ops.selective_scan
import qmir_ao.ops.selective_scan_q
import qmir_ao.ops.ss2d_scan
import qmir_ao.ops.ss2d_scan_q  # noqa: F401  (define the operators named below)
from qmir_ao.passes.base import Pass
from qmir_ao.passes.offsets import linear_bias
from qmir_ao.quant.patterns import arguments, module_path

aten, qmir = torch.ops.aten, torch.ops.qmir

SOURCE = "qmir_source"
"""Key of `node.meta`: the node of the prepared graph that a lowered node stands for."""
REASON = "qmir_float_reason"
"""Key of `node.meta`: why a quantizable operator stays in float."""


def codes_of(node: Any) -> tuple[Node, Node, Node] | None:
    """(codes, step, shift) where `node` is their dequantized value, else None."""
    if isinstance(node, Node) and node.target is qmir.dls_dequantize.default:
        codes, step, shift = arguments(node)
        return codes, step, shift
    return None


def without_offset(node: Any) -> tuple[Any, Node | None]:
    """The dequantized value and what is subtracted from it for each channel, or None."""
    if isinstance(node, Node) and node.target in _SUBTRACTIONS:
        value, offset = arguments(node)[:2]
        if isinstance(offset, Node) and codes_of(value) is not None:
            return value, offset
    return node, None


def weight_of(node: Any) -> tuple[Any, ...] | None:
    """(packed, step, shift, size, bits) where `node` is a dequantized weight, else None."""
    if isinstance(node, Node) and node.target is qmir.rfa_dequantize.default:
        return arguments(node)
    return None


def code_range(codes: Node) -> tuple[int, int]:
    """Smallest and largest code a quantize node makes."""
    low, high = codes.meta.get("qmir_range") or arguments(codes)[3:5]
    return int(low), int(high)


def code_width(codes: Node) -> int:
    """Bits of the codes a quantize node makes."""
    low, high = code_range(codes)
    return (high - low).bit_length()


_WEIGHT_IN_FLOAT = "its weight is not quantized"
_SUBTRACTIONS = (aten.sub.Tensor, operator.sub, torch.sub)


def _finish(node: Node, new: Node, lowered: Node, act_bits: int, levels_bits: int | None) -> None:
    path = str(node.meta.get("qmir_module") or module_path(node))
    new.meta = {k: v for k, v in node.meta.items() if k != REASON}
    lowered.meta.update(
        {
            SOURCE: node.meta.get(SOURCE, node.name),
            "qmir_module": path,
            "act_bits": act_bits,
            "weight_bits": levels_bits,
        }
    )
    node.replace_all_uses_with(new)


def _both(node: Node) -> tuple[Any, Any] | None:
    """Codes and weight of a linear or convolution node; notes the reason where one is missing."""
    x = codes_of(without_offset(arguments(node)[0])[0])
    w = weight_of(arguments(node)[1])
    if x is None and w is None:
        return None
    if x is None or w is None:
        why = f"its input {_why_float(arguments(node)[0])}" if x is None else _WEIGHT_IN_FLOAT
        node.meta.setdefault(REASON, why)
        return None
    return x, w


def _why_float(value: Any) -> str:
    """Why an operand arrives without codes."""
    node = value
    while isinstance(node, Node) and node.target in (*_SUBTRACTIONS, aten.view_as.default):
        node = arguments(node)[0]
    if isinstance(node, Node) and node.target is qmir.dls_fake_quant.default:
        if arguments(node)[-1]:
            return "is clipped to its own range (clamp_output), off the integer grid"
        return "has codes above 127, which int8 cannot hold"
    return "is not quantized"


class DecomposeFakeQuantize(Pass):
    """Split DLS fake-quantize operators on activations into qparams, quantize and dequantize.

    torch.compile traces through the fake-quantizer modules and leaves such operators. Those with
    an output clamp are off the integer grid and stay. Exact.
    """

    def rewrite(self, graph_module: GraphModule) -> int:
        """Split every fake-quantize operator that lies on the integer grid."""
        changed = 0
        for node in list(graph_module.graph.nodes):
            if node.target is not qmir.dls_fake_quant.default:
                continue
            x, w, v, low, high, per_tensor, cap, clamp = arguments(node)
            if clamp or high > 127:
                continue
            graph = graph_module.graph
            source, replaced = _tokens(node, x)
            with graph.inserting_before(node):
                predicted = graph.call_function(
                    qmir.dls_qparams.default, (x, w, v, low, high, per_tensor, cap)
                )
                grid = [graph.call_function(operator.getitem, (predicted, i)) for i in (0, 1)]
                codes = graph.call_function(qmir.dls_quantize.default, (source, *grid, low, high))
                values = graph.call_function(qmir.dls_dequantize.default, (codes, *grid))
            values.meta = dict(replaced[0].meta)
            for old in replaced:
                old.replace_all_uses_with(values)
            changed += 1
        return changed


def _tokens(node: Node, x: Node) -> tuple[Node, list[Node]]:
    """What a fake-quantize operator reads and what stands for its result.

    Where a per-token quantizer flattened its input and reshaped its result, the tensors outside of
    the two.
    """

    def shape(n: Node) -> Any:
        value = n.meta.get("example_value", n.meta.get("val"))
        return None if value is None else value.shape

    users = list(node.users)
    if x.target != "flatten" or not users or any(u.target != "reshape" for u in users):
        return x, [node]
    source = x.all_input_nodes[0]
    known = shape(source)
    if known is None or any(shape(u) != known for u in users):
        return x, [node]
    return source, users


class LowerLinear(Pass):
    """Replace a linear operator on codes and packed weights by `qmir::linear`.

    Accumulators are exact; the float epilogue rounds as the operator's reference states.

        before: y = linear(dls_dequantize(q, s, b), rfa_dequantize(p, ...), bias)
        after:  y = qmir.linear(q, s, b, p, step, shift, bias, bits, out_features)
    """

    requires = ("FoldWeights",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Lower every linear operator whose operands are both quantized."""
        changed = 0
        for node in list(graph_module.graph.nodes):
            if node.target is not aten.linear.default or (operands := _both(node)) is None:
                continue
            x, (packed, step, shift, size, bits) = operands
            bias = arguments(node)[2] if len(arguments(node)) > 2 else None
            _, offset = without_offset(arguments(node)[0])
            with graph_module.graph.inserting_before(node):
                if offset is not None:
                    bias = linear_bias(graph_module, bias, offset, arguments(node)[1])
                new = graph_module.graph.call_function(
                    qmir.linear.default, (*x, packed, step, shift, bias, bits, size[0])
                )
            _finish(node, new, new, code_width(x[0]), bits)
            changed += 1
        return changed


class LowerConv(Pass):
    """Replace a convolution on codes and packed weights by `qmir::conv2d`.

    A one-dimensional convolution becomes a two-dimensional one of height 1. Zero padding pads the
    value 0, not the code 0: the operator counts only taps inside the image, also where it takes the
    channel shift of its input into account. Accumulators are exact.
    """

    requires = ("FoldWeights",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Lower every convolution whose operands are both quantized."""
        changed = 0
        for node in list(graph_module.graph.nodes):
            if node.target is aten.conv2d.default:
                rank = 2
            elif node.target is aten.conv1d.default:
                rank = 1
            else:
                continue
            operands = _both(node)
            if operands is None:
                continue
            with graph_module.graph.inserting_before(node):
                new, lowered = _lower_conv(graph_module.graph, node, operands, rank)
            x, (_, _, _, _, bits) = operands
            _finish(node, new, lowered, code_width(x[0]), bits)
            changed += 1
        return changed


def _lower_conv(graph: Graph, node: Node, pair: tuple[Any, Any], rank: int) -> tuple[Node, Node]:
    (codes, x_step, x_shift), (packed, step, shift, size, bits) = pair
    defaults = (None, None, None, [1] * rank, [0] * rank, [1] * rank, 1)
    args = (*arguments(node), *defaults[len(arguments(node)) :])
    bias, stride, padding, dilation, groups = args[2:7]
    size = list(size)
    if rank == 1:
        codes = graph.call_function(aten.unsqueeze.default, (codes, 2))
        size = [*size[:2], 1, size[2]]
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    geometry = (list(stride), list(padding), list(dilation))
    _, offset = without_offset(arguments(node)[0])
    operands = (codes, x_step, x_shift, packed, step, shift, bias, offset)
    lowered = graph.call_function(qmir.conv2d.default, (*operands, bits, size, *geometry, groups))
    if rank == 1:
        return graph.call_function(aten.squeeze.dim, (lowered, 2)), lowered
    return lowered, lowered


_INTEGER_SCANS: dict[Any, Any] = {
    qmir.selective_scan.default: qmir.selective_scan_q.default,
    qmir.selective_scan: qmir.selective_scan_q.default,
    qmir.ss2d_scan.default: qmir.ss2d_scan_q.default,
    qmir.ss2d_scan: qmir.ss2d_scan_q.default,
}


class LowerScan(Pass):
    """Replace a selective scan on codes by `qmir::selective_scan_q` or `qmir::ss2d_scan_q`.

    u, delta, B and C arrive as codes; A, D and the delta bias are constants on their grid. With
    b-bit delta, exp(delta * A) is read from a table of 2^b entries.
    """

    requires = ("FoldConstants",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Lower every scan whose sequences are all quantized."""
        changed = 0
        for node in list(graph_module.graph.nodes):
            integer = _INTEGER_SCANS.get(node.target)
            if integer is None:
                continue
            u, delta, A, B, C, D, bias, softplus = arguments(node)
            sequences = [codes_of(x) for x in (u, delta, B, C)]
            if any(s is None for s in sequences):
                named = zip(("u", "delta", "B", "C"), (u, delta, B, C), sequences, strict=True)
                whys = {name: _why_float(x) for name, x, codes in named if codes is None}
                if len(whys) < len(sequences) or set(whys.values()) != {"is not quantized"}:
                    told = "; ".join(f"its {name} {why}" for name, why in whys.items())
                    node.meta.setdefault(REASON, told)
                continue
            qu, qdelta, qB, qC = (s for s in sequences if s is not None)
            low, high = code_range(qdelta[0])
            with graph_module.graph.inserting_before(node):
                new = graph_module.graph.call_function(
                    integer,
                    (*qu, *qdelta, A, *qB, *qC, D, bias, softplus, low, high),
                )
            _finish(node, new, new, code_width(qu[0]), None)
            changed += 1
        return changed
