"""The restoration tasks of the paper as objects: degradation, test inputs, scoring."""

import difflib
from dataclasses import fields
from typing import Any

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.tasks.base import Source, Task
from qmir_ao.recipes.tasks.denoise import GaussianDenoising
from qmir_ao.recipes.tasks.jpeg import JpegArtifacts
from qmir_ao.recipes.tasks.real import RealDenoising
from qmir_ao.recipes.tasks.super_resolution import SuperResolution

__all__ = [
    "TASKS",
    "GaussianDenoising",
    "JpegArtifacts",
    "RealDenoising",
    "Source",
    "SuperResolution",
    "Task",
    "create_task",
]

TASKS: dict[str, type[Any]] = {
    task.name: task for task in (SuperResolution, JpegArtifacts, GaussianDenoising, RealDenoising)
}
"""Name to class; a class's dataclass fields are the settings."""


def create_task(name: str, **settings: Any) -> Task:
    """Build a task by name.

    Args:
        name: "sr" (scale), "jpeg" (quality, protocol, encoder), "denoise" (sigma) or
            "real-denoise".
        settings: fields of the task's class.

    Raises:
        ConfigError: unknown name or setting, or a value out of range.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(str(name), TASKS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"task {name!r} is unknown; {hint}known: {', '.join(TASKS)}")
    known = [field.name for field in fields(TASKS[name])]
    for setting in settings:
        if setting not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"task {name!r} has no setting {setting!r}; {takes}")
    task: Task = TASKS[name](**settings)
    return task
