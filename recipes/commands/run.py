"""`qmir run`: carry out a recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import emit_facts, emit_json, emit_table, progress, status


def run(
    recipe: Annotated[str, typer.Argument(help="Name from `qmir recipes`, or a YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    train: Annotated[
        list[Path] | None, typer.Option(help="Folder with training images; repeatable.")
    ] = None,
    train_inputs: Annotated[
        list[Path] | None, typer.Option(help="Folder with their inputs, one for each --train.")
    ] = None,
    evaluate: Annotated[
        list[Path] | None, typer.Option("--eval", help="Folder with test images; repeatable.")
    ] = None,
    eval_inputs: Annotated[
        list[Path] | None, typer.Option(help="Folder with their inputs, one for each --eval.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help='Weights to start from: a file, "pretrained" or "fresh".')
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: train.iterations=500."),
    ] = None,
    skip_bad_images: options.SkipBadImages = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for decoded training images, instead of memory.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished run in --output.")
    ] = False,
    tile: Annotated[int, typer.Option(help="Tile of the evaluation; 0 runs images whole.")] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Train (float or quantized) as a recipe says, and evaluate the result."""
    with status("checking the recipe"):
        from qmir_ao.recipes.run import run_recipe
        from qmir_ao.recipes.schema import load_recipe

        overrides = _overrides(settings or [])
        folders = {
            "data.train": train,
            "data.train_inputs": train_inputs,
            "data.eval": evaluate,
            "data.eval_inputs": eval_inputs,
        }
        overrides |= {key: [str(f) for f in given] for key, given in folders.items() if given}
        if weights is not None:
            overrides["model.weights"] = weights
        loaded = load_recipe(recipe, overrides)
    # One bar for all: it starts over when the images are read, and when training is done.
    with progress(loaded.name) as bar:
        result = run_recipe(
            loaded,
            output,
            skip_bad_images=skip_bad_images,
            cache=cache,
            resume=resume,
            tile=tile or None,
            loading=bar,
            progress=bar,
            scoring=bar,
        )
    facts = {
        "recipe": loaded.name,
        "folder": str(output),
        "iterations": result.training.iterations,
        "minutes": round(result.training.minutes, 2),
        "loss": result.training.loss,
    }
    if as_json:
        emit_json({**facts, "scores": result.scores, "lowering": result.lowering})
        return
    emit_facts(facts)
    if result.scores:
        emit_table(
            loaded.task.title,
            ["set", "network", "PSNR, dB", f"{loaded.task.baseline_name}, dB", "SSIM"],
            [_row(record) for record in result.scores],
        )


def _overrides(settings: list[str]) -> dict[str, Any]:
    from qmir_ao.recipes.yaml_source import parse_scalar

    found: dict[str, Any] = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign or "." not in key:
            raise ConfigError(f"--set {setting}: must be KEY=VALUE, such as train.iterations=500")
        found[key.strip()] = parse_scalar(value.strip(), f"--set {setting}")
    return found


def _row(record: dict[str, Any]) -> list[str]:
    mean = record["mean"]
    numbers = [
        "inf" if mean[key] is None else f"{mean[key]:.2f}" for key in ("psnr", "baseline_psnr")
    ]
    return [Path(record["set"]).name, record["network"], *numbers, f"{mean['ssim']:.4f}"]
