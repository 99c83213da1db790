"""What became of each operator: integers or float, at how many bytes, and why."""

import dataclasses
import itertools
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qmir_ao.passes.chain import PARTS, parts_of
from qmir_ao.passes.epilogues import epilogue_of, epilogue_parts
from qmir_ao.passes.lower import REASON, SOURCE
from qmir_ao.quant.constants import attribute
from qmir_ao.quant.patterns import arguments, module_path

aten, qmir = torch.ops.aten, torch.ops.qmir

KINDS: dict[Any, str] = {
    qmir.linear.default: "linear",
    qmir.conv2d.default: "conv2d",
    qmir.linear_moments.default: "linear",
    qmir.conv2d_moments.default: "conv2d",
    qmir.selective_scan_q.default: "selective_scan",
    qmir.ss2d_scan_q.default: "selective_scan",
    qmir.ss2d_scan_q_moments.default: "selective_scan",
}
_PLUMBING = (
    "getitem getattr size sym_size reshape view permute transpose flip stack cat split chunk "
    "split_with_sizes unbind select slice squeeze unsqueeze expand contiguous flatten clone "
    "pixel_shuffle check_input check_sizes full ones zeros new_ones "
    "ones_like zeros_like lift_fresh_copy floordiv alias detach _assert_tensor_metadata to t roll "
    "index_select gather scatter pixel_unshuffle unflatten slice_scatter select_scatter index "
    "swapaxes movedim narrow"
).split()
_OF_SIZES = ("size", "sym_size", "getattr", "ones_like", "zeros_like", "new_ones", "new_zeros")
_WEIGHTED = (
    "linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "matmul bmm mm addmm baddbmm einsum scaled_dot_product_attention gru lstm rnn_tanh rnn_relu"
).split()
_NORMS = "layer_norm batch_norm group_norm instance_norm rms_norm native_layer_norm".split()


@dataclasses.dataclass(frozen=True)
class OperatorRecord:
    """One operator that runs on integer codes."""

    name: str
    source: str
    module: str
    kind: str
    weight_bits: int | None
    act_bits: int
    weight_bytes: int
    scale_bytes: int
    float_bytes: int


@dataclasses.dataclass(frozen=True)
class FloatRecord:
    """One operator that stays in float, and why."""

    name: str
    op: str
    module: str
    reason: str


@dataclasses.dataclass(frozen=True)
class LoweringReport:
    """All operators of a lowered model.

    Attributes:
        operators: what runs on integer codes.
        left_in_float: what does not; reshapes and other data movement are not listed.
        float_parameter_bytes: parameters of the operators in float.
    """

    operators: list[OperatorRecord]
    left_in_float: list[FloatRecord]
    float_parameter_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(r.weight_bytes for r in self.operators)

    @property
    def scale_bytes(self) -> int:
        """Bytes of their steps and shifts."""
        return sum(r.scale_bytes for r in self.operators)

    @property
    def float_bytes(self) -> int:
        """Bytes the quantized weights took in float32."""
        return sum(r.float_bytes for r in self.operators)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        totals = {
            "weight_bytes": self.weight_bytes,
            "scale_bytes": self.scale_bytes,
            "float_bytes": self.float_bytes,
        }
        return dataclasses.asdict(self) | totals

    def __str__(self) -> str:
        """A short table: integer operators by kind, then float operators by reason."""
        lines = [f"{len(self.operators)} operators on integer codes"]
        for kind in sorted({r.kind for r in self.operators}):
            lines.append(f"  {kind}: {sum(r.kind == kind for r in self.operators)}")
        lines.append(
            f"  weights: {self.weight_bytes} bytes packed (+ {self.scale_bytes} of scales), "
            f"{self.float_bytes} bytes in float32"
        )
        lines.append(f"{len(self.left_in_float)} operators in float")
        for reason in dict.fromkeys(r.reason for r in self.left_in_float):
            ops = [r.op for r in self.left_in_float if r.reason == reason]
            counts = ", ".join(f"{op} x{ops.count(op)}" for op in dict.fromkeys(ops))
            lines.append(f"  {reason}: {counts}")
        return "\n".join(lines)


