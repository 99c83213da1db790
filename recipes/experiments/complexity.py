"""Parameters, operations and bytes of a network, for the paper's table of complexity."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from qmir_ao.recipes.complexity import operations, parameters
from qmir_ao.recipes.experiments.results import summary

__all__ = ["equivalent_parameters", "fill", "operations", "parameters"]


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
