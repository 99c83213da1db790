"""`qmir quantize`: quantization-aware training from float weights, then the integer network."""

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import emit_facts, emit_json, progress, status
from qmir_ao.recipes.distributed import is_main, wait

if TYPE_CHECKING:
    from qmir_ao.recipes.data import PatchDataset
    from qmir_ao.recipes.loading import LoadedModel
    from qmir_ao.recipes.qat import QATResult
    from qmir_ao.recipes.train import TrainOptions

QAT_WEIGHTS = "qat.safetensors"


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Name of the zoo or float weights file.")
    ],
    folders: Annotated[list[Path], typer.Argument(help="Folders with training images.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; must not exist yet.")
    ],
    bits: Annotated[int, typer.Option(help="Bits of weights and activations.")] = 4,
    weight_bits: Annotated[int | None, typer.Option(help="Bits of weights only.")] = None,
    act_bits: Annotated[int | None, typer.Option(help="Bits of activations only.")] = None,
    activation: Annotated[
        str, typer.Option(help="Quantizer of activations: dls, or a rival such as lsq.")
    ] = "dls",
    weight: Annotated[
        str, typer.Option(help="Quantizer of weights: rfa, or a rival such as lsq.")
    ] = "rfa",
    iterations: options.Iterations = 2000,
    batch: options.Batch = 4,
    patch: options.Patch = 32,
    learning_rate: options.LearningRate = 8e-4,
    loss: options.Loss = "l1",
    seed: options.Seed = 0,
    precision: options.Precision = "32-true",
    ema: options.Ema = 0.0,
    distill: Annotated[
        float, typer.Option(help="Weight of the L1 distance to the float model's output.")
    ] = 0.0,
    save_every: options.SaveEvery = 500,
    resume: options.Resume = False,
    log_dir: options.LogDir = None,
    skip_bad_images: options.SkipBadImages = False,
    arch: options.Arch = None,
    as_json: options.AsJson = False,
) -> None:
    """Train a model at low bit width and save the network that runs in integers."""
    _check_output(output)
    with status("loading the model"):
        import qmir_ao
        from qmir_ao.recipes.loading import load_model
        from qmir_ao.recipes.qat import qat_options, train_quantized

        settings = qat_options(
            iterations, learning_rate=learning_rate, batch=batch, patch=patch, seed=seed, loss=loss
        )
        settings = dataclasses.replace(
            settings,
            save_every=save_every,
            precision=precision,
            ema=ema,
            distill=distill,
            log_dir=log_dir,
        )
        widths = {
            "weight_bits": bits if weight_bits is None else weight_bits,
            "act_bits": bits if act_bits is None else act_bits,
        }
        qconfig = qmir_ao.get_qmir_qconfig(*widths.values(), activation=activation, weight=weight)
        loaded = load_model(model, arch)
    _check_model(loaded)
    dataset = _read_images(folders, loaded.scale, settings, skip_bad_images)
    label = f"training {loaded.name} at W{widths['weight_bits']}A{widths['act_bits']}"
    checkpoints = options.checkpoint_folder(output, save_every)
    with progress(label) as report:
        result = train_quantized(
            loaded.model,
            dataset,
            settings,
            qconfig,
            progress=report,
            checkpoint_dir=checkpoints,
            resume=resume,
        )
    if is_main():
        facts = {"model": loaded.name, **widths, "activation": activation, "weight": weight}
        _finish(result, facts, output, checkpoints, as_json)
    wait()


def _read_images(
    folders: list[Path], scale: int, options: "TrainOptions", skip_bad_images: bool
) -> "PatchDataset":
    from qmir_ao.recipes.data import PatchDataset

    with progress("reading images") as report:
        return PatchDataset(
            folders,
            scale=scale,
            patch=options.patch,
            length=options.batch * options.iterations,
            seed=options.seed,
            skip_bad_images=skip_bad_images,
            progress=report,
        )


def _finish(
    result: "QATResult",
    facts: dict[str, Any],
    output: Path,
    checkpoints: Path | None,
    as_json: bool,
) -> None:
    """Lower the trained network, write the output folder in one go, and say what was made."""
    import qmir_ao
    from qmir_ao.recipes.checkpoint import save_weights
    from qmir_ao.recipes.resume import discard_checkpoints

    facts |= {
        "iterations": result.training.iterations,
        "minutes": round(result.training.minutes, 2),
        "loss": result.training.loss,
    }
    with status("lowering to integers"):
        lowered = qmir_ao.convert_and_lower(result.prepared, target="cpu")
        scratch = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        try:
            qmir_ao.save(lowered, scratch / "lowered")
            save_weights(result.prepared, scratch / "lowered" / QAT_WEIGHTS, facts)
            os.replace(scratch / "lowered", output)
        finally:
            shutil.rmtree(scratch)
    if checkpoints is not None:
        discard_checkpoints(checkpoints)
    _show({**facts, "folder": str(output), "lowering": lowered.report.to_dict()}, as_json)


def _check_output(output: Path) -> None:
    if output.exists():
        raise ConfigError(f"quantize: {output} exists; name a new folder or remove it")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"quantize: {output.absolute().parent} is not a folder; make it first")


def _check_model(loaded: "LoadedModel") -> None:
    if loaded.source == "lowered" or loaded.scale < 2:
        raise ConfigError(
            f"quantize: {loaded.name} is "
            f"{'lowered already' if loaded.source == 'lowered' else 'no enlarger'}; give a float "
            "super-resolution network, or a recipe of another task to qmir run (qmir recipes lists "
            "them)"
        )


def _show(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json(document)
        return
    lowering = document.pop("lowering")
    document["integer operators"] = len(lowering["operators"])
    document["left in float"] = len(lowering["left_in_float"])
    packed, floats = lowering["weight_bytes"], lowering["float_bytes"]
    document["quantized weights"] = f"{packed:,} bytes ({floats:,} in float32)"
    emit_facts(document)
