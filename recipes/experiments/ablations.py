"""The ablations of the default method: one thing changed at a time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qmir_ao.recipes.experiments.evidence import (
    DEFAULT,
    ITERATIONS,
    SEEDS,
    Cell,
    best_rates,
    cells_of,
    mean_score,
)
from qmir_ao.recipes.experiments.runs import Run

ABLATIONS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "DLS initialisation": [
        ("mse", {}),
        *(
            (init, {"init": init})
            for init in ("closed_form", "mu3s", "mu4s", "minmax", "mu_halfrange", "mid3s")
        ),
    ],
    "DLS statistics": [
        ("token", {}),
        ("sample", {"statistics": "sample"}),
        ("tensor", {"statistics": "tensor"}),
    ],
    "DLS additions": [
        ("statistics per token, channel shift", {}),
        ("without statistics per token", {"statistics": "sample"}),
        ("without channel shift", {"channel_shift": False}),
        ("without both", {"statistics": "sample", "channel_shift": False}),
    ],
    "DLS step and output": [
        ("free", {}),
        ("cap", {"cap": True}),
        ("output clamp", {"clamp_output": True}),
        ("cap and output clamp", {"cap": True, "clamp_output": True}),
    ],
    "RFA granularity": [
        ("per output channel", {}),
        ("per tensor", {"granularity": "per_tensor"}),
    ],
    "Placement": [("paper", {}), ("published code", {"placement": "official"})],
    "Preset": [("default", {}), ("paper", {"preset": "paper"})],
}
"""Tables of the ablation: row label and changes to the default's settings."""


@dataclass(frozen=True)
class Variant:
    """One row of an ablation.

    Attributes:
        label: what was changed.
        cells: set to scores over the seeds.
        gain: mean of the sets minus that of the unchanged runs of the same seeds; None for those.
    """

    label: str
    cells: dict[str, Cell]
    gain: Cell | None


def ablation_runs(
    rate: float, width: int, iterations: int = ITERATIONS, seeds: Sequence[int] = SEEDS
) -> list[Run]:
    """The default with one thing changed at a time."""
    changes = {json.dumps(s, sort_keys=True): s for rows in ABLATIONS.values() for _, s in rows}
    return [
        Run(
            DEFAULT, width, width, seed, learning_rate=rate, iterations=iterations,
            settings=settings,
        )
        for seed in seeds
        for settings in changes.values()
    ]  # fmt: skip


def ablation_table(records: Sequence[dict[str, Any]], width: int) -> dict[str, list[Variant]]:
    """Title to rows; a row without a run is left out.

    Scores are of the integer network; where there is none the label says that they are simulated.
    """
    rate = best_rates(records, width).get(DEFAULT)
    same = [
        r
        for r in records
        if (r["method"], r["weight_bits"], r["learning_rate"]) == (DEFAULT, width, rate)
    ]
    unchanged = {r["seed"]: r for r in same if not r["settings"]}
    result = {}
    for title, variants in ABLATIONS.items():
        lines = []
        for label, settings in variants:
            hits = [r for r in same if r["settings"] == settings]
            if hits:
                whole = not any("not_lowered" in r for r in hits)
                score = "psnr_integer" if whole else "psnr"
                told = label if whole else f"{label} (simulated: no integer form)"
                gains = [
                    mean_score(r, score) - mean_score(unchanged[r["seed"]], score)
                    for r in hits
                    if settings and r["seed"] in unchanged
                ]
                gain = Cell(tuple(gains)) if gains else None
                lines.append(Variant(told, cells_of(hits, score), gain))
        if lines:
            result[title] = lines
    return result
