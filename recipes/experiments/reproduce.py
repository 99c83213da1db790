"""Run one experiment of the paper and write its table, its plot and its records."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from qmir_ao.recipes.experiments import findings
from qmir_ao.recipes.experiments.benches import OpenBench, Request, plan
from qmir_ao.recipes.experiments.jobs import (
    all_jobs,
    open_benches,
    reopen_benches,
    work_together,
)
from qmir_ao.recipes.experiments.registry import Line
from qmir_ao.recipes.experiments.results import collect
from qmir_ao.recipes.experiments.tables import render
from qmir_ao.recipes.images import atomic_write

Document = dict[str, Any]
Benches = dict[str, OpenBench]
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@contextmanager
def _silent(label: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


def reproduce(request: Request, workers: int = 1, progress: Progress = _silent) -> Document:
    """Do what is left of an experiment's runs and write `<experiment>.json`, `.md` and `.png`.

    Args:
        request: experiment, scale, data and folder.
        workers: processes that share the runs; others may be started on the same folder.
        progress: `progress(label)` is a context manager that gives a callback (done, total).

    Returns:
        What `<experiment>.json` holds, see `results.collect`.

    Raises:
        ConfigError: unknown experiment, wrong settings, or missing data.
        ImageError: an image cannot be read.
        CheckpointError: weights are damaged or of another architecture.
    """
    planned, output = plan(request), request.output
    output.mkdir(parents=True, exist_ok=True)
    with progress(f"{request.experiment}: preparing") as report:
        benches = open_benches(planned, request, report)
    jobs = all_jobs(planned, benches, request)
    if jobs:
        with progress(f"{request.experiment}: {len(jobs)} runs") as report:
            work_together(jobs, benches, workers, partial(reopen_benches, request), report)
    with progress(f"{request.experiment}: table and plots"):
        document = collect(planned, benches, request)
        plots = _finish(document, planned, benches, request)
        _write(output / f"{request.experiment}.json", _json(document))
        page = render(document, [plot.relative_to(output) for plot in plots])
        _write(output / f"{request.experiment}.md", page)
    return document


def _json(document: Document) -> str:
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    atomic_write(path, text.encode())


def _finish(
    document: Document, planned: Sequence[Line], benches: Benches, request: Request
) -> list[Path]:
    """Add what is special about an experiment, and plot it."""
    path = request.output / f"{request.experiment}.png"
    if request.experiment == "table4":
        findings.count(document, planned, benches, request)
    if request.experiment == "fig2":
        return findings.quality_and_size(document, path, planned, benches, request)
    if request.experiment == "fig3":
        return findings.outliers(document, path, benches)
    if request.experiment == "fig5":
        return findings.outputs(document, path, planned, benches, request)
    return findings.losses(document, path)
