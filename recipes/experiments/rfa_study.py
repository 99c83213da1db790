"""What RFA adds to DLS: by component of the network, by length of training, and its thresholds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

from qmir_ao.recipes.experiments.evidence import (
    DEFAULT,
    SEEDS,
    Cell,
    best_rates,
    cells_of,
    counted,
    format_cell,
    mean_score,
)
from qmir_ao.recipes.experiments.methods import RFA_COMPONENTS
from qmir_ao.recipes.experiments.runs import Run
from qmir_ao.recipes.experiments.tables import table

WITHOUT = "dls"
PAIRS = {(DEFAULT, WITHOUT): "DLS", ("rfa", "lsq"): "LSQ's activations"}
"""Methods with RFA and without it, and what quantizes their activations."""
_ALL, _NONE = "all weights", "no weights (LSQ on all)"
LABELS = {
    "linear": "linear layers",
    "conv": "convolutions",
    "scan": "projections of the scans",
}

Records = Sequence[dict[str, Any]]
Variants = dict[str, dict[int, Records]]


def component_runs(
    rate: float, width: int, iterations: int, seeds: Sequence[int] = SEEDS
) -> list[Run]:
    """RFA on one component of the weights at a time and LSQ on the others."""
    return [
        Run(
            DEFAULT, width, width, seed, learning_rate=rate, iterations=iterations,
            settings={"rfa_on": component},
        )
        for seed in seeds
        for component in RFA_COMPONENTS
    ]  # fmt: skip


def rfa_lines(records: Records, width: int, iterations: int) -> list[str]:
    """The section of the page, empty where nothing can be compared.

    Args:
        records: of all lengths.
        width: bits.
        iterations: length of the runs of the main table, which choose the learning rate.
    """
    rates = best_rates([r for r in records if r["iterations"] == iterations], width)
    same = [
        r for r in records if r["weight_bits"] == width and r["learning_rate"] == rates.get(DEFAULT)
    ]
    variants = _variants(same)
    if len(variants) < 2:
        return []
    verdict = [*_verdict(variants), *_pairs(records)]
    lines = [f"## What RFA adds, {width} bits", "", *verdict, ""]
    return [*lines, *_scores(variants), "", *_thresholds(variants[_ALL])]


def _variants(records: Records) -> Variants:
    """What RFA is on, then length, to runs."""
    wanted = {
        _NONE: (WITHOUT, {}),
        **{LABELS[c]: (DEFAULT, {"rfa_on": c}) for c in RFA_COMPONENTS},
        _ALL: (DEFAULT, {}),
    }
    found: Variants = {}
    for label, (method, settings) in wanted.items():
        mine = [r for r in records if r["method"] == method and r["settings"] == settings]
        by_length: dict[int, Records] = {
            n: [r for r in mine if r["iterations"] == n]
            for n in sorted({r["iterations"] for r in mine})
        }
        if by_length:
            found[label] = by_length
    return found


def _verdict(variants: Variants) -> list[str]:
    """RFA against LSQ weights, on the seeds that both have."""
    lines = []
    for length, with_rfa in variants[_ALL].items():
        without = {r["seed"]: r for r in variants.get(_NONE, {}).get(length, ())}
        gains = [
            mean_score(r) - mean_score(without[r["seed"]]) for r in with_rfa if r["seed"] in without
        ]
        if gains:
            gain = Cell(tuple(gains))
            lines.append(
                f"- After {length} iterations RFA's weights give {format_cell(gain, sign=True)} dB "
                f"over LSQ's, the mean of the sets on {counted(len(gains), 'seed')}."
            )
    return lines


def _pairs(records: Records) -> list[str]:
    """RFA against LSQ weights over all runs that differ in nothing else, whatever their width."""
    lines = []
    for (with_rfa, without), under in PAIRS.items():
        scores: dict[str, dict[str, float]] = {with_rfa: {}, without: {}}
        for r in records:
            if r["method"] in scores and not r["settings"]:
                scores[r["method"]][replace(Run.of(r), method="").name] = mean_score(r)
        shared = scores[with_rfa].keys() & scores[without].keys()
        gains = [scores[with_rfa][key] - scores[without][key] for key in sorted(shared)]
        if len(gains) > 1:
            error = stdev(gains) / len(gains) ** 0.5
            lines.append(
                f"- Under {under}, over all {len(gains)} pairs of runs that differ in nothing else "
                f"(widths, rates, lengths, seeds), they give {fmean(gains):+.3f} dB, with a "
                f"standard error of {error:.3f}."
            )
    return lines


def _scores(variants: Variants) -> list[str]:
    lengths = sorted({n for by_length in variants.values() for n in by_length})
    sets = list(next(iter(next(iter(variants.values())).values()))[0]["sets"])
    head = ["RFA on", *(f"{name}, {n} iterations" for name in sets for n in lengths)]
    rows = []
    for label, by_length in variants.items():
        cells = {n: cells_of(runs) for n, runs in by_length.items()}
        scores = [
            format_cell(cells[n][name], seeds=True) if n in cells else ""
            for name in sets
            for n in lengths
        ]
        rows.append([label, *scores])
    return [*table(head, rows), "", "The number of seeds is in parentheses."]


def _thresholds(by_length: Mapping[int, Records]) -> list[str]:
    """Where the thresholds of the first seed have moved to, and what that does."""
    head = [
        "iterations", "weights of", "quantizers", "thresholds moved by, steps: mean, largest",
        "codes changed by it", "SQNR", "SQNR, thresholds not moved",
    ]  # fmt: skip
    rows = []
    for length, runs in by_length.items():
        first: dict[str, Any] = next(
            (r.get("quantizers", {}) for r in runs if r["seed"] == SEEDS[0]), {}
        )
        for component, label in LABELS.items():
            found = first.get(f"{component} weights")
            if found is None:
                continue
            moved = f"{found['threshold_movement']:.3f}, {found['threshold_movement_max']:.3f}"
            rows.append(
                [
                    f"{length}", label, f"{found['count']}", moved,
                    f"{100 * found['moved_codes']:.2f} %", f"{found['sqnr']:.2f} dB",
                    f"{found['sqnr_unmoved']:.2f} dB",
                ]
            )  # fmt: skip
    note = "Means over the quantizers of a component, first seed, RFA on all weights."
    return [*table(head, rows), "", note, ""] if rows else []
