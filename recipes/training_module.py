"""The Lightning module behind `qmir_ao.recipes.train`; imported only when training starts."""

import math
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Share of the full learning rate at a step: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total - warmup, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


class RestorationModule(lightning.LightningModule):
    """L1 training of a restoration network with Adam and a cosine schedule.

    Args:
        model: network from (B, C, h, w) to (B, C, s*h, s*w).
        learning_rate: highest learning rate.
        iterations: length of the schedule.
        warmup: iterations of linear warm-up.
    """

    def __init__(
        self, model: nn.Module, *, learning_rate: float, iterations: int, warmup: int
    ) -> None:
        super().__init__()
        self.model = model
        self.rate, self.iterations, self.warmup = learning_rate, iterations, warmup
        self.loss_sum, self.loss_count = 0.0, 0

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Mean absolute error of one batch."""
        low, high = batch
        loss = l1_loss(self.model(low), high)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Adam with a learning rate that changes at every iteration."""
        optimizer = torch.optim.Adam(
            self.model.parameters(), lr=self.rate, betas=(0.9, 0.99), fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.iterations, self.warmup)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
