"""Train a restoration network on a folder of images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qmir_ao.errors import ConfigError
from qmir_ao.recipes import distributed
from qmir_ao.recipes.checkpoint import load_checkpoint, save_weights
from qmir_ao.recipes.data import PatchDataset
from qmir_ao.recipes.evaluate import Evaluation, evaluate
from qmir_ao.recipes.losses import LOSSES
from qmir_ao.recipes.models import create_model
from qmir_ao.recipes.resume import Patches, discard_checkpoints
from qmir_ao.recipes.tasks.super_resolution import SuperResolution

SCHEDULES = ("cosine", "steps")
PRECISIONS = ("32-true", "bf16-mixed")
_LEAST = {
    "iterations": 1,
    "batch": 1,
    "patch": 8,
    "warmup": 0,
    "clip": 0,
    "seed": 0,
    "save_every": 0,
}


@dataclass(frozen=True)
class TrainOptions:
    """Settings of a training run; equal settings on one machine give equal weights.

    Args:
        iterations: optimizer steps.
        batch: patches per step.
        patch: side of the low-resolution patch in pixels.
        learning_rate: highest learning rate of Adam.
        warmup: iterations of linear warm-up.
        schedule: "cosine" (to zero) or "steps" (halved at 50, 75, 87.5 and 93.75 %).
        loss: "l1", or "charbonnier" (L1 that is smooth around 0).
        clip: largest gradient norm; 0 for no clipping.
        seed: seed of the weights and of the patches.
        max_minutes: stop early after this time, or None; the schedule does not shrink with it.
        save_every: iterations between snapshots and checkpoints; 0 for none.
        precision: "32-true", or "bf16-mixed" (quantizers compute in float32 all the same).
        ema: decay of an exponential moving average of the weights, which the run then returns;
            0 for none.
        distill: weight of the L1 distance to a teacher's output in the loss; 0 for none.
        log_dir: folder for TensorBoard's curves, or None.
    """

    iterations: int = 13000
    batch: int = 8
    patch: int = 32
    learning_rate: float = 1e-3
    warmup: int = 200
    schedule: str = "cosine"
    loss: str = "l1"
    clip: float = 1.0
    seed: int = 0
    max_minutes: float | None = None
    save_every: int = 1000
    precision: str = "32-true"
    ema: float = 0.0
    distill: float = 0.0
    log_dir: Path | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value is out of its range.
        """
        for name, low in _LEAST.items():
            if getattr(self, name) < low:
                raise ConfigError(
                    f"TrainOptions: {name} must be at least {low}, got {getattr(self, name)!r}"
                )
        if not 0.0 < self.learning_rate < 1.0:
            raise ConfigError(
                f"TrainOptions: learning_rate must be between 0 and 1, got {self.learning_rate!r}"
            )
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"TrainOptions: schedule must be one of {SCHEDULES}, got {self.schedule!r}"
            )
        if self.loss not in tuple(LOSSES):
            raise ConfigError(
                f"TrainOptions: loss must be one of {tuple(LOSSES)}, got {self.loss!r}"
            )
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ConfigError(
                f"TrainOptions: max_minutes must be positive, got {self.max_minutes!r}"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"TrainOptions: precision must be one of {PRECISIONS}, got {self.precision!r}"
            )
        if not 0.0 <= self.ema < 1.0:
            raise ConfigError(f"TrainOptions: ema must be at least 0 and below 1, got {self.ema!r}")
        if not 0.0 <= self.distill < math.inf:
            raise ConfigError(
                f"TrainOptions: distill must be finite and at least 0, got {self.distill!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class TrainResult:
    """What a training run gave: steps done, last loss, minutes, and scores if asked for."""

    iterations: int
    loss: float
    minutes: float
    evaluation: Evaluation | None = None


def fit(
    model: nn.Module,
    dataset: Patches,
    options: TrainOptions,
    *,
    progress: Callable[[int, int, float], None] | None = None,
    snapshot: Path | None = None,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    teacher: nn.Module | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train any network (float or prepared for quantization) in place on patches.

    Under `torchrun` every rank calls this and gets the same weights: each trains on its share of
    every batch.

    Args:
        model: network with the scale of the dataset.
        dataset: at least `options.batch * options.iterations` items.
        options: settings.
        progress: called with (done, total, loss) after each iteration.
        snapshot: file for the weights, rewritten every `options.save_every` iterations.
        checkpoint_dir: folder for the newest two checkpoints, written every `options.save_every`
            iterations; on one thread a resumed run ends in the bytes of an uninterrupted one.
        resume: go on from the newest checkpoint of `checkpoint_dir`, if there is one.
        teacher: float network for `options.distill`.
        recipe: further settings that a resumed run must share, by name.

    Raises:
        ConfigError: wrong combination of arguments, a batch that the ranks cannot share evenly, or
            a checkpoint of a run with other settings, which are named.
        CheckpointError: a checkpoint is damaged or hostile, or cannot be written.
        NonFiniteError: the loss became NaN or infinite.
        KeyboardInterrupt: the run was interrupted.
        SystemExit: the process was told to end (SIGTERM), with code 143.
    """
    from qmir_ao.recipes.lightning_run import Run

    _check_fit(options, checkpoint_dir, resume, teacher)
    run = Run(model, dataset, options, checkpoint_dir, resume, recipe or {})
    return TrainResult(*run.fit(teacher, progress, snapshot))


def _check_fit(
    options: TrainOptions, folder: Path | None, resume: bool, teacher: nn.Module | None
) -> None:
    if folder is None and resume:
        raise ConfigError("training: resume needs checkpoint_dir, the folder of the checkpoints")
    if folder is not None and not options.save_every:
        raise ConfigError("training: checkpoint_dir needs save_every of at least 1, got 0")
    if (options.distill > 0) != (teacher is not None):
        raise ConfigError(
            f"training: distill={options.distill!r} {'needs' if teacher is None else 'is without'} "
            "a teacher; quantization-aware training takes the float network for it"
        )


def train(
    name: str,
    folders: Sequence[Path],
    out: Path,
    options: TrainOptions | None = None,
    *,
    start: Path | None = None,
    eval_folder: Path | None = None,
    eval_low_folder: Path | None = None,
    skip_bad_images: bool = False,
    command: str = "",
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    loading: Callable[[int, int], None] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> TrainResult:
    """Train a super-resolution model of the zoo and save it as safetensors.

    The weights are saved with how they were made: command, settings, minutes and scores. Under
    `torchrun` the ranks share each batch, and rank 0 writes.

    Args:
        name: one of `list_models()`, with a scale of 2 or more.
        folders: folders with training images.
        out: file to write, ending in `.safetensors`.
        options: settings; the defaults train `mambair-tiny-x2`.
        start: weights to start from instead of fresh ones.
        eval_folder: ground-truth images to score the result on.
        eval_low_folder: their low-resolution inputs; made by downscaling if None.
        skip_bad_images: leave out training images that cannot be read.
        command: command line, stored with the weights.
        checkpoint_dir: folder for checkpoints, see `fit`; they are removed when `out` is written.
        resume: go on from the newest checkpoint of `checkpoint_dir`, if there is one.
        loading: called with (done, total) after each training image is read.
        progress: called with (done, total, loss) after each iteration.

    Raises:
        ConfigError: unknown model, one that does not enlarge, a wrong output name, or a checkpoint
            of a run with other settings.
        CheckpointError: weights or a checkpoint are damaged or hostile, or cannot be written.
        ImageError: an image cannot be read.
        NonFiniteError: the loss became NaN or infinite.
    """
    options = options or TrainOptions()
    out = Path(out)
    _check_train(out, options)
    torch.manual_seed(options.seed)
    model, scale = _upscaler(name, start)
    _check_tests(scale, eval_folder, eval_low_folder)
    dataset = PatchDataset(
        folders,
        scale=scale,
        patch=options.patch,
        length=options.batch * options.iterations,
        seed=options.seed,
        skip_bad_images=skip_bad_images,
        progress=loading,
    )
    snapshot = out.with_name(f"{out.stem}.snapshot.safetensors")
    result = fit(
        model,
        dataset,
        options,
        progress=progress,
        snapshot=snapshot,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        recipe={"model": name},
    )
    _save(model, out, _facts(name, command, options, result))
    if eval_folder is not None:
        scores = evaluate(model, eval_folder, scale=scale, low_folder=eval_low_folder)
        result = replace(result, evaluation=scores)
        _save(model, out, _facts(name, command, options, result))
    if distributed.is_main():
        snapshot.unlink(missing_ok=True)
        if checkpoint_dir is not None:
            discard_checkpoints(checkpoint_dir)
    distributed.wait()
    return result


def _check_tests(scale: int, folder: Path | None, inputs: Path | None) -> None:
    if folder is not None:
        SuperResolution(scale).check_sources(folder, inputs)


def _save(model: nn.Module, out: Path, facts: dict[str, Any]) -> None:
    if distributed.is_main():
        save_weights(model, out, facts)


def _check_train(out: Path, options: TrainOptions) -> None:
    if out.suffix != ".safetensors" or not out.absolute().parent.is_dir():
        raise ConfigError(f"train: output must be NAME.safetensors in an existing folder: {out}")
    if options.distill:
        raise ConfigError(
            f"train: distill={options.distill!r} has no teacher in float training; it belongs to "
            "quantization-aware training, which learns from the float network"
        )


def _upscaler(name: str, start: Path | None) -> tuple[nn.Module, int]:
    model = create_model(name)
    scale = int(getattr(model, "scale", 1))
    if scale < 2:
        raise ConfigError(f"train: {name} does not enlarge; train knows super-resolution only")
    if start is not None:
        load_checkpoint(model, start)
    return model, scale


def _facts(name: str, command: str, options: TrainOptions, result: TrainResult) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "model": name,
        "command": command,
        "options": options.to_dict(),
        "iterations": result.iterations,
        "minutes": round(result.minutes, 2),
        "loss": result.loss,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if result.evaluation is not None:
        facts["evaluation"] = result.evaluation.to_dict()["mean"]
    return facts
