"""What the quantizers of a trained network do to an image: error, clipping, codes used."""

from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qmir_ao.ops.dls import dls_qparams
from qmir_ao.quant._bases import QmirFakeQuantize
from qmir_ao.quant.fake_quant import DLSFakeQuantize
from qmir_ao.quant.patterns import is_constant, match, module_of
from qmir_ao.quant.rfa import RFAFakeQuantize
from qmir_ao.quant.rivals.activations import QuantSRFakeQuantize
from qmir_ao.quant.static import StaticFakeQuantize

CLIPPED_FROM = 0.501
"""Distance from its level, in steps, from which a value counts as clipped."""


@torch.inference_mode()
def quantizer_statistics(prepared: GraphModule, image: Tensor) -> dict[str, dict[str, float]]:
    """Statistics of the quantizers by what reads them, averaged over the quantizers of a kind.

    Args:
        prepared: trained network with fake-quantizers, in `eval()`.
        image: inputs, shape (B, C, H, W), values in [0, 1].

    Returns:
        For "linear", "conv", "scan" (the sequences) and "weights": `sqnr` in dB (of a tensor and
        its quantized form), `count` of quantizers, and for activations `clipped` (share of values
        more than half a step from their level) and `entropy` (bits per code; the width is its
        limit). With RFA "weights" also has `threshold_movement`, the mean distance of thresholds
        from their start in steps.
    """
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    hooks = []
    for node in prepared.graph.nodes:
        module = module_of(prepared, node)
        if isinstance(module, QmirFakeQuantize) and (kind := _kind(prepared, node)) is not None:
            hooks.append(module.register_forward_hook(_hook(found[kind])))
    # Those of weights may be inside of layers, where the graph does not show them.
    for module in prepared.modules():
        if isinstance(module, QmirFakeQuantize) and module.quantizes_weights:
            hooks.append(module.register_forward_hook(_hook(found["weights"])))
    try:
        prepared(image)
    finally:
        for hook in hooks:
            hook.remove()
    return {kind: _average(rows) for kind, rows in sorted(found.items())}


def _kind(prepared: GraphModule, node: Any) -> str | None:
    module = module_of(prepared, node)
    assert isinstance(module, QmirFakeQuantize)
    if module.quantizes_weights or is_constant(node.all_input_nodes[0]):
        return None
    kinds = {pattern.kind for user in node.users if (pattern := match(prepared, user))}
    if "selective_scan" in kinds:
        return "scan"
    return next(iter(kinds), None)


def _hook(rows: list[dict[str, float]]) -> Any:
    def record(module: QmirFakeQuantize, args: tuple[Tensor, ...], y: Tensor) -> None:
        rows.append(_measure(module, args[0].float(), y.float()))

    return record


def _measure(module: QmirFakeQuantize, x: Tensor, y: Tensor) -> dict[str, float]:
    if isinstance(module, QuantSRFakeQuantize) and module.channel_dim is not None:
        x = x + module.tau  # it quantizes this sum, and the next layer expects it
    error, power = (y - x).double().square().sum(), x.double().square().sum()
    tiny = torch.finfo(torch.float64).tiny
    row = {"sqnr": 10 * float(torch.log10((power + tiny) / (error + tiny)))}
    if isinstance(module, RFAFakeQuantize):
        start = torch.arange(module.thresholds.numel()) + module.quant_min
        row["threshold_movement"] = float((module.thresholds - start).abs().mean())
    elif isinstance(module, DLSFakeQuantize | StaticFakeQuantize):
        step, codes = _codes(module, x, y)
        row["clipped"] = float(((x - y).abs() > CLIPPED_FROM * step).double().mean())
        share = torch.bincount(codes).double() / codes.numel()
        share = share[share > 0]
        row["entropy"] = float(-(share * share.log2()).sum())
    return row


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
