"""The comparison of quantization methods on x2 super-resolution: its runs and their records.

Every method trains from the same float weights on the same patches in the same order. Its learning
rate is the best of three on the first seed at the width in question; the other seeds use that one.
Where a second rate has run on all seeds as well, the better mean of the two counts.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.experiments.methods import METHODS
from qmir_ao.recipes.experiments.published import FLOAT
from qmir_ao.recipes.experiments.registry import COMPARISON
from qmir_ao.recipes.experiments.runs import Run

RATES = (8e-4, 1.6e-3, 3.2e-3)
SEEDS = (0, 1, 2)
DEFAULT = "dls+rfa"
"""Key of the method that `get_qmir_qconfig` gives without settings."""
WIDTHS = (2, 4)
EIGHT_BIT_METHODS = ("dls+rfa", "lsq")
"""At 8 bits every method is close to float; these two show it."""
LONGER_METHODS = ("dls+rfa", "dls", "rfa", "lsq", "lsq+", "quantsr", "n2uq")
"""Methods that also train twice as long."""
ITERATIONS = COMPARISON.budget.iterations


@dataclass(frozen=True)
class Cell:
    """Scores of one method at one width on one set, over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; 0 for one seed."""
        return stdev(self.values) if len(self.values) > 1 else 0.0


def format_cell(cell: Cell, *, sign: bool = False, seeds: bool = False) -> str:
    """Mean, and deviation where there are several seeds, of three digits; their number if asked."""
    spread = f" ± {cell.deviation:.3f}" if len(cell.values) > 1 else ""
    number = f" ({len(cell.values)})" if seeds else ""
    return f"{cell.mean:{'+' if sign else ''}.3f}{spread}{number}"


def counted(number: int, word: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number} {word}" + ("" if number == 1 else "s")


def mean_score(record: Mapping[str, Any], score: str = "psnr_integer") -> float:
    """One score of a run, the mean over its sets."""
    return fmean(s[score] for s in record["sets"].values())


def cells_of(runs: Sequence[dict[str, Any]], score: str = "psnr_integer") -> dict[str, Cell]:
    """Set to scores over some runs."""
    return {name: Cell(tuple(r["sets"][name][score] for r in runs)) for name in runs[0]["sets"]}


def search_runs(
    width: int, iterations: int = ITERATIONS, methods: Iterable[str] = tuple(METHODS)
) -> list[Run]:
    """The methods at all learning rates, first seed."""
    return [
        Run(key, width, width, SEEDS[0], learning_rate=rate, iterations=iterations)
        for rate in RATES
        for key in methods
    ]


def best_rates(records: Iterable[dict[str, Any]], width: int) -> dict[str, float]:
    """Each method's best learning rate at a width: mean integer PSNR over the sets, first seed.

    Other rates that have run on all seeds of that one compete with it on all of them.
    """
    scores: dict[str, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        if not r["settings"] and r["weight_bits"] == width:
            scores[r["method"]][r["learning_rate"]][r["seed"]] = mean_score(r)
    best = {}
    for method, by_rate in scores.items():
        started = {rate: seeds for rate, seeds in by_rate.items() if SEEDS[0] in seeds}
        if not started:
            continue
        first = max(started, key=lambda rate: started[rate][SEEDS[0]])
        seeds = started[first].keys()
        rivals = {rate: found for rate, found in started.items() if seeds <= found.keys()}
        best[method] = max(rivals, key=lambda rate: fmean(rivals[rate][seed] for seed in seeds))
    return best


def best_runs(records: Iterable[dict[str, Any]], width: int) -> list[dict[str, Any]]:
    """The runs of a width without changed settings, each method's at its best rate."""
    records = list(records)
    rates = best_rates(records, width)
    return [
        r
        for r in records
        if r["weight_bits"] == width
        and not r["settings"]
        and r["learning_rate"] == rates.get(r["method"])
    ]


def seed_runs(
    rates: dict[str, float],
    width: int,
    iterations: int = ITERATIONS,
    seeds: Sequence[int] = SEEDS,
) -> list[Run]:
    """All methods at their learning rates, all seeds."""
    return [
        Run(key, width, width, seed, learning_rate=rates[key], iterations=iterations)
        for seed in seeds
        for key in METHODS
        if key in rates
    ]


def longer_runs(rates: dict[str, float], width: int, iterations: int = ITERATIONS) -> list[Run]:
    """Some methods at their learning rates with twice the iterations, all seeds."""
    chosen = {key: rate for key, rate in rates.items() if key in LONGER_METHODS}
    return seed_runs(chosen, width, 2 * iterations)


def of_length(records: Iterable[dict[str, Any]], iterations: int) -> list[dict[str, Any]]:
    """The runs of that many iterations that did not diverge: those that can be compared."""
    return [r for r in records if r["iterations"] == iterations and "diverged" not in r]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All run records of a folder, in the order of their names.

    Raises:
        ConfigError: the folder holds none, or a damaged one.
    """
    records = []
    for path in sorted(folder.glob("*-w[0-9]a[0-9]-*.json")):
        try:
            records.append(json.loads(path.read_text()))
        except ValueError as error:
            raise ConfigError(f"{path}: is no run record ({error}); delete it") from error
    if not records:
        raise ConfigError(f"{folder}: holds no run records; train some runs first")
    return records


def float_rows(baseline: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Rows of the float network, by set; it has no seed, no steps and no integer form."""
    return [
        {
            "method": FLOAT,
            "weight_bits": 32,
            "act_bits": 32,
            "seed": None,
            "set": name,
            "psnr": round(scores["psnr"], 4),
            "psnr_integer": None,
            "ssim": round(scores["ssim"], 5),
            "ssim_integer": None,
            "seconds_per_step": None,
        }
        for name, scores in baseline.items()
    ]


def rows(
    records: Iterable[dict[str, Any]], steps: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """One row for each run and test set, of the runs without changed settings at the best rates.

    Args:
        records: from `read_records`.
        steps: seconds of a training step by `method-wNaN`, measured on a quiet machine; where one
            is missing the row has that of its run, which other work may have slowed down.
    """
    records = list(records)
    widths = sorted({r["weight_bits"] for r in records})
    return [
        {
            "method": r["method"],
            "weight_bits": r["weight_bits"],
            "act_bits": r["act_bits"],
            "seed": r["seed"],
            "set": name,
            "psnr": round(s["psnr"], 4),
            "psnr_integer": round(s["psnr_integer"], 4),
            "ssim": round(s["ssim"], 5),
            "ssim_integer": round(s["ssim_integer"], 5),
            "seconds_per_step": (steps or {}).get(
                f"{r['method']}-w{r['weight_bits']}a{r['act_bits']}", r["seconds_per_step"]
            ),
            "learning_rate": r["learning_rate"],
            "iterations": r["iterations"],
            "weight_bytes": r["weight_bytes"],
            "scale_bytes": r["scale_bytes"],
        }
        for width in widths
        for r in best_runs(records, width)
        for name, s in r["sets"].items()
    ]


def table(
    entries: Iterable[dict[str, Any]], width: int, value: str = "psnr_integer"
) -> dict[str, dict[str, Cell]]:
    """Method, then set, to scores over the seeds at one width; best mean first."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in entries:
        if row["weight_bits"] == row["act_bits"] == width:
            found[row["method"]][row["set"]].append(row[value])
    cells = {
        method: {name: Cell(tuple(values)) for name, values in sets.items()}
        for method, sets in found.items()
    }
    return dict(sorted(cells.items(), key=lambda kv: -fmean(c.mean for c in kv[1].values())))
