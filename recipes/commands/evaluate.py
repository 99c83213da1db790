"""`qmir eval`: scores of a model on a folder of images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import emit_json, emit_table, progress, status

if TYPE_CHECKING:
    from qmir_ao.recipes.evaluate import Evaluation
    from qmir_ao.recipes.loading import LoadedModel
    from qmir_ao.recipes.tasks import Task


def evaluate(
    model: options.Model,
    folder: Annotated[
        Path, typer.Argument(help="Folder with ground-truth images (or SIDD's .mat files).")
    ],
    task: Annotated[
        str | None,
        typer.Option(help="sr, jpeg, denoise or real-denoise.", show_default="sr if it enlarges"),
    ] = None,
    scale: Annotated[int | None, typer.Option(help="sr: enlargement the model must have.")] = None,
    quality: Annotated[int | None, typer.Option(help="jpeg: quality, 1 to 100.")] = None,
    protocol: Annotated[str | None, typer.Option(help="jpeg: swinir or mambair.")] = None,
    encoder: Annotated[str | None, typer.Option(help="jpeg: opencv or pillow.")] = None,
    sigma: Annotated[float | None, typer.Option(help="denoise: noise in units of 1/255.")] = None,
    low: Annotated[
        Path | None,
        typer.Option("--low", "--inputs", help="Folder with inputs, instead of making them."),
    ] = None,
    border: Annotated[
        int | None, typer.Option(help="Pixels cropped before scoring.", show_default="as published")
    ] = None,
    tile: Annotated[int, typer.Option(help="Side of a tile in pixels; 0 runs images whole.")] = 0,
    lpips: Annotated[
        str | None,
        typer.Option(help="Also measure LPIPS: alex, vgg or squeeze. Needs torchvision."),
    ] = None,
    arch: options.Arch = None,
    as_json: options.AsJson = False,
) -> None:
    """Score a model on a folder of images: PSNR and SSIM as the task's papers compute them."""
    given = {
        "scale": scale,
        "quality": quality,
        "protocol": protocol,
        "encoder": encoder,
        "sigma": sigma,
    }
    with status("loading the model"):
        from qmir_ao.recipes.evaluate import evaluate as run
        from qmir_ao.recipes.loading import load_model

        loaded = load_model(model, arch)
        chosen = chosen_task(loaded, task, {k: v for k, v in given.items() if v is not None})
    with progress(f"scoring {loaded.name}") as report:
        result = run(
            loaded.model,
            folder,
            task=chosen,
            low_folder=low,
            border=border,
            tile=tile or None,
            perceptual=lpips,
            progress=report,
        )
    if as_json:
        emit_json({"model": loaded.name, "source": loaded.source, **result.to_dict()})
        return
    _show(loaded.name, result)


def chosen_task(loaded: "LoadedModel", name: str | None, settings: dict[str, Any]) -> "Task":
    """The task asked for, after a check that the network can do it.

    Raises:
        ConfigError: the task is not said, unknown, or not the network's.
    """
    from qmir_ao.recipes.tasks import TASKS, create_task

    if name is None and loaded.scale == 1:
        raise ConfigError(
            f"{loaded.name} does not enlarge, so its task must be said: --task "
            f"{', '.join(n for n in TASKS if n != 'sr')}"
        )
    name = "sr" if name is None else name
    if name == "sr":
        settings = {"scale": loaded.scale} | settings
    task = create_task(name, **settings)
    if task.scale != loaded.scale:
        raise ConfigError(
            f"{loaded.name} enlarges {loaded.scale} times, not {task.scale} ({task.title})"
        )
    if task.channels != loaded.channels:
        raise ConfigError(
            f"{loaded.name} takes images of {loaded.channels} channels, {task.title} has "
            f"{task.channels}; give a model of that task"
        )
    return task


def _show(name: str, result: "Evaluation") -> None:
    baseline = result.task.baseline_name
    shown = {"psnr": ("PSNR, dB", 2), "baseline_psnr": (f"{baseline}, dB", 2), "ssim": ("SSIM", 4)}
    if "lpips" in result.columns:
        shown |= {"lpips": ("LPIPS", 4), "baseline_lpips": (f"{baseline}, LPIPS", 4)}
    rows = [
        [image.name, *(f"{getattr(image, key):.{digits}f}" for key, (_, digits) in shown.items())]
        for image in result.images
    ]
    rows.append(["mean", *(f"{result.mean(key):.{digits}f}" for key, (_, digits) in shown.items())])
    on = {"y": "luma", "rgb": "RGB", "grey": "grey"}[result.convention.channel]
    emit_table(
        f"{name}, {result.task.title}, on {on}",
        ["image", *(title for title, _ in shown.values())],
        rows,
    )
