"""What single experiments add to their table: counts, measured distributions, plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import qmir_ao
from qmir_ao.recipes.experiments import complexity, figures, scans
from qmir_ao.recipes.experiments.benches import OpenBench, Request
from qmir_ao.recipes.experiments.jobs import model_folder, part_jobs, read_record
from qmir_ao.recipes.experiments.published import FLOAT, load_table
from qmir_ao.recipes.experiments.registry import Line
from qmir_ao.recipes.experiments.results import summary
from qmir_ao.recipes.experiments.tables import label

Document = dict[str, Any]
Benches = dict[str, OpenBench]
REFERENCE_SET = "Urban100"
"""Set of the paper's figure 2 and of its text."""


def _records(line: Line, benches: Benches, request: Request) -> list[dict[str, Any]]:
    """Records of a row without noise levels."""
    part = line.parts.get(None)
    if part is None:
        return []
    jobs = part_jobs(part, benches[part.bench], request)
    found = (read_record(benches[part.bench], job) for job in jobs)
    return [record for record in found if record is not None]


def count(document: Document, planned: Sequence[Line], benches: Benches, request: Request) -> None:
    """Put parameters and operations into a table of complexity."""
    for name, opened in benches.items():
        chosen = [
            (row, line)
            for row, line in zip(document["rows"], planned, strict=True)
            if line.parts and line.parts[None].bench == name
        ]
        records = [_records(line, benches, request) for _, line in chosen]
        complexity.fill([row for row, _ in chosen], opened.bench.model, records)


def _own_set(document: Document) -> dict[str, Any] | None:
    """First column of PSNR that holds a number of ours."""
    for place, cell in enumerate(document["rows"][0]["cells"]):
        ours = any(row["cells"][place]["mean"] is not None for row in document["rows"])
        if cell["metric"] == "psnr" and ours:
            return {"place": place, **cell}
    return None


def quality_and_size(
    document: Document, path: Path, planned: Sequence[Line], benches: Benches, request: Request
) -> list[Path]:
    """PSNR against parameters, the paper's two curves beside ours."""
    own = _own_set(document)
    if own is None:
        return []
    ours: dict[str, list[tuple[float, float, float]]] = {}
    floats: list[tuple[float, float, float]] = []
    for row, line in zip(document["rows"], planned, strict=True):
        cell, records = row["cells"][own["place"]], _records(line, benches, request)
        if cell["mean"] is None:
            continue
        total = float(complexity.parameters(benches[line.parts[None].bench].bench.model))
        done = [r for r in records if "weight_bytes" in r]
        sizes = [complexity.equivalent_parameters(int(total), r) for r in done] or [total]
        point = (sum(sizes) / len(sizes), cell["mean"], cell["std"] or 0.0)
        if row["method"] == FLOAT:
            floats.append(point)
        else:
            ours.setdefault(row["method"], []).append(point)
    lines = {name: [*floats, *points] for name, points in ours.items()} or {FLOAT: floats}
    panels = {"paper: Urban100": _paper_sizes(), f"ours: {own['set']}": lines}
    label = "parameters, as 32-bit ones"
    return [figures.curves(path, panels, label, "PSNR, dB")]


def _paper_sizes() -> dict[str, list[tuple[float, float, float]]]:
    """The two curves of the paper's figure, from its table of complexity."""
    table = load_table("table4")
    series: dict[str, list[tuple[float, float, float]]] = {}
    size, score = (
        [str(column) for column in table.columns].index(name)
        for name in ("parameters", f"{REFERENCE_SET}:psnr")
    )
    for row in table.rows:
        points = series.setdefault(row.network, [])
        across, up = row.values[size], row.values[score]
        if across is not None and up is not None:
            points.append((across, up, 0.0))
    return series


def _probe(opened: OpenBench) -> torch.Tensor:
    folder, inputs = next(iter(opened.bench.sets.values()))
    return scans.probe_input(opened.bench.restoration, folder, inputs)


def outliers(document: Document, path: Path, benches: Benches) -> list[Path]:
    """How far inputs and outputs of the float network's scans reach."""
    opened = next(iter(benches.values()))
    heard = scans.listen(opened.bench.model, _probe(opened))
    rows = []
    for index, scan in enumerate(heard):
        assert scan.given is not None
        given, made = scans.spread(scan.given), scans.spread(scan.made)
        numbers = (given["peak"], made["peak"], given["kurtosis"], made["kurtosis"])
        share = f"{100 * made['far']:.3f}"
        rows.append([f"scan {index}", *(f"{value:.1f}" for value in numbers), share])
    header = ["", "input peak, sigma", "output peak, sigma", "input kurtosis", "output kurtosis"]
    beyond = f"outputs beyond {scans.FAR:g} sigma, %"
    document["findings"] = [
        {"title": "Outliers in the float network", "header": [*header, beyond], "rows": rows}
    ]
    return [figures.outliers(path, heard)]


