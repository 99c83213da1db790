"""An experiment's outcome as a Markdown page: the paper's numbers, ours beside, doubts below."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qmir_ao.recipes.experiments.published import METRICS

Document = dict[str, Any]

DIGITS = {"psnr": 2, "ssim": 4, "lpips": 4, "latency": 2, "parameters_cut": 1, "operations_cut": 1}
TITLES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "parameters": "parameters, as 32-bit ones",
    "parameters_cut": "cut of parameters, %",
    "operations": "multiply-accumulates",
    "operations_cut": "cut of operations, %",
    "latency": "latency, ms",
}
NOT_MEASURED = {
    "lpips": "LPIPS (`qmir eval --lpips alex` measures that of the saved networks)",
    "operations": "operations of quantized networks",
    "latency": "latency on a Jetson",
}
"""Metrics of the paper that are not measured here."""
MISSING = "\N{EN DASH}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


class Footnotes:
    """Numbered footnotes; equal texts share a number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, reasons: Iterable[str]) -> str:
        """Marks for some texts."""
        found = (self.numbers.setdefault(r, len(self.numbers) + 1) for r in reasons)
        return "".join(f"[^{number}]" for number in found)

    def render(self) -> list[str]:
        """The texts, in the order of their marks."""
        return [f"[^{number}]: Doubtful: {text}" for text, number in self.numbers.items()]


def number(metric: str, value: float | None, std: float | None = None) -> str:
    """A value with the digits of its metric, and its standard deviation if there is one."""
    if value is None:
        return MISSING
    if metric in ("parameters", "operations"):
        return _count(value)
    digits = DIGITS[metric]
    text = f"{value:.{digits}f}"
    return text if std is None else f"{text} {PLUS_MINUS} {std:.{digits}f}"


def _count(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.2f} {letter}"
    return f"{value:.0f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def render(document: Document, plots: Sequence[Path] = ()) -> str:
    """The page of an experiment.

    Args:
        document: see `results.collect`.
        plots: images to show, relative to the page.
    """
    notes = Footnotes()
    text = [f"# {document['experiment']}: {document['title']}", "", *_header(document), ""]
    for plot in plots:
        text += [f"![{document['title']}]({plot})", ""]
    for finding in document.get("findings", []):
        text += [f"## {finding['title']}", "", *table(finding["header"], finding["rows"]), ""]
    for name, rows in _groups([*document["inputs"], *document["rows"]]).items():
        text += _group(name, rows, notes)
    text += notes.render()
    return "\n".join(text).rstrip() + "\n"


def _header(document: Document) -> list[str]:
    lines = list(document["notes"])
    if document["scale"] == "tiny":
        lines.append(
            "Ours are of a small network that was trained for minutes: compare the order of the "
            "methods and their distance to float, not the numbers themselves."
        )
    lines.append(_origin(document))
    for name, facts in document["benches"].items():
        lines.append(
            f"- `{name}`: {facts['network']}, {facts['parameters']:,} parameters, {facts['task']}, "
            f"{_float_training(facts)}{facts['iterations']} iterations of batch {facts['batch']}, "
            f"patch {facts['patch']}, learning rate {facts['learning_rate']:g}; "
            f"runs in `{facts['folder']}`"
        )
    made = f"Made by qmir_ao {document['qmir_ao']} on torch {document['torch']}"
    return [*_paragraphs(lines), "", f"{made}, {document['created']}."]


def _origin(document: Document) -> str:
    """Which runs our numbers are of, and what has none."""
    seeds = [str(seed) for seed in document["seeds"]]
    runs = (
        f"means (and standard deviations) over the seeds {', '.join(seeds)}"
        if len(seeds) > 1
        else f"of seed {seeds[0]} alone"
    )
    text = (
        f"Ours are {runs}, of the network as it runs in integers; "
        '"simulated" is the fake-quantized one.'
    )
    metrics = {cell["metric"] for row in document["rows"] for cell in row["cells"]}
    lacking = [name for metric, name in NOT_MEASURED.items() if metric in metrics]
    return f"{text} Not measured: {', '.join(lacking)}." if lacking else text


def _float_training(facts: dict[str, Any]) -> str:
    """How long the float network was trained, where that was done here."""
    steps = facts.get("float_iterations")
    return "" if steps is None else f"{steps} iterations in float, then "


def _paragraphs(lines: Sequence[str]) -> list[str]:
    spaced: list[str] = []
    for line in lines:
        if spaced and not (line.startswith("- ") and spaced[-1].startswith("- ")):
            spaced.append("")
        spaced.append(line)
    return spaced


def _groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by network, enlargement and part."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = row["network"] + (f" x{row['scale']}" if row["scale"] else "")
        name = f"{row['part']} quantizers, {name}" if row["part"] else name
        groups.setdefault(name, []).append(row)
    return groups


def _group(name: str, rows: Sequence[dict[str, Any]], notes: Footnotes) -> list[str]:
    """One heading, and one table for each metric."""
    present = {cell["metric"] for row in rows for cell in row["cells"]}
    text = [f"## {name}", ""]
    for metric in (metric for metric in METRICS if metric in present):
        places = [
            place
            for place, cell in enumerate(rows[0]["cells"])
            if cell["metric"] == metric and any(_filled(row["cells"][place]) for row in rows)
        ]
        if places:
            text += [f"### {TITLES[metric]}", "", *_metric(metric, rows, places, notes), ""]
    return text


def _filled(cell: dict[str, Any]) -> bool:
    return cell["paper"] is not None or cell["mean"] is not None


def _metric(
    metric: str, rows: Sequence[dict[str, Any]], places: Sequence[int], notes: Footnotes
) -> list[str]:
    header, getters = ["method", "bits"], []
    for place in places:
        cells = [row["cells"][place] for row in rows]
        name = label(cells[0])
        for kind, key in (("paper", "paper"), ("ours", "mean"), ("simulated", "simulated_mean")):
            if any(cell[key] is not None for cell in cells):
                header.append(f"{name} {kind}".strip())
                getters.append((place, kind))
    body = []
    for row in rows:
        shown = [_shown(metric, row["cells"][place], kind, notes) for place, kind in getters]
        body.append([row["method"], row["bits"], *shown, row["status"]])
    return table([*header, "our runs"], body)


def label(cell: dict[str, Any]) -> str:
    """Set of a cell, and its noise level if it has one."""
    name = cell["set"] or ""
    return name if cell["sigma"] is None else f"{name} sigma {cell['sigma']}"


def _shown(metric: str, cell: dict[str, Any], kind: str, notes: Footnotes) -> str:
    if kind == "paper":
        return number(metric, cell["paper"], cell["paper_std"]) + notes.mark(cell["doubts"])
    prefix = "simulated_" if kind == "simulated" else ""
    return number(metric, cell[f"{prefix}mean"], cell[f"{prefix}std"])
