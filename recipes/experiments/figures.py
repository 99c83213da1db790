"""Plots of the experiments as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from qmir_ao.recipes.experiments.scans import Scan

INK, MUTED, LINE = "#1f2328", "#59636e", "#d1d9e0"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9")
"""Told apart by people who do not see all colours alike."""
MARKERS = "osD^vP"
DPI = 130
BINS = 121
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "legend.frameon": False,
}
Points = Sequence[tuple[float, float, float]]
"""x, y and the standard deviation of y."""


def _figure(width: float, height: float, columns: int, **more: Any) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, columns, squeeze=False, **more)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(length=0)
        ax.grid(linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path


def curves(path: Path, panels: Mapping[str, Mapping[str, Points]], x: str, y: str) -> Path:
    """Quality against size: one panel for each source, one line for each method.

    Args:
        path: file to write.
        panels: title of a panel to its lines.
        x: label of the logarithmic axis.
        y: label of the other.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5 * len(panels), 3.8, len(panels))
        for ax, (title, series) in zip(axes, panels.items(), strict=True):
            for colour, marker, (label, points) in zip(
                COLOURS, MARKERS, series.items(), strict=False
            ):
                across, up, error = zip(*sorted(points), strict=True)
                ax.errorbar(
                    across,
                    up,
                    error,
                    color=colour,
                    marker=marker,
                    markersize=5,
                    label=label,
                    capsize=3,
                    alpha=0.85,
                )
            ax.set(title=title, xlabel=x, ylabel=y, xscale="log")
            ax.margins(0.08)
            ax.legend(loc="lower right")
        return _save(figure, path)


def losses(path: Path, panels: Mapping[str, Mapping[str, tuple[float, float]]]) -> Path:
    """PSNR below a reference, one bar for each row, one panel for each source.

    Args:
        path: file to write.
        panels: title of a panel to decibels and their standard deviation by row.
    """
    rows = max(len(bars) for bars in panels.values())
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5 * len(panels), 1.2 + 0.32 * rows, len(panels), sharey=True)
        for ax, colour, (title, bars) in zip(axes, COLOURS, panels.items(), strict=False):
            places = range(len(bars))
            values, errors = zip(*bars.values(), strict=True)
            ax.barh(places, values, xerr=errors, color=colour, height=0.62, ecolor=MUTED)
            ax.set_yticks(places, list(bars))
            ax.grid(axis="y", visible=False)
            ax.set(title=title, xlabel="dB")
        axes[0].invert_yaxis()
        return _save(figure, path)


def _density(values: Tensor, edges: Any) -> Any:
    # What lies outside counts in the last bins.
    counts, _ = np.histogram(np.clip(values.flatten().numpy(), edges[0], edges[-1]), edges)
    return np.where(counts > 0, counts / counts.sum(), np.nan)


def outliers(path: Path, scans: Sequence[Scan]) -> Path:
    """Scan outputs of a float network: a map of the widest, and all distributions.

    Args:
        path: file to write.
        scans: of one forward pass.
    """
    units = [(s.made - s.made.mean()) / s.made.std() for s in scans]
    widest = max(range(len(units)), key=lambda i: float(units[i].abs().max()))
    reach = float(units[widest].abs().max())
    edges = np.linspace(-reach, reach, BINS)
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(11, 3.8, 2)
        shown = units[widest][0].abs()
        # Every token and channel would be finer than the pixels of the plot.
        strides = [max(1, side // 400) for side in shown.shape]
        picture = axes[0].imshow(
            shown[:: strides[0], :: strides[1]].numpy(),
            aspect="auto",
            cmap="magma_r",
            norm=mpl.colors.LogNorm(0.3, reach),
            extent=(0, shown.shape[1], shown.shape[0], 0),
            interpolation="nearest",
        )
        figure.colorbar(picture, ax=axes[0], label="distance from the mean, in sigma")
        axes[0].grid(visible=False)
        axes[0].set(title=f"scan {widest}: output", xlabel="position", ylabel="channel")
        centres = (edges[1:] + edges[:-1]) / 2
        for index, (colour, values) in enumerate(zip(COLOURS, units, strict=False)):
            axes[1].step(
                centres, _density(values, edges), where="mid", color=colour, label=f"scan {index}"
            )
        _tails(axes[1], "outputs of all scans", "in sigma of each")
        axes[1].legend(loc="upper right")
        return _save(figure, path)


def distributions(path: Path, panels: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Outputs of scans in several networks, on one scale of a panel.

    Args:
        path: file to write.
        panels: title of a panel to the values of each network; the first one sets the scale.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5.5 * len(panels), 3.8, len(panels))
        for ax, (title, networks) in zip(axes, panels.items(), strict=True):
            first = next(iter(networks.values()))
            low, high = float(first.min()), float(first.max())
            margin = (high - low) / 4
            edges = np.linspace(low - margin, high + margin, BINS)
            centres = (edges[1:] + edges[:-1]) / 2
            for colour, (label, values) in zip(COLOURS, networks.items(), strict=False):
                ax.step(centres, _density(values, edges), where="mid", color=colour, label=label)
            _tails(ax, title, "value (the last bins hold all beyond)")
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names))
        return _save(figure, path)


def _tails(ax: Any, title: str, x: str) -> None:
    ax.set(title=title, xlabel=x, ylabel="share of the values", yscale="log")
