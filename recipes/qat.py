"""Quantization-aware training of a float network, and its integer form."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.fx import GraphModule

import qmir_ao
from qmir_ao.recipes.checkpoint import digest_weights
from qmir_ao.recipes.resume import Patches
from qmir_ao.recipes.train import TrainOptions, TrainResult, fit

LEARNING_RATE = 8e-4


@dataclass(frozen=True)
class QATResult:
    """A trained network with fake-quantizers and how its training went."""

    prepared: GraphModule
    losses: list[float]
    training: TrainResult


def qat_options(
    iterations: int = 2000,
    *,
    learning_rate: float = LEARNING_RATE,
    batch: int = 4,
    patch: int = 32,
    seed: int = 0,
    loss: str = "l1",
) -> TrainOptions:
    """Settings of quantization-aware training: the learning rate is halved four times."""
    return TrainOptions(
        iterations=iterations,
        batch=batch,
        patch=patch,
        learning_rate=learning_rate,
        warmup=0,
        schedule="steps",
        loss=loss,
        seed=seed,
        save_every=0,
    )


def train_quantized(
    model: nn.Module,
    dataset: Patches,
    options: TrainOptions,
    qconfig: QConfig | QConfigMapping,
    *,
    placement: str = "paper",
    progress: Callable[[int, int], None] | None = None,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
) -> QATResult:
    """Insert DLS and RFA fake-quantizers into a copy of a float network and train it.

    Args:
        model: trained float network; it stays as it is.
        dataset: patches; the first batch also initialises the quantizers.
        options: settings, see `qat_options`; with `distill` the float network is the teacher.
        qconfig: bit widths, see `qmir_ao.get_qmir_qconfig`, or a mapping of several.
        placement: "paper" or "official", see `qmir_ao.prepare_qat`.
        progress: called with (done, total) after each step.
        checkpoint_dir: folder for checkpoints, see `fit`.
        resume: go on from the newest checkpoint of `checkpoint_dir`, if there is one; the losses
            are then those of the steps that were left.

    Raises:
        ConfigError: the checkpoint is of a run with other settings, weights or data.
        CheckpointError: the checkpoint is damaged or hostile, or cannot be written.
        CaptureError: the model cannot be traced.
        NonFiniteError: the training diverged.
    """
    torch.manual_seed(options.seed)
    prepared = qmir_ao.prepare_qat(model, qconfig, placement=placement)
    losses: list[float] = []

    def report(done: int, total: int, loss: float) -> None:
        losses.append(loss)
        if progress is not None:
            progress(done, total)

    training = fit(
        prepared,
        dataset,
        options,
        progress=report,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        teacher=model if options.distill else None,
        # The start and the teacher of the run; naming them costs little more than reading them.
        recipe={"float weights": digest_weights(model)} if checkpoint_dir else None,
    )
    prepared.eval()
    return QATResult(prepared, losses, training)
