"""`qmir reproduce`: the paper's tables and figures."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import emit_json, emit_table, emit_text, progress, status


def reproduce(
    experiment: Annotated[
        str, typer.Argument(help="table1 to table10, fig2, fig3, fig5 or qat-x2.")
    ],
    scale: Annotated[
        str,
        typer.Option(help="tiny: minutes to an hour on two cores; full: the paper's setting."),
    ] = "tiny",
    train: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder with training images; repeatable.",
            show_default="tiny: scikit-image's photos",
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER[:INPUTS]",
            help="Test set under the paper's name; repeatable. {scale} in INPUTS is the "
            "enlargement; NAME=none leaves a set out.",
            show_default="tiny: scikit-image's photos",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE=FILE",
            help="full: float weights of a recipe, such as light-sr-x2, denoise@15 or "
            "light-sr-x4/swinir-light-x4; repeatable. RECIPE=none leaves its rows out.",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the runs.")] = "0,1,2",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path(
        "reproduce"
    ),
    workers: Annotated[
        int, typer.Option(help="Processes that share the runs; more may be started by hand.")
    ] = 1,
    iterations: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of a quantized training.", show_default="by experiment"),
    ] = None,
    float_iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="tiny: steps of the float training of JPEG and denoising.",
            show_default="by experiment",
        ),
    ] = None,
    skip_bad_images: options.SkipBadImages = False,
    as_json: options.AsJson = False,
) -> None:
    """Run a table or figure of the paper and put its numbers beside; a second call goes on."""
    with status("loading torch"):
        from qmir_ao.recipes.experiments.benches import Request, TestSet
        from qmir_ao.recipes.experiments.registry import COMPARISON, get_experiment

        get_experiment(experiment)
        request = Request(
            experiment,
            output,
            scale,
            tuple(train or ()),
            tuple(TestSet.parse(text) for text in sets or ()),
            _weights(weights or []),
            _seeds(seeds),
            iterations,
            float_iterations,
            skip_bad_images,
        )
    run = _compare if experiment == COMPARISON.key else _reproduce
    run(request, workers, as_json)


def _reproduce(request: Any, workers: int, as_json: bool) -> None:
    """A table or figure of the paper."""
    from qmir_ao.recipes.experiments.reproduce import reproduce as run

    document = run(request, workers, progress)
    if as_json:
        emit_json(document)
    else:
        _print(document, request)


def _print(document: dict[str, Any], request: Any) -> None:
    header, rows = _table(document)
    networks = ", ".join({f["network"]: None for f in document["benches"].values()}) or "nothing"
    name = request.experiment
    emit_table(f"{name}: {document['title']} ({request.scale}: {networks})", header, rows)
    for reason, count in Counter(r["status"] for r in document["rows"] if not r["ran"]).items():
        emit_text(f"{count} rows {reason}")
    emit_text(f"Page: {request.output / f'{name}.md'}")


def _compare(request: Any, workers: int, as_json: bool) -> None:
    """The comparison of methods has stages and a page of its own."""
    from qmir_ao.recipes.experiments.compare_methods import compare_methods

    page = compare_methods(request, workers, progress)
    if as_json:
        emit_json(json.loads((page.parent / "qat-x2.json").read_text()))
        return
    emit_text(f"Page: {page}")


def _weights(given: list[str]) -> dict[str, Path | None]:
    found: dict[str, Path | None] = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not (name and sign and path):
            raise ConfigError(f"--weights {text}: must be RECIPE=FILE, such as light-sr-x2=W.pth")
        found[name] = None if path == "none" else Path(path)
    return found


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise ConfigError(f"--seeds {text}: must be whole numbers, such as 0,1,2") from error


def _table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The rows that ran, with the first set's PSNR; the page has the rest."""
    from qmir_ao.recipes.experiments.tables import label, number

    cells = document["rows"][0]["cells"]
    scores = [place for place, cell in enumerate(cells) if cell["metric"] == "psnr"]
    ours = [p for p in scores if any(r["cells"][p]["mean"] is not None for r in document["rows"])]
    place = (ours or scores)[0]
    paper = place if cells[place]["paper"] is not None else scores[0]
    header = ["method", "bits", f"paper {label(cells[paper])}"]
    rows = []
    for row in [*document["inputs"], *document["rows"]]:
        if not row["ran"]:
            continue
        printed, own = row["cells"][paper], row["cells"][place]
        numbers = [number("psnr", printed["paper"]), number("psnr", own["mean"], own["std"])]
        name = " ".join(filter(None, [row["part"], row["method"]]))
        where = row["network"] + (f" x{row['scale']}" if row["scale"] else "")
        rows.append([f"{where} {name}", row["bits"], *numbers, row["status"]])
    return [*header, f"ours {label(cells[place])}, dB", "our runs"], rows
