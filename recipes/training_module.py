"""The Lightning module behind `qmir_ao.recipes.train`; imported only when training starts."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from qmir_ao.errors import NonFiniteError
from qmir_ao.recipes import distributed
from qmir_ao.recipes.checkpoint import save_weights
from qmir_ao.recipes.losses import LOSSES

BETAS = (0.9, 0.99)
MILESTONES = (0.5, 0.75, 0.875, 0.9375)
"""Shares of the run after which the `steps` schedule halves the learning rate, as published."""


def learning_rate_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Share of the full learning rate at a step: linear warm-up, then `cosine` or `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "steps":
        return 0.5 ** sum(step >= share * total for share in MILESTONES)
    done = (step - warmup) / max(total - warmup, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def parameter_groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Parameters by learning rate: a quantizer may ask for a share of the network's own."""
    factors: dict[int, float] = {}
    for module in model.modules():
        factor = float(getattr(module, "learning_rate_factor", 1.0))
        factors |= {id(p): factor for p in module.parameters(recurse=False)}
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(factors[id(parameter)], []).append(parameter)
    return [{"params": members, "lr": rate * factor} for factor, members in groups.items()]


class Teacher:
    """A frozen network beside the trained one: no checkpoint or average holds a copy of it.

    Args:
        model: float network; a copy in evaluation mode is used.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        """Averages of the weights copy the module that holds this."""
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The network's output, on the device of `x`."""
        y: Tensor = self.model.to(x.device)(x)
        return y


class RestorationModule(LightningModule):
    """Training of a restoration network with Adam.

    Args:
        model: network from (B, C, h, w) to (B, C, s*h, s*w).
        learning_rate: highest learning rate.
        iterations: length of the schedule.
        warmup: iterations of linear warm-up.
        schedule: "cosine" (to zero) or "steps" (halved at MILESTONES).
        loss: key of `LOSSES`.
        teacher: network whose output the trained one should meet as well, or None.
        distill: weight of the L1 distance to the teacher's output.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        iterations: int,
        warmup: int,
        schedule: str,
        loss: str,
        teacher: Teacher | None = None,
        distill: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.rate, self.iterations = learning_rate, iterations
        self.warmup, self.schedule = warmup, schedule
        self.loss = LOSSES[loss]
        self.teacher, self.distill = teacher, distill
        self.last_loss = math.nan

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Loss of one batch, with the distance to the teacher if there is one.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        low, high = batch
        restored = self.model(low)
        loss = self.loss(restored, high)
        if self.teacher is not None:
            distance = l1_loss(restored, self.teacher(low))
            loss = loss + self.distill * distance
        self.last_loss = float(loss.detach())
        if not math.isfinite(self.last_loss):
            raise NonFiniteError(
                f"training: the loss is {self.last_loss} at iteration {index}, it must be finite; "
                f"lower the learning rate (now {self.rate}) or check the images"
            )
        if self.trainer.loggers:
            self.log("loss", loss, sync_dist=True)
            if self.teacher is not None:
                self.log("distance to the teacher", distance, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Adam with a learning rate that changes at every iteration."""
        # Lightning clips no gradients for a fused optimizer in mixed precision.
        fused = self.trainer.precision == "32-true"
        groups = parameter_groups(self.model, self.rate)
        optimizer = torch.optim.Adam(groups, lr=self.rate, betas=BETAS, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(step, self.iterations, self.warmup, self.schedule),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Report(Callback):
    """Call `progress(done, total, loss)` after each iteration and save snapshots.

    Args:
        progress: called after each iteration, or None.
        snapshot: file that is overwritten every `save_every` iterations, or None.
        save_every: iterations between snapshots; 0 for none.
    """

    def __init__(
        self,
        progress: Callable[[int, int, float], None] | None,
        snapshot: Path | None,
        save_every: int,
    ) -> None:
        self.progress, self.snapshot, self.save_every = progress, snapshot, save_every

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Report one iteration."""
        assert isinstance(module, RestorationModule)
        done = trainer.global_step
        if self.progress is not None:
            self.progress(done, module.iterations, module.last_loss)
        if self.snapshot is None or not distributed.is_main():
            return
        if self.save_every and done % self.save_every == 0:
            save_weights(module.model, self.snapshot, {"iterations": done})
