"""Plots of the demo report as inline SVG, in colours that the page's style sheet decides."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Matplotlib writes fixed colours; these stand for the page's CSS variables, so that one SVG serves
# the light and the dark theme.
CSS_COLOURS = {
    "#010203": "var(--ink)",
    "#010204": "var(--muted)",
    "#010205": "var(--line)",
    "#010206": "var(--series-1)",
    "#010207": "var(--series-2)",
}
INK, MUTED, LINE, *SERIES = CSS_COLOURS
MARKERS = {"linear": "o", "conv2d": "s", "selective_scan": "D"}
KIND_LABELS = {"linear": "linear", "conv2d": "convolution", "selective_scan": "selective scan"}
# Any: matplotlib types its settings by a literal of their three hundred names.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qmir_ao",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "legend.labelcolor": INK,
}


def _svg(figure: Figure, title: str) -> str:
    """Serialise a figure without document header, metadata and fixed size."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    # Two plots share a page: only the ids that something refers to may stay.
    text = re.sub(r'\sid="[a-z0-9.]+_\d+"', "", text)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font-family: [^;\"]*;?\s?", "", text)
    for colour, variable in CSS_COLOURS.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).strip()


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def sqnr_plot(operators: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Signal to quantization noise of every operator, in network order.

    Args:
        operators: label of a bit width to its operator records (`name`, `kind`, `sqnr_db`).

    Returns:
        One `<svg>` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(9.6, 3.6)
        kinds: set[str] = set()
        for colour, (label, records) in zip(SERIES, operators.items(), strict=False):
            axes.plot(
                range(1, len(records) + 1),
                [record["sqnr_db"] for record in records],
                color=colour,
                linewidth=1.2,
                alpha=0.45,
            )
            axes.plot([], [], color=colour, linewidth=3, label=label)
            for kind, marker in MARKERS.items():
                points = [
                    (index, record["sqnr_db"])
                    for index, record in enumerate(records, 1)
                    if record["kind"] == kind
                ]
                if points:
                    kinds.add(kind)
                    axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=5)
        for kind in (kind for kind in MARKERS if kind in kinds):
            axes.plot([], [], MARKERS[kind], color=MUTED, markersize=5, label=KIND_LABELS[kind])
        axes.set_xlabel("operator, in the order in which the network runs them")
        axes.set_ylabel("SQNR in dB")
        axes.margins(x=0.02, y=0.08)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        figure.legend(loc="outside upper left", ncols=5, frameon=False, handlelength=1.2)
        return _svg(figure, "Signal to quantization noise ratio of every operator")


def loss_plot(losses: Mapping[str, Sequence[float]], window: int = 30) -> str:
    """Training loss of each bit width, as a moving average over `window` steps.

    Args:
        losses: label of a bit width to the loss of each step.
        window: steps that one point averages.

    Returns:
        One `<svg>` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(9.6, 2.8)
        for colour, (label, values) in zip(SERIES, losses.items(), strict=False):
            width = min(window, len(values))
            ends = range(width, len(values) + 1)
            means = [sum(values[end - width : end]) / width for end in ends]
            axes.plot(ends, means, color=colour, linewidth=1.8, label=label)
        axes.set_xlabel("training step")
        axes.set_ylabel("L1 loss")
        axes.margins(x=0.01)
        figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1.2)
        return _svg(figure, "Training loss")
