"""An experiment's outcome as plain data: the paper's numbers, ours, and what is known of both."""

from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import fmean, stdev
from typing import Any

import torch

import qmir_ao
from qmir_ao.recipes.experiments.benches import TINY, OpenBench, Request
from qmir_ao.recipes.experiments.jobs import part_jobs, read_record
from qmir_ao.recipes.experiments.published import FLOAT, Column, Row, Table, load_table
from qmir_ao.recipes.experiments.registry import Experiment, Line, get_experiment

MEASURED = ("psnr", "ssim")
"""Metrics that every run records."""

Document = dict[str, Any]


def collect(planned: Sequence[Line], benches: dict[str, OpenBench], request: Request) -> Document:
    """Read the records of an experiment and put them beside the paper's numbers.

    Returns:
        What `<experiment>.json` holds: `rows` (one for each line of the table, with its `cells`),
        `inputs` (rows of what the float networks are given, untouched or enlarged), `records`
        (every run in full), `benches`, and the settings.
    """
    experiment = get_experiment(request.experiment)
    table = load_table(experiment.table)
    columns = [*table.columns, *_own_columns(table, benches)]
    rows: list[dict[str, Any]] = []
    inputs: dict[tuple[str, int | None], dict[str, Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    for line in planned:
        found = {
            sigma: [
                (f"{benches[part.bench].folder.name}/{job.name}", record)
                for job in part_jobs(part, benches[part.bench], request)
                if (record := read_record(benches[part.bench], job)) is not None
            ]
            for sigma, part in line.parts.items()
        }
        by_sigma = {sigma: [record for _, record in named] for sigma, named in found.items()}
        records.update(named for pairs in found.values() for named in pairs)
        rows.append(_row(line, table, columns, by_sigma, request))
        if line.parts and all(part.method == FLOAT for part in line.parts.values()):
            name = benches[next(iter(line.parts.values())).bench].bench.restoration.baseline_name
            inputs.setdefault(
                (line.row.network, line.row.scale), _input(rows[-1], name, columns, by_sigma)
            )
    return {
        "experiment": experiment.key,
        "title": experiment.title,
        "scale": request.scale,
        "table": experiment.table,
        "notes": [note for note in _notes(table, experiment, request) if note],
        "seeds": list(request.seeds),
        "qmir_ao": qmir_ao.__version__,
        "torch": torch.__version__,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "benches": {
            name: {**opened.facts, **_budget(opened, request)} for name, opened in benches.items()
        },
        "rows": rows,
        "inputs": list(inputs.values()),
        "records": [{"name": name, **record} for name, record in records.items()],
    }


def _notes(table: Table, experiment: Experiment, request: Request) -> tuple[str, ...]:
    # A figure takes some rows of a table only, which its note may not be about.
    printed = table.note if experiment.key == experiment.table else ""
    tested = any(test.folder is not None for test in request.sets)
    made_up = request.scale == "tiny" and not (request.train and tested)
    return printed, experiment.note, experiment.made_up if made_up else ""


def _budget(opened: OpenBench, request: Request) -> dict[str, Any]:
    budget = opened.budget
    facts = {
        "iterations": budget.iterations,
        "batch": budget.batch,
        "patch": budget.patch,
        "learning_rate": budget.learning_rate,
    }
    if request.scale == "tiny" and opened.facts["network"] != TINY:
        facts["float_iterations"] = budget.float_iterations
    return facts


def _own_columns(table: Table, benches: dict[str, OpenBench]) -> list[Column]:
    """Columns of test sets that the paper's table does not have."""
    known = {column.set.casefold() for column in table.columns if column.set is not None}
    sigmas = list(dict.fromkeys(column.sigma for column in table.columns))
    names = dict.fromkeys(name for opened in benches.values() for name in opened.bench.sets)
    return [
        Column(set=name, metric=metric, sigma=sigma)
        for name in names
        if name.casefold() not in known
        for metric in MEASURED
        for sigma in sigmas
    ]


def _row(
    line: Line,
    table: Table,
    columns: Sequence[Column],
    records: dict[int | None, list[dict[str, Any]]],
    request: Request,
) -> dict[str, Any]:
    row = line.row
    return {
        "part": row.part,
        "network": row.network,
        "method": row.method,
        "bits": row.bits,
        "scale": row.scale,
        "ran": bool(line.parts),
        "status": line.missing or _status(line, records, request),
        "cells": [_cell(row, table, c, records.get(c.sigma, [])) for c in columns],
    }


def _status(line: Line, records: dict[int | None, list[dict[str, Any]]], request: Request) -> str:
    """How much of a row is there."""
    is_float = all(part.method == FLOAT for part in line.parts.values())
    wanted = len(line.parts) * (1 if is_float else len(request.seeds))
    found = [record for group in records.values() for record in group]
    diverged = sum("diverged" in record for record in found)
    seeds = len(request.seeds)
    text = "float" if is_float else f"{seeds} seed{'s' * (seeds > 1)}"
    if len(found) < wanted:
        text = f"{len(found)} of {wanted} runs, the others run in another process"
    left = sum("not_lowered" in record for record in found)
    text = f"{text}, {diverged} diverged" if diverged else text
    return f"{text}, {left} without an integer form" if left else text


def _cell(
    row: Row, table: Table, column: Column, records: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    place = table.columns.index(column) if column in table.columns else None
    scores = [
        s
        for record in records
        if "not_lowered" not in record and (s := _scores(record, column)) is not None
    ]
    integer = [s.get(f"{column.metric}_integer", s.get(column.metric)) for s in scores]
    simulated = [s[column.metric] for s in scores if f"{column.metric}_integer" in s]
    return {
        "set": column.set,
        "metric": column.metric,
        "sigma": column.sigma,
        "paper": None if place is None else row.values[place],
        "paper_std": None if place is None or row.spread is None else row.spread[place],
        "doubts": table.reasons(row, column)
        if place is not None and row.values[place] is not None
        else [],
        **summary("", integer),
        **summary("simulated_", simulated),
    }


def _input(
    of: dict[str, Any],
    name: str,
    columns: Sequence[Column],
    records: dict[int | None, list[dict[str, Any]]],
) -> dict[str, Any]:
    """What the float network of a row was given, as a row of its own."""
    cells = []
    for column, cell in zip(columns, of["cells"], strict=True):
        found = [_scores(record, column) or {} for record in records.get(column.sigma, [])]
        values = [s[key] for s in found if (key := f"baseline_{column.metric}") in s]
        blank: dict[str, Any] = {"paper": None, "paper_std": None, "doubts": []}
        cells.append({**cell, **blank, **summary("", values), **summary("simulated_", [])})
    return {**of, "method": name, "bits": "", "status": "as given", "cells": cells}


def _scores(record: dict[str, Any], column: Column) -> dict[str, float] | None:
    """Scores of one record on the set of a column, whatever the case of its name."""
    if column.metric not in MEASURED or column.set is None:
        return None
    for name, scores in record.get("sets", {}).items():
        if name.casefold() == column.set.casefold():
            # None: the infinite PSNR of an input that equals its ground truth.
            return {key: value for key, value in scores.items() if value is not None}
    return None


def summary(prefix: str, values: Sequence[Any]) -> dict[str, Any]:
    """Values of the seeds, their mean and standard deviation (None below two)."""
    return {
        f"{prefix}values": list(values),
        f"{prefix}mean": fmean(values) if values else None,
        f"{prefix}std": stdev(values) if len(values) > 1 else None,
    }
