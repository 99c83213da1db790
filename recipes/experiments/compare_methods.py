"""`qmir reproduce qat-x2`: train, lower and score every method, then write the page.

The runs come in stages, because the learning rate of a later stage is the best of an earlier one.
Records lie beside each other in `runs/`; a second call does only what is missing.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import qmir_ao
from qmir_ao.errors import ConfigError
from qmir_ao.recipes.experiments.benches import OpenBench, Request, open_bench
from qmir_ao.recipes.experiments.comparison_plan import stages
from qmir_ao.recipes.experiments.evidence import (
    EIGHT_BIT_METHODS,
    SEEDS,
    WIDTHS,
    best_runs,
    float_rows,
    of_length,
    read_records,
    rows,
)
from qmir_ao.recipes.experiments.evidence_page import write_page
from qmir_ao.recipes.experiments.jobs import Job, model_folder, work_together
from qmir_ao.recipes.experiments.methods import METHODS, get_method
from qmir_ao.recipes.experiments.published import FLOAT
from qmir_ao.recipes.experiments.registry import COMPARISON
from qmir_ao.recipes.experiments.runs import Run, open_dataset, write_record
from qmir_ao.recipes.images import atomic_write
from qmir_ao.recipes.qat import qat_options, train_quantized

BENCH = "light-sr-x2"
KEPT = ("dls+rfa", "lsq", "quantsr")
"""Methods whose lowered networks of the first seed are kept."""
TIMED_STEPS, UNTIMED_STEPS = 20, 3

Record = dict[str, Any]
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


def open_comparison(request: Request) -> dict[str, OpenBench]:
    """The one bench of the comparison, with its records in `runs/` itself."""
    opened = open_bench(BENCH, request)
    return {BENCH: replace(opened, folder=request.output / "runs")}


def _check_images(opened: OpenBench) -> None:
    """Refuse a folder with runs of other images or weights: they would be mixed up with these."""
    path = opened.folder / "bench.json"
    facts = {key: opened.facts[key] for key in ("network", "weights", "task", "folder")}
    if path.is_file():
        saved = json.loads(path.read_text())
        if saved != facts:
            raise ConfigError(
                f"{opened.folder}: holds runs of {saved.get('folder')}, got {facts['folder']}: "
                "network, weights or images differ; give the same ones, or another --output"
            )
    else:
        write_record(opened.folder, "bench", facts)


def _length(request: Request) -> int:
    return request.iterations or COMPARISON.budget.iterations


def compare_methods(request: Request, workers: int, progress: Progress) -> Path:
    """Do what is left of the comparison and write `README.md`, `qat-x2.json`, plots and models.

    Args:
        request: images, output folder, seeds, iterations.
        workers: processes that share the runs; others may be started on the same folder.
        progress: `progress(label)` is a context manager that gives a callback (done, total).

    Returns:
        The page.

    Raises:
        ConfigError: wrong settings, or records of other images in the folder.
        ImageError: an image cannot be read.
    """
    if request.scale != "tiny":
        raise ConfigError(f"{COMPARISON.key} runs at --scale tiny only, got {request.scale!r}")
    if SEEDS[0] not in request.seeds:
        raise ConfigError(
            f"--seeds must hold {SEEDS[0]}, which chooses the rates; got {request.seeds}"
        )
    benches = open_comparison(request)
    opened = benches[BENCH]
    opened.folder.mkdir(parents=True, exist_ok=True)
    _check_images(opened)
    again = partial(open_comparison, request)
    with progress("the float network") as report:
        work_together([Job(BENCH, None)], benches, 1, again, report)
    read = partial(read_records, opened.folder)
    for label, runs in stages(read, _length(request), request.seeds):
        jobs = [Job(BENCH, run) for run in runs]
        with progress(f"{label}: {len(jobs)} runs") as report:
            work_together(jobs, benches, workers, again, report)
    with progress("time of a training step") as report:
        measure_steps(opened, report)
    with progress("page and plots"):
        return write_results(opened, request.output, _length(request))


def write_results(opened: OpenBench, output: Path, iterations: int) -> Path:
    """Page, `qat-x2.json`, plots and kept models of the records that are there."""
    everything = read_records(opened.folder)
    records = of_length(everything, iterations)
    entries = rows(records, _steps(opened.folder))
    baseline = json.loads((opened.folder / f"{FLOAT}.json").read_text())["sets"]
    document = json.dumps([*float_rows(baseline), *entries], indent=1)
    atomic_write(output / "qat-x2.json", (document + "\n").encode())
    _keep_models(opened, records, output / "models")
    return write_page(
        everything,
        entries,
        output,
        iterations=iterations,
        float_psnr={name: scores["psnr"] for name, scores in baseline.items()},
    )


def _keep_models(opened: OpenBench, records: Sequence[Record], folder: Path) -> None:
    for record in [record for width in WIDTHS for record in best_runs(records, width)]:
        if record["method"] not in KEPT or record["seed"] != SEEDS[0]:
            continue
        run = Run.of(record)
        source = model_folder(opened, Job(BENCH, run))
        if source.is_dir():
            target = folder / f"{run.method}-w{run.weight_bits}a{run.act_bits}"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)


def _steps(folder: Path) -> dict[str, float]:
    path = folder / "steps.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def measure_steps(opened: OpenBench, progress: Callable[[int, int], None]) -> None:
    """Seconds of a training step of every method, one after the other in this process.

    Nothing else should run meanwhile. They go to `steps.json` beside the records.
    """
    found, wanted = _steps(opened.folder), [(key, w) for w in WIDTHS for key in METHODS]
    wanted += [(key, 8) for key in EIGHT_BIT_METHODS]
    dataset = open_dataset(opened.bench, opened.budget.patch)
    for place, (key, width) in enumerate(wanted):
        progress(place, len(wanted))
        name = f"{key}-w{width}a{width}"
        if name not in found:
            found[name] = round(_step_seconds(opened, dataset, key, width), 4)
            write_record(opened.folder, "steps", found)
    progress(len(wanted), len(wanted))


def _step_seconds(opened: OpenBench, dataset: Any, key: str, width: int) -> float:
    budget, bench = opened.budget, opened.bench
    count = TIMED_STEPS + UNTIMED_STEPS
    dataset.seed, dataset.length = 0, budget.batch * count
    options = qat_options(count, learning_rate=1e-4, batch=budget.batch, patch=budget.patch)
    qconfig = qmir_ao.get_qmir_qconfig(width, width, **get_method(key).settings)
    times: list[float] = []
    train_quantized(
        bench.model,
        dataset,
        replace(options, clip=bench.clip),
        qconfig,
        progress=lambda done, total: times.append(time.perf_counter()),
    )
    taken = [b - a for a, b in pairwise(times)]
    return median(taken[-TIMED_STEPS:])
