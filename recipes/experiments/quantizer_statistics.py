"""What the quantizers of a trained network do to an image: error, clipping, codes used."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from qmir_ao.ops.dls import dls_qparams
from qmir_ao.ops.rfa_fake_quant import rfa_fake_quant
from qmir_ao.quant._bases import QmirFakeQuantize
from qmir_ao.quant.fake_quant import DLSFakeQuantize
from qmir_ao.quant.patterns import PATTERNS, SCAN, is_constant, match, module_of, module_path
from qmir_ao.quant.rfa import RFAFakeQuantize
from qmir_ao.quant.rivals.activations import QuantSRFakeQuantize
from qmir_ao.quant.static import StaticFakeQuantize

CLIPPED_FROM = 0.501
"""Distance from its level, in steps, from which a value counts as clipped."""


@dataclass(frozen=True)
class Measured:
    """What one quantizer did to some images.

    Attributes:
        kind: what reads it: "linear", "conv" or "scan", with " weights" where it is a weight.
        layer: path of the module that reads it, and of a scan the operand.
        values: see `quantizer_statistics`.
    """

    kind: str
    layer: str
    values: dict[str, float]


@torch.inference_mode()
def measure_quantizers(prepared: GraphModule, image: Tensor) -> list[Measured]:
    """What every quantizer of a network does to some images, in the order of the network.

    Args:
        prepared: trained network with fake-quantizers, in `eval()`.
        image: inputs, shape (B, C, H, W), values in [0, 1].
    """
    found: list[Measured] = []
    hooks = []
    for node in prepared.graph.nodes:
        module = module_of(prepared, node)
        if isinstance(module, QmirFakeQuantize) and (read := _reader(prepared, node)) is not None:
            hooks.append(module.register_forward_hook(_hook(found, *read)))
    paths = {module: name for name, module in prepared.named_modules()}
    for module, kind in weight_quantizers(prepared).items():
        layer = paths[module].removesuffix(".weight_fake_quant")
        hooks.append(module.register_forward_hook(_hook(found, f"{kind} weights", layer)))
    try:
        prepared(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def quantizer_statistics(measured: Iterable[Measured]) -> dict[str, dict[str, float]]:
    """Statistics of the quantizers by what reads them, averaged over the quantizers of a kind.

    Returns:
        For "linear", "conv", "scan" (the sequences), "weights", and "linear weights", "conv
        weights" and "scan weights" (a scan's projections) out of these: `sqnr` in dB (of a tensor
        and its quantized form), `count` of quantizers, and for activations `clipped` (share of
        values more than half a step from their level) and `entropy` (bits per code; the width is
        its limit). With RFA weights also have `threshold_movement` and `threshold_movement_max`,
        the mean and largest distance of thresholds from their start in steps, `moved_codes`, the
        share of codes that this changes, and `sqnr_unmoved`, what `sqnr` is without.
    """
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for one in measured:
        found[one.kind].append(one.values)
        if one.kind.endswith("weights"):
            found["weights"].append(one.values)
    return {kind: _average(rows) for kind, rows in sorted(found.items())}


def layer_statistics(measured: Iterable[Measured]) -> list[dict[str, Any]]:
    """The activation quantizers one by one: `layer`, `kind`, `sqnr`, `clipped`, `entropy`."""
    return [
        {"layer": one.layer, "kind": one.kind, **{k: round(v, 4) for k, v in one.values.items()}}
        for one in measured
        if not one.kind.endswith("weights")
    ]


def weight_quantizers(prepared: GraphModule) -> dict[QmirFakeQuantize, str]:
    """Fake-quantizers of weights: "linear", "conv", or "scan" for a scan's projections.

    In a symbolic trace a projection of a scan is a convolution whose weight no layer holds.
    """
    found = {}
    for node in prepared.graph.nodes:
        module = module_of(prepared, node)
        if isinstance(module, QmirFakeQuantize) and module.quantizes_weights:
            kinds = [p.kind for user in node.users if (p := match(prepared, user))]
            found[module] = "scan" if "conv" in kinds else next(iter(kinds), "other")
    # Those of layers, which the graph does not show.
    for layer in prepared.modules():
        quantizer = getattr(layer, "weight_fake_quant", None)
        if isinstance(quantizer, QmirFakeQuantize):
            found[quantizer] = next(p.kind for p in PATTERNS if isinstance(layer, p.modules))
    return found


def _reader(prepared: GraphModule, node: Any) -> tuple[str, str] | None:
    """Kind and path of what reads an activation quantizer; None for parameters."""
    module = module_of(prepared, node)
    assert isinstance(module, QmirFakeQuantize)
    if module.quantizes_weights or is_constant(node.all_input_nodes[0]):
        return None
    readers = {p.kind: user for user in node.users if (p := match(prepared, user))}
    if SCAN.kind in readers:
        scan = readers[SCAN.kind]
        return "scan", f"{module_path(scan)}, {_operand_name(scan, node)} of the scan"
    return next(((kind, module_path(user)) for kind, user in readers.items()), None)


def _operand_name(call: Node, operand: Node) -> str:
    """What the operator's schema calls an operand of a call."""
    # A symbolic trace calls the packet of overloads, of which these operators have one.
    called = cast(Any, call.target)
    overload = called if isinstance(called, OpOverload) else called.default
    return str(overload._schema.arguments[call.args.index(operand)].name)


