"""One run of Lightning's trainer, alone or as a rank; imported only when training starts."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler

from qmir_ao.errors import ConfigError
from qmir_ao.recipes import distributed
from qmir_ao.recipes.callbacks import AtomicCheckpointIO, Checkpointer, Initialize
from qmir_ao.recipes.preparation import float32_quantizers
from qmir_ao.recipes.resume import (
    Patches,
    check_same_run,
    describe_run,
    drop_empty,
    open_folder,
    read_newest,
)
from qmir_ao.recipes.training_module import Report, RestorationModule, Teacher

if TYPE_CHECKING:
    from qmir_ao.recipes.train import TrainOptions

TERMINATED = 143
"""Exit code after SIGTERM: 128 + 15, as shells report it."""

LOG_STEPS = 10
"""Steps between points of TensorBoard's curves."""

Progress = Callable[[int, int, float], None]


class Shares(Sampler[list[int]]):
    """This rank's items of every batch: neighbouring ones, so that all ranks make up the batch.

    Args:
        items: size of the dataset; a longer run starts over at its first item.
        batch: items per step of all ranks together.
        steps: steps of the run.
        first: step to begin with.

    Raises:
        ConfigError: the ranks cannot share a batch evenly.
    """

    def __init__(self, items: int, batch: int, steps: int, first: int) -> None:
        ranks = distributed.world_size()
        if batch % ranks:
            raise ConfigError(
                f"training: a batch of {batch} cannot be shared evenly by {ranks} ranks; "
                f"use a multiple of {ranks}"
            )
        self.items, self.batch, self.steps, self.first = items, batch, steps, first
        self.share = batch // ranks

    def __len__(self) -> int:
        """Steps of the whole run: Lightning counts those before a checkpoint as well."""
        return self.steps

    def indices(self, step: int) -> list[int]:
        """Items of one step."""
        begin = step * self.batch + distributed.rank() * self.share
        return [index % self.items for index in range(begin, begin + self.share)]

    def __iter__(self) -> Iterator[list[int]]:
        """Items step by step."""
        return (self.indices(step) for step in range(self.first, self.steps))


class Run:
    """A training run that may continue an earlier one; see `qmir_ao.recipes.train.fit`."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Patches,
        options: "TrainOptions",
        folder: Path | None,
        resume: bool,
        recipe: Mapping[str, Any],
    ) -> None:
        distributed.start()
        self.model, self.dataset, self.options = model, dataset, options
        self.checkpoint: Path | None = None
        self.checkpointer: Checkpointer | None = None
        first = 0
        if folder is not None:
            self.checkpoint = open_folder(Path(folder), resume)
            facts = describe_run(model, dataset, options.to_dict(), recipe)
            self.checkpointer = Checkpointer(Path(folder), options.save_every, facts)
        if self.checkpoint is not None and self.checkpointer is not None:
            content = read_newest(self.checkpoint)
            check_same_run(self.checkpoint, content, self.checkpointer.facts)
            first = int(content["global_step"])
        self.shares = Shares(len(dataset), options.batch, options.iterations, first)

    def fit(
        self, teacher: nn.Module | None, progress: Progress | None, snapshot: Path | None
    ) -> tuple[int, float, float]:
        """Train; returns steps done, the last loss and minutes."""
        options = self.options
        module = RestorationModule(
            self.model,
            learning_rate=options.learning_rate,
            iterations=options.iterations,
            warmup=options.warmup,
            schedule=options.schedule,
            loss=options.loss,
            teacher=None if teacher is None else Teacher(teacher),
            distill=options.distill,
        )
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        begin = time.monotonic()
        with ExitStack() as stack:
            # Lightning's hints on loader workers and logging do not apply to cached patches.
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if self.checkpointer is not None and distributed.is_main():
                stack.callback(drop_empty, self.checkpointer.folder)
            if options.precision != "32-true":
                stack.enter_context(float32_quantizers(self.model))
            trainer = self._trainer(Report(progress, snapshot, options.save_every))
            dataset = cast("Dataset[tuple[Tensor, Tensor]]", self.dataset)
            loader = DataLoader(dataset, batch_sampler=self.shares)
            try:
                trainer.fit(module, loader, ckpt_path=self.checkpoint)
            except SystemExit as stop:
                # Lightning turns Ctrl-C and SIGTERM into exits of its own, with other codes.
                if trainer.received_sigterm:
                    raise SystemExit(TERMINATED) from stop
                raise KeyboardInterrupt from stop
        earlier = 0.0 if self.checkpointer is None else self.checkpointer.seconds
        minutes = (earlier + time.monotonic() - begin) / 60
        return trainer.global_step, module.last_loss, minutes

    def _trainer(self, report: Report) -> Trainer:
        options = self.options
        limit = None if options.max_minutes is None else timedelta(minutes=options.max_minutes)
        return Trainer(
            accelerator="auto",
            max_steps=options.iterations,
            max_time=limit,
            precision=cast(Any, options.precision),
            gradient_clip_val=options.clip or None,
            callbacks=[*self._callbacks(), report],
            logger=self._logger(),
            log_every_n_steps=LOG_STEPS,
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **_placement(),
        )

    def _callbacks(self) -> list[Callback]:
        """In an order that matters: initialise, then average, then save."""
        resumed = self.checkpoint is not None
        callbacks: list[Callback] = [Initialize(self._first_input, resumed)]
        if self.options.ema:
            average = get_ema_multi_avg_fn(self.options.ema)
            # Buffers hold flags and counters: the average takes them over as they are.
            callbacks.append(WeightAveraging(use_buffers=False, multi_avg_fn=average))
        if self.options.log_dir is not None:
            callbacks.append(LearningRateMonitor("step"))
        if self.checkpointer is not None:
            callbacks.append(self.checkpointer)
        return callbacks

    def _first_input(self) -> Tensor:
        return torch.stack([self.dataset[index][0] for index in self.shares.indices(0)])

    def _logger(self) -> Any:
        if self.options.log_dir is None:
            return False
        try:
            return TensorBoardLogger(self.options.log_dir, name="", version="")
        except ModuleNotFoundError as error:
            raise ConfigError(
                "training: log_dir needs TensorBoard, which is not installed; "
                "pip install 'qmir-ao[recipes]'"
            ) from error


def _placement() -> dict[str, Any]:
    ranks, here = distributed.world_size(), distributed.local_world_size()
    if ranks == 1:
        return {"devices": 1}
    # A quantizer that is switched off leaves its parameters without gradients.
    strategy = DDPStrategy(find_unused_parameters=True)
    return {"devices": here, "num_nodes": ranks // here, "strategy": strategy}
