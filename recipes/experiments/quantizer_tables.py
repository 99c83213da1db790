"""What the quantizers of the compared methods do, by kind of reader and layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from qmir_ao.recipes.experiments.evidence import DEFAULT, SEEDS, best_runs, table
from qmir_ao.recipes.experiments.methods import METHODS
from qmir_ao.recipes.experiments.tables import table as markdown_table

Records = Sequence[dict[str, Any]]


def quantizer_lines(records: Records, entries: Records, width: int) -> list[str]:
    """The section of the page at one width, empty where no record has statistics.

    Args:
        records: of one length.
        entries: their rows, from `evidence.rows`.
        width: bits.
    """
    return [*_kinds(records, width), *_layers(records, entries, width)]


def _kinds(records: Records, width: int) -> list[str]:
    """What the quantizers of each method do, from the runs of the first seed at the best rates."""
    found = {
        r["method"]: r["quantizers"]
        for r in best_runs(records, width)
        if r["seed"] == SEEDS[0] and "quantizers" in r
    }
    if not found:
        return []
    kinds = ("linear", "conv", "scan")
    head = ["method", *(f"{kind}: SQNR, clipped, code entropy" for kind in kinds), "weights: SQNR"]
    shown = []
    for key in sorted(found, key=lambda key: -found[key]["linear"]["sqnr"]):
        parts = [found[key].get(kind) for kind in kinds]
        cells = [_digits(part) if part else "" for part in parts]
        weights = found[key]["weights"]
        told = f"{weights['sqnr']:.1f} dB"
        if "threshold_movement" in weights:
            told += f", thresholds moved by {weights['threshold_movement']:.3f} steps"
        shown.append([METHODS[key].label, *cells, told])
    return [f"### What the quantizers do, {width} bits", "", *markdown_table(head, shown), ""]


def _layers(records: Records, entries: Records, width: int) -> list[str]:
    """The quantizers one by one, of the default and of the best rival, on one seed of both."""
    rivals = [key for key in table(entries, width) if not METHODS[key].ours]
    found = {
        (r["method"], r["seed"]): {(row["layer"], row["kind"]): row for row in r["layers"]}
        for r in best_runs(records, width)
        if "layers" in r
    }
    pairs = [
        (found[DEFAULT, seed], found[rivals[0], seed])
        for seed in SEEDS
        if rivals and {(DEFAULT, seed), (rivals[0], seed)} <= found.keys()
    ]
    if not pairs:
        return []
    ours, other = pairs[0]
    shared = [key for key in ours if key in other]
    shown = [
        [
            layer if kind in layer else f"{layer}, {kind}",
            *(_digits(side[layer, kind]) for side in (ours, other)),
        ]
        for layer, kind in shared
    ]
    higher = sum(ours[key]["sqnr"] > other[key]["sqnr"] for key in shared)
    labels = [METHODS[key].label for key in (DEFAULT, rivals[0])]
    head = ["layer that reads it", *(f"{name}: SQNR, clipped, code entropy" for name in labels)]
    return [
        f"Of {len(shown)} quantized inputs, {labels[0]} has the higher SQNR at {higher}, the best "
        f"rival, {labels[1]}, at the others.",
        "",
        "<details><summary>all layers</summary>",
        "",
        *markdown_table(head, shown),
        "",
        "</details>",
        "",
    ]


def _digits(row: Mapping[str, float]) -> str:
    return f"{row['sqnr']:.1f} dB, {100 * row['clipped']:.1f} %, {row['entropy']:.2f} bits"
