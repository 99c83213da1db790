"""Parameters, operations and bytes of a network, for the paper's table of complexity."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qmir_ao.ops.selective_scan  # noqa: F401  (defines torch.ops.qmir.selective_scan)
from qmir_ao.recipes.experiments.results import summary

SIDE = 320
"""Side of the input that the paper counts operations on."""
SCAN_FACTOR = 9
"""Operations of a selective scan for each position, channel and state, as fvcore counts them."""


def parameters(model: nn.Module) -> int:
    """True number of parameters: every tensor, those of the scans included."""
    return sum(p.numel() for p in model.parameters())


def operations(model: nn.Module, side: int = SIDE) -> dict[str, int]:
    """Multiply-accumulates of one image, without computing them.

    Args:
        model: network on images of 3 channels, or of its `in_channels`.
        side: height and width of the input.

    Returns:
        `layers` (convolutions and linear layers, the projections of the scans included), `scan`
        (the recurrences themselves) and `total`.
    """
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    ghost = copy.deepcopy(model).to("meta").eval()
    scan = torch.ops.qmir.selective_scan
    with FlopCounterMode(display=False, custom_mapping={scan: _scan}) as counter, torch.no_grad():
        ghost(torch.empty(1, first.in_channels, side, side, device="meta"))
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    scans = sum(n for op, n in counts.items() if "selective_scan" in str(op))
    layers = (sum(counts.values()) - scans) // 2
    return {"layers": layers, "scan": scans, "total": layers + scans}


def _scan(u: torch.Size, delta: torch.Size, a: torch.Size, *rest: Any, **more: Any) -> int:
    """Operations from the shapes (B, E, L), (B, E, L), (E, N)."""
    batch, channels, length = u
    return SCAN_FACTOR * batch * channels * length * a[1]


def equivalent_parameters(total: int, record: dict[str, Any]) -> float:
    """Parameters of a lowered network, its packed weights and scales counted as 32-bit ones."""
    stored = record["weight_bytes"] + record["scale_bytes"]
    return float(total - record["float_bytes"] / 4 + stored / 4)


def fill(
    rows: Sequence[dict[str, Any]], model: nn.Module, records: Sequence[Sequence[dict[str, Any]]]
) -> None:
    """Put our counts into the cells of one network's rows.

    Args:
        rows: of a document, the float one among them.
        model: the float network.
        records: runs of each row.
    """
    total, counted = parameters(model), operations(model)["total"]
    for row, found in zip(rows, records, strict=True):
        if row["bits"] == "32/32":
            _put(row, "parameters", [float(total)])
            _put(row, "operations", [float(counted)])
            continue
        sizes = [equivalent_parameters(total, r) for r in found if "weight_bytes" in r]
        _put(row, "parameters", sizes)
        _put(row, "parameters_cut", [100 * (1 - size / total) for size in sizes])


def _put(row: dict[str, Any], metric: str, values: list[float]) -> None:
    for cell in row["cells"]:
        if cell["metric"] == metric:
            cell.update(summary("", values))
