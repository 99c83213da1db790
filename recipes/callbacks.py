"""Lightning's callbacks and files of a training run; imported only when training starts."""

import io
import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from qmir_ao.errors import CheckpointError
from qmir_ao.recipes import distributed
from qmir_ao.recipes.images import atomic_write
from qmir_ao.recipes.preparation import initialize_quantizers
from qmir_ao.recipes.resume import KEPT, OURS, list_checkpoints, read_checkpoint

log = logging.getLogger(__name__)


class Initialize(Callback):
    """Give every rank the same network before an optimizer is made.

    Args:
        first: returns the input of this rank's first step.
        resumed: a checkpoint brings the state, so that nothing is to be initialised.
    """

    def __init__(self, first: Callable[[], Tensor], resumed: bool) -> None:
        self.first, self.resumed = first, resumed

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Initialise on rank 0 and send the result to the other ranks."""
        if not self.resumed:
            model = module.model
            assert isinstance(model, nn.Module)
            if distributed.is_main():
                device = trainer.strategy.root_device
                module.to(device)
                initialize_quantizers(model, self.first().to(device))
            if distributed.world_size() > 1:
                state = {key: value.cpu() for key, value in model.state_dict().items()}
                model.load_state_dict(distributed.broadcast(state))
        if not distributed.is_main():
            # Equal weights, but other dropout masks.
            torch.manual_seed(torch.initial_seed() + distributed.rank())


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are complete on disk before they get their name."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write to a temporary name, flush to disk, rename, flush the folder.

        Raises:
            CheckpointError: the folder is gone, read-only or full.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            atomic_write(Path(path), buffer.getvalue())
            folder = os.open(Path(path).parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error})") from error

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain data, whatever the caller asks for."""
        return read_checkpoint(Path(path))


def _random_state() -> dict[str, Any]:
    version, values, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(values), gauss],
        "numpy": [str(name), [int(key) for key in keys], *rest],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, values, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate((version, tuple(values), gauss))
    np.random.set_state((name, np.array(keys, np.uint32), *rest))


class Checkpointer(Callback):
    """Write a checkpoint every few steps and keep the newest ones.

    Args:
        folder: where they go.
        every: steps between checkpoints.
        facts: what `describe_run` says.
    """

    def __init__(self, folder: Path, every: int, facts: Mapping[str, Any]) -> None:
        self.folder, self.every, self.facts = folder, every, dict(facts)
        self.seconds = 0.0
        self._begin = time.monotonic()
        self._restore: Mapping[str, Any] | None = None

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, index: int
    ) -> None:
        """Take up the random numbers where the checkpoint left them."""
        # Making the loader draws random numbers as well, so this cannot be done earlier.
        if self._restore is not None:
            _set_random_state(self._restore)
            self._restore = None

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Save, then remove what is not needed any more."""
        done = trainer.global_step
        # The end of a run is saved by whoever asked for it.
        if done % self.every or done >= trainer.max_steps:
            return
        trainer.save_checkpoint(self.folder / f"step-{done:09d}.ckpt")
        if distributed.is_main():
            for old in list_checkpoints(self.folder)[:-KEPT]:
                old.unlink(missing_ok=True)

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning does not know."""
        checkpoint[OURS] = {
            "facts": self.facts,
            "random": distributed.gather([_random_state()]),
            "loss": float(module.last_loss),  # type: ignore[arg-type]
            "seconds": self.seconds + time.monotonic() - self._begin,
        }

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take it back."""
        ours, place = checkpoint[OURS], distributed.rank()
        module.last_loss = ours["loss"]
        self.seconds = ours["seconds"]
        if len(ours["random"]) == distributed.world_size():
            self._restore = ours["random"][place]
        else:
            log.warning(
                "resuming with %d ranks a run of %d: dropout draws other masks",
                distributed.world_size(),
                len(ours["random"]),
            )
