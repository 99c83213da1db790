"""`qmir restore`: run a model over an image or a folder of images."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import emit_facts, emit_json, progress, status
from qmir_ao.recipes.distributed import is_main

BAD_INPUT = 2


def restore(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Image, or folder with images.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Image or folder to write.")],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Name of the zoo, weights file or lowered folder."),
    ] = "mambair-tiny-x2",
    tile: Annotated[int, typer.Option(help="Side of a tile in pixels; 0 runs images whole.")] = 200,
    arch: options.Arch = None,
    as_json: options.AsJson = False,
) -> None:
    """Restore an image or every image of a folder; large ones in tiles."""
    if not source.exists():
        raise FileNotFoundError(2, "no such file or folder", str(source))
    with status("loading the model"):
        from qmir_ao.recipes.loading import load_model
        from qmir_ao.recipes.restore import restore as run

        loaded = load_model(model, arch)
    with progress(f"restoring with {loaded.name}") as bar:
        result = run(
            loaded.model,
            source,
            target,
            scale=loaded.scale,
            channels=loaded.channels,
            tile=tile or None,
            # Tiles count as well: a thousandth of a file is the smallest step of the bar.
            progress=lambda done, total, name: bar(round(1000 * done), 1000 * total),
        )
    if as_json:
        failed = {str(path): reason for path, reason in result.failed.items()}
        emit_json({"written": [str(path) for path in result.written], "failed": failed})
    else:
        emit_facts({"written": len(result.written), "failed": len(result.failed)})
    for reason in result.failed.values() if is_main() else ():
        sys.stderr.write(f"error: {reason}\n")
    if result.failed:
        raise typer.Exit(BAD_INPUT)
