"""The checkpoint folder of a run: which file to go on from, and whether it is of the same run.

A checkpoint holds weights, quantizer state, averaged weights, optimizer, schedule, step and random
numbers of every rank. On one thread a resumed run ends in the same bytes as an uninterrupted one.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from qmir_ao.errors import CheckpointError, ConfigError
from qmir_ao.recipes import distributed
from qmir_ao.recipes.checkpoint import read_pickle
from qmir_ao.recipes.preparation import quantizers

KEPT = 2
"""Checkpoints that stay: the newest, and one more for the case that a disk loses it."""

OURS = "qmir"
"""Key of a checkpoint under which our own entries are."""

FREE = ("max_minutes", "save_every", "log_dir")
"""Options that may change between the parts of a run: the weights do not depend on them."""

_REQUIRED = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", OURS)
_NAME = re.compile(r"step-(\d+)\.ckpt")
_PARTIAL = ".step-*.ckpt.*.part"
_SHOWN = 5
"""Differing keys that an error message names."""


class Patches(Protocol):
    """Items of training data: (low, high) by index."""

    def __len__(self) -> int:
        """Number of items."""
        ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One item."""
        ...


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")))


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from, or None."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; code in the file is refused, not run.

    Raises:
        CheckpointError: damaged, hostile, or no checkpoint of this package.
    """
    content = read_pickle(path)
    missing = [key for key in _REQUIRED if not isinstance(content, dict) or key not in content]
    if missing:
        raise CheckpointError(
            f"{path}: not a checkpoint of a qmir_ao training run, it lacks {missing[0]!r}; "
            "name the folder that the run was given"
        )
    assert isinstance(content, dict)
    return content


def read_newest(path: Path) -> dict[str, Any]:
    """Read the checkpoint to go on from; where it is damaged, name the one before it.

    Raises:
        CheckpointError: damaged, hostile, or no checkpoint of this package.
    """
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        older = [p for p in list_checkpoints(path.parent) if p != path]
        if not older:
            raise
        raise CheckpointError(
            f"{error}. Remove {path.name} to go on from {older[-1].name} instead"
        ) from error


def discard_checkpoints(folder: Path) -> None:
    """Remove a finished run's checkpoints, and their folder if it holds nothing else."""
    for path in [*list_checkpoints(folder), *folder.glob(_PARTIAL)]:
        path.unlink(missing_ok=True)
    drop_empty(folder)


def drop_empty(folder: Path) -> None:
    """Remove a folder that holds nothing, left by a run that ended before its first checkpoint."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def open_folder(folder: Path, resume: bool) -> Path | None:
    """Make a folder ready for checkpoints.

    Args:
        folder: made if missing.
        resume: go on from its newest checkpoint, if there is one.

    Returns:
        The checkpoint to go on from, the same on all ranks, or None.

    Raises:
        ConfigError: the folder holds checkpoints and `resume` is off.
        CheckpointError: the folder cannot be written.
    """
    found = newest_checkpoint(folder)
    if found is not None and not resume:
        raise ConfigError(
            f"training: {folder} holds {found.name} of an unfinished run; resume it "
            "(--resume), or remove the folder to start over"
        )
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for partial in folder.glob(_PARTIAL):
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written ({error})") from error
    return distributed.broadcast(found)


def describe_run(
    model: nn.Module, dataset: Patches, options: Mapping[str, Any], recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a resumed run must have in common with its first part, by key.

    Args:
        model: the network before training.
        dataset: its training data.
        options: `TrainOptions` as a dict.
        recipe: further facts, such as the name of the model.
    """
    facts = {f"options.{key}": value for key, value in options.items() if key not in FREE}
    facts |= {f"recipe.{key}": value for key, value in recipe.items()}
    facts |= {
        f"quantizer.{name}": f"{type(module).__name__}({module.extra_repr()})"
        for name, module in quantizers(model).items()
    }
    facts["model"] = _digest(_layout(model))
    facts["data.length"] = len(dataset)
    # Three patches stand for all: other images, seed or degradations change at least one.
    probes = [dataset[index] for index in sorted({0, len(dataset) // 2, len(dataset) - 1})]
    facts["data.patches"] = _digest(
        [part.contiguous().numpy().tobytes() for pair in probes for part in pair]
    )
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain


def _layout(model: nn.Module) -> list[bytes]:
    # Quantizers take their size from the first batch; their settings are compared by themselves.
    lazy = tuple(f"{name}." for name in quantizers(model))
    return [
        f"{key} {'' if key.startswith(lazy) else tuple(value.shape)}".encode()
        for key, value in model.state_dict().items()
    ]


def _digest(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def check_same_run(path: Path, checkpoint: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse to continue a run under other settings.

    Raises:
        ConfigError: settings differ; the message names them.
        CheckpointError: the checkpoint does not say how it was made.
    """
    ours = checkpoint[OURS]
    saved = ours.get("facts") if isinstance(ours, dict) else None
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path}: does not say which run it belongs to; start over")
    changed = [
        f"{key} is {facts.get(key)!r} and was {saved.get(key)!r}"
        for key in sorted(saved.keys() | facts.keys(), key=str)
        if facts.get(key) != saved.get(key)
    ]
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise ConfigError(
            f"resume: {path} belongs to a run with other settings: "
            f"{'; '.join(changed[:_SHOWN])}{more}. Use the settings it was made with (only "
            f"{', '.join(FREE)} may change), or start over in another folder"
        )
