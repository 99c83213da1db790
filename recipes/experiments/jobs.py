"""The runs of an experiment: which there are, doing them in several processes, reading them back.

Every run is one JSON file named by its settings, in a folder named by network, task and images. So
tables share runs, and what is done is not done again.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from qmir_ao.errors import ConfigError, NonFiniteError
from qmir_ao.recipes.data import PatchDataset
from qmir_ao.recipes.evaluate import evaluate
from qmir_ao.recipes.experiments.benches import OpenBench, Request, bench_names, open_bench, plan
from qmir_ao.recipes.experiments.published import FLOAT
from qmir_ao.recipes.experiments.registry import Line, Part
from qmir_ao.recipes.experiments.runs import Run, claim, execute, open_dataset, write_record

MODELS = "models"
"""Folder beside the records that holds the lowered networks."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """One record: a run, or the scores of the float network where `run` is None."""

    bench: str
    run: Run | None

    @property
    def name(self) -> str:
        """File name of the record without suffix."""
        return FLOAT if self.run is None else self.run.name

    @property
    def steps(self) -> int:
        """Its share of a progress bar."""
        return 1 if self.run is None else self.run.iterations


def part_jobs(part: Part, opened: OpenBench, request: Request) -> list[Job]:
    """The records that one row needs from one bench, one for each seed."""
    if part.method == FLOAT:
        return [Job(part.bench, None)]
    budget = opened.budget
    return [
        Job(
            part.bench,
            Run(
                part.method,
                *part.bits,
                seed=seed,
                learning_rate=budget.learning_rate,
                iterations=budget.iterations,
                batch=budget.batch,
                patch=budget.patch,
                settings=part.settings,
            ),
        )
        for seed in request.seeds
    ]


def all_jobs(planned: Sequence[Line], benches: dict[str, OpenBench], request: Request) -> list[Job]:
    """Every record that the rows need, once; seeds vary slowest, so that all rows grow together."""
    found: dict[tuple[Path, str], Job] = {}
    for line in planned:
        for part in line.parts.values():
            opened = benches[part.bench]
            for job in part_jobs(part, opened, request):
                found.setdefault((opened.folder, job.name), job)
    return sorted(found.values(), key=lambda job: -1 if job.run is None else job.run.seed)


def read_record(opened: OpenBench, job: Job) -> dict[str, Any] | None:
    """A record, or None if it is not there yet.

    Raises:
        ConfigError: the file is damaged.
    """
    path = opened.folder / f"{job.name}.json"
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: damaged record ({error}); remove it and run again") from error
    return record


def model_folder(opened: OpenBench, job: Job) -> Path:
    """Where the lowered network of a run lies."""
    return opened.folder / MODELS / job.name


def _do(job: Job, opened: OpenBench, dataset: PatchDataset | None, tell: Progress) -> None:
    """Do one job that this process has claimed."""
    bench = opened.bench
    if job.run is None:
        scores = {}
        for name, (folder, low) in bench.sets.items():
            with torch.inference_mode():
                result = evaluate(
                    bench.model, folder, task=bench.restoration, low_folder=low, tile=bench.tile
                )
            scores[name] = result.to_dict()["mean"]
        record: dict[str, Any] = {"method": FLOAT, "sets": scores}
    else:
        assert dataset is not None
        keep = model_folder(opened, job)
        keep.parent.mkdir(parents=True, exist_ok=True)
        try:
            record = execute(job.run, bench, dataset, keep=keep, progress=tell)
        except NonFiniteError as error:
            # One that diverges is a result too; the others still run.
            record = {**asdict(job.run), "diverged": str(error)}
    write_record(opened.folder, job.name, record)


def work_jobs(
    jobs: Sequence[Job], benches: dict[str, OpenBench], progress: Progress | None = None
) -> int:
    """Do every job that has no record and that no other process does at the moment.

    Returns:
        The number of jobs done by this call.
    """
    total, done = sum(job.steps for job in jobs), 0
    datasets: dict[tuple[Path, int], PatchDataset] = {}
    for job in jobs:
        opened = benches[job.bench]
        opened.folder.mkdir(parents=True, exist_ok=True)
        finished = sum(j.steps for j in jobs if _has_record(benches[j.bench], j))

        def tell(step: int, steps: int, finished: int = finished) -> None:
            if progress is not None:
                progress(finished + step, total)

        tell(0, 0)
        if not claim(opened.folder, job.name):
            continue
        try:
            dataset = None
            if job.run is not None:
                key = opened.folder, job.run.patch
                if key not in datasets:
                    # Images of one bench at a time: a full training set fills the memory.
                    datasets = {key: open_dataset(opened.bench, job.run.patch)}
                dataset = datasets[key]
            _do(job, opened, dataset, tell)
            done += 1
        finally:
            (opened.folder / f"{job.name}.lock").unlink(missing_ok=True)
    if progress is not None:
        progress(total, total)
    return done


def _has_record(opened: OpenBench, job: Job) -> bool:
    return (opened.folder / f"{job.name}.json").is_file()


def open_benches(
    planned: Sequence[Line], request: Request, progress: Progress | None = None
) -> dict[str, OpenBench]:
    """All benches of an experiment, with a description beside their records."""
    benches = {}
    for name in bench_names(list(planned)):
        opened = open_bench(name, request, progress)
        opened.folder.mkdir(parents=True, exist_ok=True)
        write_record(opened.folder, "bench", opened.facts)
        benches[name] = opened
    return benches


def work_together(
    jobs: Sequence[Job],
    benches: dict[str, OpenBench],
    workers: int,
    reopen: Callable[[], dict[str, OpenBench]],
    progress: Progress | None = None,
) -> None:
    """Do the jobs in this process and in `workers - 1` others.

    Args:
        jobs: what to do.
        benches: networks and images.
        workers: processes.
        reopen: opens the benches again in another process; it must pickle.
        progress: called with (done, total) steps of all jobs.

    Raises:
        ConfigError: fewer than one worker.
        QmirError: a run failed, here or in another process.
    """
    if workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}")
    pending = [job for job in jobs if not _has_record(benches[job.bench], job)]
    workers = min(workers, len(pending))
    if workers <= 1:
        work_jobs(jobs, benches, progress)
        return
    threads = torch.get_num_threads()
    share = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(share)
    try:
        # Spawned, because a forked child inherits the locks of torch's threads.
        with ProcessPoolExecutor(workers - 1, mp_context=get_context("spawn")) as pool:
            others = [pool.submit(_worker, jobs, reopen, share) for _ in range(workers - 1)]
            work_jobs(jobs, benches, progress)
            for other in others:
                other.result()
    finally:
        torch.set_num_threads(threads)


def _worker(jobs: Sequence[Job], reopen: Callable[[], dict[str, OpenBench]], threads: int) -> int:
    """What another process of the same command does."""
    torch.set_num_threads(threads)
    return work_jobs(jobs, reopen())


def reopen_benches(request: Request) -> dict[str, OpenBench]:
    """The benches of a request that another process has opened before."""
    return {name: open_bench(name, request) for name in bench_names(plan(request))}
