"""The stages of the comparison of methods, and which of their runs have no record yet."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qmir_ao.recipes.experiments.ablations import ablation_runs
from qmir_ao.recipes.experiments.evidence import (
    DEFAULT,
    EIGHT_BIT_METHODS,
    SEEDS,
    WIDTHS,
    best_rates,
    longer_runs,
    of_length,
    search_runs,
    seed_runs,
)
from qmir_ao.recipes.experiments.rfa_study import component_runs
from qmir_ao.recipes.experiments.runs import Run

Records = Sequence[dict[str, Any]]


def stages(
    read: Callable[[], Records], iterations: int, seeds: Sequence[int] = SEEDS
) -> Iterator[tuple[str, list[Run]]]:
    """Label and runs of each stage; each reads what the stages before it have recorded.

    Args:
        read: gives all records that are there.
        iterations: length of the main runs.
        seeds: of the runs; the first one chooses the rates and has the ablations.
    """
    for width in WIDTHS:
        yield f"learning rates, {width} bits", search_runs(width, iterations)
    yield "learning rates, 8 bits", search_runs(8, iterations, EIGHT_BIT_METHODS)
    for width in (*WIDTHS, 8):
        rates = best_rates(of_length(read(), iterations), width)
        yield f"seeds, {width} bits", seed_runs(rates, width, iterations, seeds)
    low = WIDTHS[0]
    rates = best_rates(of_length(read(), iterations), low)
    if DEFAULT not in rates:
        return
    yield f"ablations, {low} bits", ablation_runs(rates[DEFAULT], low, iterations, seeds[:1])
    yield f"twice as long, {low} bits", longer_runs(rates, low, iterations)
    components = component_runs(rates[DEFAULT], low, 2 * iterations, seeds)
    yield f"RFA by component, {low} bits", components


def missing_runs(records: Records, iterations: int) -> tuple[dict[str, list[Run]], int]:
    """Runs of the plan that have no record, by stage, and how many runs the plan has."""
    known = {Run.of(r).name for r in records}
    planned: set[str] = set()
    left = {}
    for label, runs in stages(lambda: records, iterations):
        # A rate's first seed is part of two stages.
        fresh = {run.name: run for run in runs if run.name not in planned}
        planned |= fresh.keys()
        left[label] = [run for name, run in fresh.items() if name not in known]
    return {label: runs for label, runs in left.items() if runs}, len(planned)
