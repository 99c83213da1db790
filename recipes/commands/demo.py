"""`qmir demo`: train, lower and compare the tiny model, and write the report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import emit_json, emit_table, emit_text, progress, status
from qmir_ao.recipes.widths import WIDTHS, Width

STEPS = {width.bits: width.iterations for width in WIDTHS}


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("demo"),
    steps_w4a4: Annotated[int, typer.Option(min=1, help="Training steps at 4 bits.")] = STEPS[4],
    steps_w2a2: Annotated[int, typer.Option(min=1, help="Training steps at 2 bits.")] = STEPS[2],
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Train the tiny model at 4 and 2 bits, run it in integers, write a report (5 minutes)."""
    with status("loading torch"):
        from qmir_ao.recipes.demo import DemoOptions, run

    settings = DemoOptions(widths=(Width(4, steps_w4a4), Width(2, steps_w2a2)), seed=seed)
    document = run(output, settings, progress)
    if as_json:
        emit_json(document)
        return
    emit_table(
        f"{document['model']['name']}: means over {len(document['images'])} held-out images",
        ["", "PSNR-Y, dB", "SSIM-Y", "weights, bytes", "integer ops", "float ops", "ms"],
        [_row(method) for method in document["methods"]],
    )
    emit_text(f"Report: {output / 'report.html'} ({document['seconds']['total']:.0f} s)")


def _row(method: dict[str, Any]) -> list[str]:
    scores = [method["label"], f"{method['psnr']:.2f}", f"{method['ssim']:.4f}"]
    if "latency_ms" not in method:
        return [*scores, "", "", "", ""]
    return [
        *scores,
        f"{method['weight_bytes']:,}",
        str(method.get("integer_operators", 0)),
        str(len(method["left_in_float"])) if "left_in_float" in method else "all",
        f"{method['latency_ms']:.0f}",
    ]
