"""`qmir analyze`: which layers suffer from quantization, and what it did to a lowered model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import emit_facts, emit_json, emit_table, progress, status

if TYPE_CHECKING:
    from qmir_ao.backend.table import Table
    from qmir_ao.recipes.analysis import Analysis

SHOWN = 10


def analyze(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Name of the zoo or float weights file.")
    ],
    folder: Annotated[Path, typer.Argument(help="Folder with ground-truth images.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write, or to go on in.")
    ],
    bits: Annotated[
        list[int] | None,
        typer.Option(
            help="Bits to try for each layer; repeatable, 0 for none.", show_default="2, 4, 8"
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Choose bits for it: size=0.2x, size=150000 (bytes) or bits=4.0."),
    ] = None,
    lowered: Annotated[
        Path | None, typer.Option(help="Folder of a lowered model to compare with.")
    ] = None,
    images: Annotated[int, typer.Option(help="Images to look at.")] = 4,
    side: Annotated[int, typer.Option(help="Side of their middles, in pixels of the input.")] = 48,
    task: Annotated[
        str | None,
        typer.Option(help="sr, jpeg, denoise or real-denoise.", show_default="sr if it enlarges"),
    ] = None,
    quality: Annotated[int | None, typer.Option(help="jpeg: quality, 1 to 100.")] = None,
    sigma: Annotated[float | None, typer.Option(help="denoise: noise in units of 1/255.")] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="Folder with inputs, instead of making them.")
    ] = None,
    arch: options.Arch = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure what quantization costs, layer by layer, and write tables and a page."""
    with status("loading the model"):
        from qmir_ao.recipes.analysis import analyze as run
        from qmir_ao.recipes.analysis import probe_pairs
        from qmir_ao.recipes.commands.evaluate import chosen_task
        from qmir_ao.recipes.loading import load_model

        loaded = load_model(model, arch)
        if loaded.source == "lowered":
            raise ConfigError(
                f"analyze: {loaded.name} is lowered already; give the float network, and the "
                "lowered one by --lowered"
            )
        integer: Any = None if lowered is None else load_model(str(lowered)).model
        settings = {k: v for k, v in (("quality", quality), ("sigma", sigma)) if v is not None}
        pairs = probe_pairs(
            chosen_task(loaded, task, settings), folder, inputs, count=images, side=side
        )
    # One bar for both: it starts over when the layers are measured.
    with progress(f"analysing {loaded.name}") as bar:
        found = run(
            loaded.model,
            pairs,
            output,
            title=loaded.name,
            bits=() if bits == [0] else tuple(bits or (2, 4, 8)),
            budget=budget,
            lowered=integer,
            measuring=bar,
            comparing=bar,
        )
    if as_json:
        emit_json(_document(loaded.name, found))
    else:
        _show(found)


def _document(name: str, found: "Analysis") -> dict[str, Any]:
    def rows(table: "Table | None") -> list[dict[str, Any]] | None:
        return None if table is None else table.rows

    chosen = found.assignment
    return {
        "model": name,
        "page": str(found.page),
        "sensitivity": rows(found.sensitivity),
        "comparison": rows(found.comparison),
        "assignment": None
        if chosen is None
        else {
            "bits": chosen.bits,
            "bytes": chosen.stored_bytes,
            "mean_bits": chosen.mean_bits,
            "expected": chosen.expected,
        },
    }


def _show(found: "Analysis") -> None:
    from qmir_ao.recipes.analysis_page import shown

    if found.sensitivity is not None:
        keys = ["layer", "bits", "psnr_to_float", "psnr", "drop"]
        emit_table(
            "most sensitive layers, one quantized at a time",
            ["layer", "bits", "PSNR to float, dB", "PSNR, dB", "drop, dB"],
            shown(found.sensitivity.sorted_by("mse", descending=True).rows[:SHOWN], keys),
        )
    if found.comparison is not None:
        keys = ["layer", "kind", "sqnr_db", "clipped", "codes_used", "outliers"]
        emit_table(
            "noisiest operators of the lowered network",
            ["layer", "operator", "SQNR, dB", "clipped", "codes used", "outliers"],
            shown(found.comparison.sorted_by("sqnr_db").rows[:SHOWN], keys),
        )
    facts: dict[str, Any] = {"page": found.page}
    if found.assignment is not None:
        chosen = found.assignment
        counts = {b: list(chosen.bits.values()).count(b) for b in sorted(set(chosen.bits.values()))}
        facts |= {
            "layers": ", ".join(f"{n} at {b} bits" for b, n in counts.items()),
            "bytes": f"{chosen.stored_bytes:,}",
            "bits per weight": f"{chosen.mean_bits:.2f}",
        }
        facts |= {
            f"expected {key.replace('_', ' ')}": f"{value:.2f} dB"
            for key, value in chosen.expected.items()
            if value is not None
        }
    emit_facts(facts)