def _hook(found: list[Measured], kind: str, layer: str) -> Any:
    def record(module: QmirFakeQuantize, args: tuple[Tensor, ...], y: Tensor) -> None:
        found.append(Measured(kind, layer, _measure(module, args[0].float(), y.float())))

    return record


def _measure(module: QmirFakeQuantize, x: Tensor, y: Tensor) -> dict[str, float]:
    if isinstance(module, QuantSRFakeQuantize) and module.channel_dim is not None:
        x = x + module.tau  # it quantizes this sum, and the next layer expects it
    row = {"sqnr": _sqnr(x, y)}
    if isinstance(module, RFAFakeQuantize):
        row |= _thresholds(module, x, y)
    elif isinstance(module, DLSFakeQuantize | StaticFakeQuantize):
        step, codes = _codes(module, x, y)
        row["clipped"] = float(((x - y).abs() > CLIPPED_FROM * step).double().mean())
        share = torch.bincount(codes).double() / codes.numel()
        share = share[share > 0]
        row["entropy"] = float(-(share * share.log2()).sum())
    return row


def _thresholds(module: RFAFakeQuantize, x: Tensor, y: Tensor) -> dict[str, float]:
    """How far the thresholds have moved from the integers, and what that does to the codes."""
    start = torch.arange(module.thresholds.numel()) + float(module.quant_min)
    movement = (module.thresholds - start).abs()
    unmoved = rfa_fake_quant(x, module.step, module.shift, start, module.quant_min)
    # Levels lie a step apart, so equal codes differ by no more than rounding.
    changed = (unmoved - y).abs().flatten(1) > 0.5 * module.step.reshape(-1, 1)
    return {
        "threshold_movement": float(movement.mean()),
        "threshold_movement_max": float(movement.max()),
        "moved_codes": float(changed.double().mean()),
        "sqnr_unmoved": _sqnr(x, unmoved),
    }


def _sqnr(x: Tensor, y: Tensor) -> float:
    """Signal to quantization noise in dB."""
    error, power = (y - x).double().square().sum(), x.double().square().sum()
    tiny = torch.finfo(torch.float64).tiny
    return 10 * float(torch.log10((power + tiny) / (error + tiny)))


def _codes(module: QmirFakeQuantize, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Step of each value and its code counted from the lowest."""
    if isinstance(module, DLSFakeQuantize):
        offset = 0.0 if module.channel_dim is None else module._offset(x)
        rows = module._grouped(x + offset)
        step, shift = dls_qparams(
            rows, module.scale_weights, module.shift_weights, module.quant_min, module.quant_max,
            module.per_tensor, module.cap,
        )  # fmt: skip
        per_value = [-1, *[1] * (rows.dim() - 1)]
        step = step.reshape(per_value).expand(rows.shape).reshape(x.shape)
        shift = shift.reshape(per_value).expand(rows.shape).reshape(x.shape)
        y = y + offset
    else:
        assert isinstance(module, StaticFakeQuantize)
        step, shift = module.grid()
    codes = torch.round((y + shift) / step) - module.quant_min
    return step, codes.clamp(0, module.quant_max - module.quant_min).long().reshape(-1)


def _average(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    averages = {name: round(fmean(r[name] for r in rows if name in r), 4) for name in names}
    return {"count": len(rows), **averages}
