"""`qmir train`: float training of a zoo model."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import emit_facts, emit_json, progress


def train(
    name: Annotated[str, typer.Argument(help="Name of the model, such as mambair-tiny-x2.")],
    folders: Annotated[list[Path], typer.Argument(help="Folders with training images.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Weights to write, NAME.safetensors.")
    ],
    iterations: options.Iterations = 13000,
    batch: options.Batch = 8,
    patch: options.Patch = 32,
    learning_rate: options.LearningRate = 1e-3,
    loss: options.Loss = "l1",
    seed: options.Seed = 0,
    precision: options.Precision = "32-true",
    ema: options.Ema = 0.0,
    save_every: options.SaveEvery = 1000,
    resume: options.Resume = False,
    log_dir: options.LogDir = None,
    skip_bad_images: options.SkipBadImages = False,
    start: Annotated[
        Path | None, typer.Option(help="Weights to start from instead of fresh ones.")
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            "--eval", "--evaluate", help="Folder with ground truth to score the result on."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Train a float model of the zoo on folders of images; under torchrun on several machines."""
    with progress("loading torch"):
        from qmir_ao.recipes.train import TrainOptions
        from qmir_ao.recipes.train import train as run

    settings = TrainOptions(
        iterations=iterations,
        batch=batch,
        patch=patch,
        learning_rate=learning_rate,
        loss=loss,
        seed=seed,
        save_every=save_every,
        precision=precision,
        ema=ema,
        log_dir=log_dir,
    )
    # One bar for both: it starts over when the images are read.
    with progress(f"training {name}") as report:
        result = run(
            name,
            folders,
            output,
            settings,
            start=start,
            eval_folder=evaluate,
            checkpoint_dir=options.checkpoint_folder(output, save_every),
            resume=resume,
            skip_bad_images=skip_bad_images,
            command=shlex.join(["qmir", *sys.argv[1:]]),
            loading=report,
            progress=lambda done, total, loss: report(done, total),
        )
    facts = {
        "model": name,
        "weights": str(output),
        "iterations": result.iterations,
        "minutes": round(result.minutes, 2),
        "loss": result.loss,
    }
    if as_json:
        scores = None if result.evaluation is None else result.evaluation.to_dict()
        emit_json({**facts, "options": settings.to_dict(), "evaluation": scores})
        return
    if result.evaluation is not None:
        facts["psnr"] = f"{result.evaluation.mean('psnr'):.2f} dB"
        facts["bicubic psnr"] = f"{result.evaluation.mean('baseline_psnr'):.2f} dB"
    emit_facts(facts)