def outputs(
    document: Document, path: Path, planned: Sequence[Line], benches: Benches, request: Request
) -> list[Path]:
    """Outputs of the scans in float and in the lowered networks of each method."""
    opened = benches[planned[0].parts[None].bench]
    probe = _probe(opened)
    heard = {FLOAT: [scans.listen(opened.bench.model, probe)]}
    for line in planned:
        part = line.parts[None]
        folders = [model_folder(opened, job) for job in part_jobs(part, opened, request)]
        # A training that diverged left none.
        found = [scans.listen(qmir_ao.load(f), probe) for f in folders if f.is_dir()]
        if found:
            heard[line.row.method] = found
    shown = scans.shown_scans(len(heard[FLOAT][0]))
    reference = {index: heard[FLOAT][0][index].made for index in shown}
    rows = [
        [f"scan {index}", name, *_reach(reference[index], [n[index].made for n in networks])]
        for index in shown
        for name, networks in heard.items()
    ]
    document["findings"] = [
        {
            "title": "Extreme values of the scans' outputs, means over the seeds",
            "header": ["", "network", "lowest", "highest", "beyond 3 sigma of float, %"],
            "rows": rows,
        }
    ]
    panels = {
        f"scan {index}": {name: networks[0][index].made for name, networks in heard.items()}
        for index in shown
    }
    return [figures.distributions(path, panels)]


def _reach(reference: torch.Tensor, outputs: Sequence[torch.Tensor]) -> list[str]:
    mean, limit = reference.mean(), 3 * reference.std()
    measured = {
        "lowest": [float(values.min()) for values in outputs],
        "highest": [float(values.max()) for values in outputs],
        "far": [100 * float(((values - mean).abs() > limit).float().mean()) for values in outputs],
    }
    shown = []
    for values in measured.values():
        found = summary("", values)
        spread = "" if found["std"] is None else f" \N{PLUS-MINUS SIGN} {found['std']:.2f}"
        shown.append(f"{found['mean']:.2f}{spread}")
    return shown


def losses(document: Document, path: Path) -> list[Path]:
    """Distance to the float network on one set, the paper's beside ours."""
    own = _own_set(document)
    if own is None:
        return []
    same = own["paper"] is not None
    printed = next(
        (
            place
            for place, cell in enumerate(document["rows"][0]["cells"])
            if cell["metric"] == "psnr" and cell["paper"] is not None
        ),
        None,
    )
    place = own["place"] if same else printed
    ran = [row for row in document["rows"] if row["cells"][own["place"]]["mean"] is not None]
    ours, below = _distances(ran, own["place"], "mean", "std")
    if not ours:
        return []
    panels = {f"ours: {label(own)}, below {below}": ours}
    if place is not None:
        paper, below = _distances(ran, place, "paper", "paper_std")
        title = f"paper: {label(document['rows'][0]['cells'][place])}, below {below}"
        panels = {title: {name: paper.get(name, (0.0, 0.0)) for name in ours}, **panels}
    return [figures.losses(path, panels)]


def _distances(
    rows: Sequence[dict[str, Any]], place: int, key: str, std: str
) -> tuple[dict[str, tuple[float, float]], str]:
    """Decibels below the float row of the same network, by method and bits, and below what."""
    places = [(row["network"], row["scale"]) for row in rows]
    floats = {
        where: row["cells"][place][key]
        for where, row in zip(places, rows, strict=True)
        if row["method"] == FLOAT
    }
    found = {}
    for where, row in zip(places, rows, strict=True):
        value, top = row["cells"][place][key], floats.get(where)
        if row["method"] == FLOAT or value is None:
            continue
        name = f"{row['method']} {row['bits']}"
        if len(set(places)) > 1:
            name += f", {where[0]}" + (f" x{where[1]}" if where[1] else "")
        name = f"{row['part']}: {name}" if row["part"] else name
        # Two of the paper's ablations have no float row: the best one stands for it.
        best = top if top is not None else max(r["cells"][place][key] or 0.0 for r in rows)
        found[name] = (best - value, row["cells"][place][std] or 0.0)
    return found, "the best row" if None in floats.values() or not floats else "float"
