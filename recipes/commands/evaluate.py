"""`qmir eval`: scores of a model on a folder of images."""

from pathlib import Path
from typing import Annotated

import typer

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import emit_json, emit_table, progress, status


def evaluate(
    model: options.Model,
    folder: Annotated[Path, typer.Argument(help="Folder with ground-truth images.")],
    scale: Annotated[int | None, typer.Option(help="Enlargement that the model must have.")] = None,
    low: Annotated[
        Path | None, typer.Option(help="Folder with inputs, instead of downscaling.")
    ] = None,
    arch: options.Arch = None,
    as_json: options.AsJson = False,
) -> None:
    """Score a model on a folder of images: PSNR and SSIM on luma."""
    with status("loading the model"):
        from qmir_ao.recipes.evaluate import evaluate as run
        from qmir_ao.recipes.loading import load_model

        loaded = load_model(model, arch)
    if scale is not None and scale != loaded.scale:
        raise ConfigError(f"eval: {loaded.name} enlarges {loaded.scale} times, not {scale}")
    with progress(f"scoring {loaded.name}") as report:
        result = run(loaded.model, folder, scale=loaded.scale, low_folder=low, progress=report)
    if as_json:
        emit_json({"model": loaded.name, "source": loaded.source, **result.to_dict()})
        return
    rows = [
        [i.name, *(f"{v:.2f}" for v in (i.psnr, i.bicubic_psnr)), f"{i.ssim:.4f}"]
        for i in result.images
    ]
    mean = result.mean
    rows.append(
        ["mean", f"{mean('psnr'):.2f}", f"{mean('bicubic_psnr'):.2f}", f"{mean('ssim'):.4f}"]
    )
    emit_table(
        f"{loaded.name}, x{loaded.scale}, on luma",
        ["image", "PSNR, dB", "bicubic, dB", "SSIM"],
        rows,
    )
