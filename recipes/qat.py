"""Quantization-aware training of a float network, and its integer form."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.ao.quantization import QConfig
from torch.fx import GraphModule

import qmir_ao
from qmir_ao.recipes.data import PatchDataset
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
) -> TrainOptions:
    """Settings of quantization-aware training: the learning rate is halved four times."""
    return TrainOptions(
        iterations=iterations,
        batch=batch,
        patch=patch,
        learning_rate=learning_rate,
        warmup=0,
        schedule="steps",
        seed=seed,
        save_every=0,
    )


def train_quantized(
    model: nn.Module,
    dataset: PatchDataset,
    options: TrainOptions,
    qconfig: QConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> QATResult:
    """Insert DLS and RFA fake-quantizers into a copy of a float network and train it.

    Args:
        model: trained float network; it stays as it is.
        dataset: patches; the first batch also initialises the quantizers.
        options: settings, see `qat_options`.
        qconfig: bit widths, see `qmir_ao.get_qmir_qconfig`.
        progress: called with (done, total) after each step.

    Raises:
        CaptureError: the model cannot be traced.
        NonFiniteError: the training diverged.
    """
    torch.manual_seed(options.seed)
    prepared = qmir_ao.prepare_qat(model, qconfig)
    losses: list[float] = []

    def report(done: int, total: int, loss: float) -> None:
        losses.append(loss)
        if progress is not None:
            progress(done, total)

    training = fit(prepared, dataset, options, progress=report)
    prepared.eval()
    return QATResult(prepared, losses, training)
