"""The ranks of a `torchrun`: each one's share of a list, and everyone's results in order.

    torchrun --nproc_per_node 2 -m qmir_ao.recipes.cli restore photos restored

In a process of its own there is one rank, and nothing here does anything. Results travel by pickle,
between the processes of one job only.
"""

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

from qmir_ao.errors import ConfigError

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `torchrun` sets; without all of them a process stands alone."""

PATIENCE = timedelta(hours=12)
"""How long a rank waits for one with larger images; torchrun ends all ranks when one dies."""


def _variable(name: str, default: int, low: int) -> int:
    if any(variable not in os.environ for variable in VARIABLES):
        return default
    text = os.environ[name]
    if not text.isdecimal() or int(text) < low:
        raise ConfigError(
            f"environment: {name} must be a whole number from {low}, got {text!r}; "
            "start the ranks with torchrun"
        )
    return int(text)


def rank() -> int:
    """Number of this process, from 0.

    Raises:
        ConfigError: the environment holds no number.
    """
    return _variable("RANK", 0, 0)


def world_size() -> int:
    """Number of processes.

    Raises:
        ConfigError: the environment holds no number.
    """
    return _variable("WORLD_SIZE", 1, 1)


def local_world_size() -> int:
    """Number of processes on this machine.

    Raises:
        ConfigError: the environment holds no number.
    """
    return _variable("LOCAL_WORLD_SIZE", 1, 1)


def is_main() -> bool:
    """Whether this is the rank that prints and writes."""
    return rank() == 0


def start() -> None:
    """Connect the ranks once; NCCL carries GPU tensors, gloo everything else."""
    if world_size() == 1:
        return
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
        # The threads of an open connection abort the process when the interpreter ends.
        atexit.register(stop)


def stop() -> None:
    """End the connection of this rank, if there is one."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def shard(items: Sequence[T]) -> list[T]:
    """This rank's share: every `world_size()`-th item, from item `rank()` on."""
    return list(items[rank() :: world_size()])


def gather(results: Sequence[T]) -> list[T]:
    """Put the results of all ranks together; every rank must call this.

    Args:
        results: one for each item of this rank's `shard`, in its order.

    Returns:
        On every rank, the results of all ranks in the order of the unsharded items.
    """
    if world_size() == 1:
        return list(results)
    from torch import distributed

    start()
    shares: list[list[T] | None] = [None] * world_size()
    distributed.all_gather_object(shares, list(results))
    found = [share or [] for share in shares]
    longest = max(len(share) for share in found)
    return [share[i] for i in range(longest) for share in found if i < len(share)]


def broadcast(value: T) -> T:
    """The value of rank 0, on every rank; every rank must call this."""
    if world_size() == 1:
        return value
    from torch import distributed

    start()
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def wait() -> None:
    """Return when every rank has come here."""
    gather([None])