def op_name(node: Node) -> str:
    """Short name of what a node calls, without namespace and overload."""
    if node.op == "call_function":
        target: Any = node.target
        packet = getattr(target, "overloadpacket", None)
        name = packet.__name__ if packet is not None else getattr(target, "__name__", str(target))
        return str(name)
    return str(node.target)


_OWN = (
    qmir.dls_qparams.default,
    qmir.dls_quantize.default,
    qmir.dls_dequantize.default,
    qmir.rfa_quantize.default,
    qmir.rfa_dequantize.default,
    qmir.pack.default,
)


def _is_own(node: Node) -> bool:
    """Whether a node turns values into codes or back."""
    return node.target in _OWN


def _reason(node: Node, name: str) -> str:
    if REASON in node.meta:
        return str(node.meta[REASON])
    if name in _NORMS:
        return "normalization stays in float, as in the paper"
    if name in _WEIGHTED or name in ("selective_scan", "ss2d_scan"):
        return "it has no quantizer"
    if node.op == "call_module":
        return "no integer form of this module"
    return "element-wise or pooling arithmetic stays in float"


def _bytes(graph_module: GraphModule, *nodes: Any) -> int:
    tensors = [
        attribute(graph_module, str(n.target))
        for n in nodes
        if isinstance(n, Node) and n.op == "get_attr"
    ]
    return sum(t.numel() * t.element_size() for t in tensors)


def _operator(graph_module: GraphModule, node: Node) -> OperatorRecord:
    kind = KINDS[node.target]
    weights = scales = floats = 0
    if kind != "selective_scan":
        packed, step, shift = arguments(node)[3:6]
        weights = _bytes(graph_module, packed)
        scales = _bytes(graph_module, step, shift)
        if kind == "conv2d":
            floats = 4 * torch.Size(arguments(node)[9]).numel()
        else:
            floats = 4 * weights * 8 // int(arguments(node)[7])
    return OperatorRecord(
        name=node.name,
        source=str(node.meta.get(SOURCE, node.name)),
        module=str(node.meta.get("qmir_module", "")),
        kind=kind,
        weight_bits=node.meta.get("weight_bits"),
        act_bits=int(node.meta.get("act_bits", 8)),
        weight_bytes=weights,
        scale_bytes=scales,
        float_bytes=floats,
    )


def _sizes(graph_module: GraphModule) -> set[Node]:
    """Nodes whose value depends on sizes alone: a size, a pixel's index, arithmetic on them."""
    found: set[Node] = set()
    for node in graph_module.graph.nodes:
        name = op_name(node)
        inputs = node.all_input_nodes
        if name in _OF_SIZES or (inputs and found.issuperset(inputs)):
            found.add(node)
    return found


def _fused(node: Node, parts: list[str]) -> list[FloatRecord]:
    """Records of the float operators that a node stands for."""
    pairs = itertools.zip_longest(parts, node.meta.get(PARTS, ()), fillvalue="")
    return [FloatRecord(node.name, part, path, _reason(node, part)) for part, path in pairs]


def make_report(graph_module: GraphModule) -> LoweringReport:
    """Read the report off a lowered graph."""
    operators, floats = [], []
    sizes = _sizes(graph_module)
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or node in sizes:
            continue
        name = op_name(node)
        if node.target in KINDS:
            operators.append(_operator(graph_module, node))
            floats += _fused(node, epilogue_parts(node))
        elif node.target is qmir.chain_quantize.default:
            floats += _fused(node, parts_of(node))
        elif name not in _PLUMBING and not _is_own(node):
            path = str(node.meta.get("qmir_module") or module_path(node))
            floats.append(FloatRecord(node.name, name, path, _reason(node, name)))
    # A channel shift belongs to a quantizer's float addition and to an integer operator.
    plain = [
        n
        for n in graph_module.graph.nodes
        if n.op == "get_attr"
        and attribute(graph_module, str(n.target)).is_floating_point()
        and any(u.target not in KINDS or n in epilogue_of(u) for u in n.users)
    ]
    targets = {n.target: n for n in plain}
    return LoweringReport(operators, floats, _bytes(graph_module, *targets.values()))
