"""The analysis as one self-contained HTML page: it opens offline, its plots are inline SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmir_ao import __version__
from qmir_ao.backend.table import Table, write_atomically

if TYPE_CHECKING:
    from qmir_ao.backend.bit_budget import BitAssignment

TEMPLATE = "analysis.html.j2"
MOST = 12
"""Layers in the table of the most sensitive ones."""


def render(
    title: str,
    sensitivity: Table | None = None,
    comparison: Table | None = None,
    assignment: "BitAssignment | None" = None,
) -> str:
    """Render the page.

    Args:
        title: name of the network.
        sensitivity: what `qmir_ao.sensitivity` returned.
        comparison: what `qmir_ao.compare` returned for a float network.
        assignment: what `qmir_ao.assign_bits` returned.

    Returns:
        The HTML text.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qmir_ao.recipes"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent}
    return environment.get_template(TEMPLATE).render(
        version=__version__,
        title=title,
        sensitivity=None if sensitivity is None else _sensitivity(sensitivity),
        comparison=None if comparison is None else _comparison(comparison),
        assignment=assignment,
    )


def write(path: Path, *args: Any, **tables: Any) -> Path:
    """Write the page of `render` whole or not at all."""
    write_atomically(path, render(*args, **tables))
    return path


def _sensitivity(table: Table) -> dict[str, Any]:
    from qmir_ao.recipes.plots import lines_plot

    widths = sorted(set(table.column("bits")))
    column, label = ("drop", "PSNR below the float network's, dB")
    if table.facts.get("float_psnr") is None:
        column, label = ("psnr_to_float", "PSNR to the float output, dB")
    layers = list(dict.fromkeys(table.column("layer")))
    known = {(row["layer"], row["bits"]): row for row in table}
    values = {b: [known[layer, b][column] for layer in layers] for b in widths}
    order = sorted(
        range(len(layers)), key=lambda i: -max(known[layers[i], b]["mse"] for b in widths)
    )
    return {
        "widths": widths,
        "label": label,
        "truth": column == "drop",
        "float_psnr": table.facts.get("float_psnr"),
        "count": len(layers),
        "rows": [
            {**known[layers[i], widths[0]], "values": [values[b][i] for b in widths]}
            for i in order[:MOST]
        ],
        "svg": lines_plot({f"{b} bits": values[b] for b in widths}, "layer", label),
        "all": table.rows,
    }


def _comparison(table: Table) -> dict[str, Any]:
    from qmir_ao.recipes.plots import channels_plot, histogram_plot, sqnr_plot

    named = {row["operator"]: row["layer"] or row["operator"] for row in table}
    scans: Mapping[str, Any] = table.facts["scans"]
    return {
        "rows": table.rows,
        "sqnr": sqnr_plot({"lowered": table.rows}),
        "scans": [
            {
                "name": named[name],
                "histogram": histogram_plot(scan, f"Outputs of the scan in {named[name]}"),
                "channels": channels_plot(scan, f"Channels of the scan in {named[name]}"),
            }
            for name, scan in scans.items()
        ],
    }


def _number(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _percent(value: Any) -> str:
    return "\N{EN DASH}" if value is None else f"{100 * value:.2f}\N{NO-BREAK SPACE}%"


def shown(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[list[str]]:
    """Cells of some columns, for a table on the terminal."""
    return [
        [_number(v) if isinstance(v := row[k], float) else str(v) for k in keys] for row in rows
    ]
