"""Carry out a recipe: train, quantize and lower if it says so, and evaluate."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qmir_ao
from qmir_ao.errors import ConfigError
from qmir_ao.recipes import distributed
from qmir_ao.recipes.checkpoint import load_checkpoint, save_weights
from qmir_ao.recipes.data import PatchDataset
from qmir_ao.recipes.evaluate import evaluate
from qmir_ao.recipes.images import atomic_write
from qmir_ao.recipes.loading import probe
from qmir_ao.recipes.models import create_model
from qmir_ao.recipes.qat import train_quantized
from qmir_ao.recipes.resume import FREE, discard_checkpoints
from qmir_ao.recipes.schema import WEIGHTS, Quantization, Recipe, load_recipe
from qmir_ao.recipes.train import TrainResult, fit

WEIGHTS_FILE, LOWERED_FOLDER = "weights.safetensors", "lowered"
RECIPE_FILE, SCORES_FILE, CHECKPOINTS = "recipe.yaml", "scores.json", "checkpoints"
MAY_CHANGE = {"data.eval", "data.eval_inputs", *(f"train.{key}" for key in FREE)}
"""Settings that a resumed run need not share: its weights do not depend on them."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RunResult:
    """What carrying out a recipe gave.

    Attributes:
        training: steps done, last loss, minutes.
        scores: one record for each evaluation folder and network, with the keys `set`, `network`
            ("float", "simulated" or "integer") and those of `Evaluation.to_dict`.
        lowering: report of the integer network, or None after a float training.
    """

    training: TrainResult
    scores: list[dict[str, Any]]
    lowering: dict[str, Any] | None


def run_recipe(
    recipe: Recipe,
    output: Path,
    *,
    skip_bad_images: bool = False,
    cache: Path | None = None,
    resume: bool = False,
    tile: int | None = None,
    loading: Progress | None = None,
    progress: Progress | None = None,
    scoring: Progress | None = None,
) -> RunResult:
    """Train and evaluate as a recipe says; everything is checked before training starts.

    The output folder gets `recipe.yaml` with all settings, `weights.safetensors` of the trained
    network, `lowered` (with quantization) and `scores.json`; while training lasts, `checkpoints`.

    Args:
        recipe: from `load_recipe`.
        output: folder to write; must not exist, or be empty, unless `resume` is set.
        skip_bad_images: leave out training images that cannot be read.
        cache: folder for decoded training images; in memory if None.
        resume: go on with an unfinished run of the same recipe in `output`.
        tile: section length for large images of the evaluation, or None to run them whole.
        loading: called with (done, total) after each training image is read.
        progress: called with (done, total) after each iteration.
        scoring: called with (done, total) after each test image.

    Raises:
        ConfigError: the recipe lacks folders or weights, model and task do not fit, or the output
            folder is not empty or, to be resumed, of another recipe.
        CheckpointError: the weights are damaged or of another architecture.
        ImageError: an image cannot be read, or a pair does not fit.
        NonFiniteError: the training diverged.
    """
    output = Path(output)
    model = initial_model(recipe)
    tests = _tests(recipe)
    _open(output, recipe, resume)
    options = recipe.train
    dataset = PatchDataset(
        recipe.data.train,
        task=recipe.task,
        patch=options.patch,
        length=options.batch * options.iterations,
        seed=options.seed,
        inputs=recipe.data.train_inputs,
        skip_bad_images=skip_bad_images,
        cache=cache,
        progress=loading,
    )
    _write(output / RECIPE_FILE, recipe.to_yaml())
    networks, training, lowering = _train(recipe, model, dataset, output, resume, progress)
    scores = []
    for kind, network in networks.items():
        for folder, inputs in tests:
            result = evaluate(
                network,
                folder,
                task=recipe.task,
                low_folder=inputs,
                tile=tile,
                progress=scoring,
            )
            scores.append({"set": str(folder), "network": kind, **result.to_dict()})
    # Scores first: they mark a finished run, which needs its checkpoints no more.
    _write(output / SCORES_FILE, json.dumps(scores, indent=2, allow_nan=False) + "\n")
    if distributed.is_main():
        discard_checkpoints(output / CHECKPOINTS)
    return RunResult(training, scores, lowering)


def initial_model(recipe: Recipe) -> nn.Module:
    """The network that training starts from, checked against the task.

    Raises:
        ConfigError: no weights for a quantization, or model and task do not fit.
        CheckpointError: the weights are damaged or of another architecture.
    """
    name, weights = recipe.model.name, recipe.model.weights
    if weights is None and recipe.quant is not None:
        raise ConfigError(
            f"recipe {recipe.name}: quantization starts from a trained float network; give its "
            f"weights (--weights FILE, or model.weights: a file, {' or '.join(WEIGHTS)})"
        )
    torch.manual_seed(recipe.train.seed)
    model = create_model(name, pretrained=weights == "pretrained")
    if weights is not None and weights not in WEIGHTS:
        load_checkpoint(model, Path(weights))
    scale, channels = probe(model.eval())
    task = recipe.task
    if (scale, channels) != (task.scale, task.channels):
        raise ConfigError(
            f"recipe {recipe.name}: {name} enlarges {scale} times and takes {channels} channels, "
            f"but {task.title} needs {task.scale} and {task.channels}; change model.name or task"
        )
    return model.train()


