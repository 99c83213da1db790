"""Train a restoration network on a folder of images."""

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.checkpoint import load_checkpoint, save_weights
from qmir_ao.recipes.data import PatchDataset
from qmir_ao.recipes.evaluate import Evaluation, evaluate
from qmir_ao.recipes.models import create_model

SCHEDULES = ("cosine", "steps")
TERMINATED = 143
"""Exit code after SIGTERM: 128 + 15, as shells report it."""


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
        clip: largest gradient norm; 0 for no clipping.
        seed: seed of the weights and of the patches.
        max_minutes: stop early after this time, or None; the schedule does not shrink with it.
        save_every: iterations between snapshots of the weights; 0 for none.
    """

    iterations: int = 13000
    batch: int = 8
    patch: int = 32
    learning_rate: float = 1e-3
    warmup: int = 200
    schedule: str = "cosine"
    clip: float = 1.0
    seed: int = 0
    max_minutes: float | None = None
    save_every: int = 1000

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value is out of its range.
        """
        for name, low in (("iterations", 1), ("batch", 1), ("patch", 8), ("warmup", 0)):
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
        if min(self.clip, self.seed, self.save_every) < 0:
            raise ConfigError("TrainOptions: clip, seed and save_every must not be negative")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ConfigError(
                f"TrainOptions: max_minutes must be positive, got {self.max_minutes!r}"
            )


@dataclass(frozen=True)
class TrainResult:
    """What a training run gave: steps done, last loss, minutes, and scores if asked for."""

    iterations: int
    loss: float
    minutes: float
    evaluation: Evaluation | None = None


def fit(
    model: nn.Module,
    dataset: PatchDataset,
    options: TrainOptions,
    *,
    progress: Callable[[int, int, float], None] | None = None,
    snapshot: Path | None = None,
) -> TrainResult:
    """Train any network (float or prepared for quantization) in place on patches.

    Args:
        model: network with the scale of the dataset.
        dataset: at least `options.batch * options.iterations` items.
        options: settings.
        progress: called with (done, total, loss) after each iteration.
        snapshot: file for the weights, rewritten every `options.save_every` iterations.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
        KeyboardInterrupt: the run was interrupted.
        SystemExit: the process was told to end (SIGTERM), with code 143.
    """
    from lightning import Trainer

    from qmir_ao.recipes.training_module import Report, RestorationModule

    module = RestorationModule(
        model,
        learning_rate=options.learning_rate,
        iterations=options.iterations,
        warmup=options.warmup,
        schedule=options.schedule,
    )
    limit = None if options.max_minutes is None else timedelta(minutes=options.max_minutes)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    start = time.monotonic()
    with warnings.catch_warnings():
        # Lightning's hints on loader workers and logging do not apply to cached patches.
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            max_steps=options.iterations,
            max_time=limit,
            gradient_clip_val=options.clip or None,
            callbacks=[Report(progress, snapshot, options.save_every)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(module, DataLoader(dataset, batch_size=options.batch))
        except SystemExit as stop:
            # Lightning turns Ctrl-C and SIGTERM into exits of its own, with other codes.
            if trainer.received_sigterm:
                raise SystemExit(TERMINATED) from stop
            raise KeyboardInterrupt from stop
    minutes = (time.monotonic() - start) / 60
    return TrainResult(trainer.global_step, module.last_loss, minutes)


def train(
    name: str,
    folders: Sequence[Path],
    out: Path,
    options: TrainOptions | None = None,
    *,
    start: Path | None = None,
    eval_folder: Path | None = None,
    eval_low_folder: Path | None = None,
    command: str = "",
    loading: Callable[[int, int], None] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> TrainResult:
    """Train a super-resolution model of the zoo and save it as safetensors.

    The weights are saved with how they were made: command, settings, minutes and scores.

    Args:
        name: one of `list_models()`, with a scale of 2 or more.
        folders: folders with training images.
        out: file to write, ending in `.safetensors`.
        options: settings; the defaults train `mambair-tiny-x2`.
        start: weights to start from instead of fresh ones.
        eval_folder: ground-truth images to score the result on.
        eval_low_folder: their low-resolution inputs; made by downscaling if None.
        command: command line, stored with the weights.
        loading: called with (done, total) after each training image is read.
        progress: called with (done, total, loss) after each iteration.

    Raises:
        ConfigError: unknown model, one that does not enlarge, or a wrong output name.
        ImageError: an image cannot be read.
        NonFiniteError: the loss became NaN or infinite.
    """
    options = options or TrainOptions()
    out = Path(out)
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise ConfigError(f"train: output must be NAME.safetensors in an existing folder: {out}")
    torch.manual_seed(options.seed)
    model = create_model(name)
    scale = int(getattr(model, "scale", 1))
    if scale < 2:
        raise ConfigError(f"train: {name} does not enlarge; train knows super-resolution only")
    if start is not None:
        load_checkpoint(model, start)
    dataset = PatchDataset(
        folders,
        scale=scale,
        patch=options.patch,
        length=options.batch * options.iterations,
        seed=options.seed,
        progress=loading,
    )
    snapshot = out.with_name(f"{out.stem}.snapshot.safetensors")
    result = fit(model, dataset, options, progress=progress, snapshot=snapshot)
    scores = None
    if eval_folder is not None:
        scores = evaluate(model, eval_folder, scale=scale, low_folder=eval_low_folder)
    result = TrainResult(result.iterations, result.loss, result.minutes, scores)
    save_weights(model, out, _facts(name, command, options, result))
    snapshot.unlink(missing_ok=True)
    return result


def _facts(name: str, command: str, options: TrainOptions, result: TrainResult) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "model": name,
        "command": command,
        "options": asdict(options),
        "iterations": result.iterations,
        "minutes": round(result.minutes, 2),
        "loss": result.loss,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if result.evaluation is not None:
        facts["evaluation"] = result.evaluation.to_dict()["mean"]
    return facts
