"""Plots of the demo report as inline SVG, in colours that the page's style sheet decides."""

import io
import itertools
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
    "#010208": "var(--series-3)",
}
INK, MUTED, LINE, *SERIES = CSS_COLOURS
MARKERS = {"linear": "o", "conv2d": "s", "selective_scan": "D"}
LINE_MARKERS = "osD^vPX"
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


def lines_plot(values: Mapping[str, Sequence[float | None]], across: str, up: str) -> str:
    """One line for each label over the layers of a network; gaps where there is no value.

    Args:
        values: label of a line to its values in network order.
        across: what the places are.
        up: label of the values.

    Returns:
        One `<svg>` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(9.6, 3.6)
        # More widths than colours are told apart by their markers.
        styles = zip(itertools.cycle(SERIES), itertools.cycle(LINE_MARKERS), strict=False)
        for (colour, marker), (label, line) in zip(styles, values.items(), strict=False):
            heights = [float("nan") if v is None else v for v in line]
            places = range(1, len(line) + 1)
            axes.plot(places, heights, color=colour, linewidth=1.2, alpha=0.5)
            axes.plot(places, heights, marker, color=colour, markersize=4, label=label)
        axes.set_xlabel(f"{across}, in the order in which the network runs them")
        axes.set_ylabel(up)
        axes.margins(x=0.02, y=0.08)
        figure.legend(loc="outside upper left", ncols=5, frameon=False, handlelength=1.2)
        return _svg(figure, up)


def histogram_plot(scan: Mapping[str, Any], title: str) -> str:
    """How often values occur before and after quantization, on a logarithmic scale.

    Args:
        scan: `low` and `high` of the bins and their counts `before` and `after`.
        title: what is shown, for screen readers.

    Returns:
        One `<svg>` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(5.2, 3.0)
        bins = len(scan["before"])
        width = (scan["high"] - scan["low"]) / bins
        edges = [scan["low"] + width * index for index in range(bins + 1)]
        for colour, key, label in zip(
            SERIES, ("before", "after"), ("float", "quantized"), strict=False
        ):
            axes.stairs(scan[key], edges, color=colour, linewidth=1.4, label=label)
        axes.set(yscale="log", xlabel="output of the scan", ylabel="count")
        axes.set_ylim(bottom=0.7)
        figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1.2)
        return _svg(figure, title)


def channels_plot(scan: Mapping[str, Any], title: str) -> str:
    """Largest magnitude of each channel before and after quantization, largest first.

    Args:
        scan: `peaks_before` and `peaks_after`, one value for each channel.
        title: what is shown, for screen readers.

    Returns:
        One `<svg>` element.
    """
    before, after = scan["peaks_before"], scan["peaks_after"]
    order = sorted(range(len(before)), key=lambda i: -before[i])
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(5.2, 3.0)
        places = range(1, len(order) + 1)
        axes.plot(
            places, [after[i] for i in order], "o", color=SERIES[1], markersize=3, label="quantized"
        )
        axes.plot(places, [before[i] for i in order], color=SERIES[0], linewidth=1.6, label="float")
        axes.set(xlabel="channel", ylabel="largest magnitude")
        axes.set_ylim(bottom=0.0)
        axes.margins(x=0.02)
        figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1.2)
        return _svg(figure, title)