def _tests(recipe: Recipe) -> list[tuple[Path, Path | None]]:
    """Evaluation folders and their inputs, after all their images were read once."""
    data = recipe.data
    if not data.train:
        raise ConfigError(
            f"recipe {recipe.name}: no folder to train on; add --train FOLDER, or data.train"
        )
    if data.eval_inputs is not None and len(data.eval_inputs) != len(data.eval):
        raise ConfigError(
            f"recipe {recipe.name}: {len(data.eval)} evaluation folders and "
            f"{len(data.eval_inputs)} of inputs; give one folder of inputs for each"
        )
    inputs: list[Path | None] = [None] * len(data.eval)
    pairs = list(zip(data.eval, data.eval_inputs or inputs, strict=True))
    for folder, low in pairs:
        recipe.task.check_sources(folder, low)
    return pairs


def _train(
    recipe: Recipe,
    model: nn.Module,
    dataset: PatchDataset,
    output: Path,
    resume: bool,
    progress: Progress | None,
) -> tuple[dict[str, nn.Module], TrainResult, dict[str, Any] | None]:
    """Trained networks by kind, how training went, and the report of lowering."""
    facts = {"model": recipe.model.name, "recipe": recipe.to_dict()}
    checkpoints = output / CHECKPOINTS if recipe.train.save_every else None
    if recipe.quant is None:

        def tell(done: int, total: int, loss: float) -> None:
            if progress is not None:
                progress(done, total)

        training = fit(
            model,
            dataset,
            recipe.train,
            progress=tell,
            checkpoint_dir=checkpoints,
            resume=resume and checkpoints is not None,
        )
        _save(model.eval(), output, facts, training)
        return {"float": model}, training, None
    result = train_quantized(
        model,
        dataset,
        recipe.train,
        _qconfig(recipe.quant),
        progress=progress,
        checkpoint_dir=checkpoints,
        resume=resume and checkpoints is not None,
    )
    _save(result.prepared, output, facts, result.training)
    lowered = qmir_ao.convert_and_lower(result.prepared, target="cpu")
    if distributed.is_main():
        scratch = Path(tempfile.mkdtemp(dir=output, prefix=f".{LOWERED_FOLDER}."))
        try:
            qmir_ao.save(lowered, scratch / LOWERED_FOLDER)
            # A run that was killed while evaluating left one here.
            shutil.rmtree(output / LOWERED_FOLDER, ignore_errors=True)
            os.replace(scratch / LOWERED_FOLDER, output / LOWERED_FOLDER)
        finally:
            shutil.rmtree(scratch)
    networks = {"simulated": result.prepared, "integer": lowered}
    return networks, result.training, lowered.report.to_dict()


def _qconfig(quant: Quantization) -> Any:
    """QConfig of a quantization, or the mapping that carries its placement."""
    from qmir_ao.quant.qconfig import official_mapping

    return official_mapping(quant.qconfig) if quant.placement == "official" else quant.qconfig


def _open(output: Path, recipe: Recipe, resume: bool) -> None:
    """Make the output folder, or check that it holds an unfinished run of this recipe."""
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"run: {output.absolute().parent} is not a folder; make it first")
    started = (output / RECIPE_FILE).is_file()
    if resume and started:
        _check_same(output, recipe)
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        hint = "resume it (--resume), " if started and not _finished(output) else ""
        raise ConfigError(f"run: {output} exists; {hint}name a new folder or remove it")
    distributed.wait()
    output.mkdir(exist_ok=True)


def _finished(output: Path) -> bool:
    return (output / SCORES_FILE).is_file()


def _check_same(output: Path, recipe: Recipe) -> None:
    if _finished(output):
        raise ConfigError(f"run: {output} is finished, it holds {SCORES_FILE}; name a new folder")
    old, new = (_flat(r.to_dict()) for r in (load_recipe(output / RECIPE_FILE), recipe))
    changed = sorted(
        key for key in old | new if key not in MAY_CHANGE and old.get(key) != new.get(key)
    )
    if changed:
        shown = ", ".join(f"{key} (was {old.get(key)!r}, is {new.get(key)!r})" for key in changed)
        raise ConfigError(
            f"run: {output} is a run of another recipe, it cannot be resumed: {shown}; "
            "take these back, or name a new folder"
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted key."""
    flat: dict[str, Any] = {}
    for section, content in settings.items():
        if isinstance(content, dict):
            flat |= {f"{section}.{key}": value for key, value in content.items()}
        else:
            flat[section] = content
    return flat


def _save(model: nn.Module, output: Path, facts: dict[str, Any], training: TrainResult) -> None:
    if distributed.is_main():
        done = {"iterations": training.iterations, "minutes": round(training.minutes, 2)}
        save_weights(model, output / WEIGHTS_FILE, {**facts, **done, "loss": training.loss})


def _write(path: Path, text: str) -> None:
    if distributed.is_main():
        atomic_write(path, text.encode())
