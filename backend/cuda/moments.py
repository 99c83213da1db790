"""Statistics of an operator's result from its tiles, and a quantizer's grids from them.

Kernels of `qmir::linear`, `qmir::conv2d` and `qmir::ss2d_scan_q` leave a part of the statistics for
each tile of their result (cuda/include/part_sums.cuh); the launchers here start what follows
(cuda/moments.cu).

Shape letters: B = samples, O = output channels, G = groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import Argument, Launcher, ceil_div, dense
from qmir_ao.ops._moments import check_moments_offset, check_some, empty_moments

THREADS = 128
CHANNELS = 4
"""Of a block that merges; a warp takes one at a time."""
PART_DOUBLES = 4
"""What a part of one tile takes, in units of 8 bytes: `TilePart` of cuda/include/moments.cuh."""


class Room(NamedTuple):
    """Where an operator leaves the parts of its statistics, if any are wanted.

    Attributes:
        offset: float32, O values that results are shifted by in the statistics, or None.
        parts: (B, O, tiles, PART_DOUBLES), or None.
        channels: O.
        tiles: of each channel of each sample.
        moments: float64 (B, O, 4), which `merge` writes, or None.
    """

    offset: Tensor | None
    parts: Tensor | None
    channels: int
    tiles: int
    moments: Tensor | None

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """What QMIR_PARTS_ROOM declares."""
        return self.offset, self.parts, self.channels, self.tiles


def make_room(
    op: str, wanted: bool, offset: Tensor | None, y: Tensor, channels: int, tiles: int
) -> Room:
    """Memory for the statistics of a result.

    Args:
        op: name for errors.
        wanted: whether there are any.
        offset: operand of the operator.
        y: the result.
        channels: O.
        tiles: of each channel of each sample.
    """
    if not wanted:
        return Room(None, None, channels, tiles, None)
    check_moments_offset(op, offset, channels)
    check_some(op, y)
    moments = empty_moments(y, channels)
    size = (*moments.shape[:2], tiles, PART_DOUBLES)
    parts = torch.empty(size, dtype=torch.float64, device=y.device)
    return Room(None if offset is None else dense(offset), parts, channels, tiles, moments)


def merge(launch: Launcher, room: Room) -> None:
    """Start the kernel that makes the statistics of channels from the parts of tiles."""
    if room.moments is None:
        return
    channels = room.moments.shape[0] * room.channels
    launch(
        "moments",
        "qmir_moments_merge",
        (ceil_div(channels, CHANNELS), 1, 1),
        (THREADS, 1, 1),
        (room.parts, room.moments, channels, room.tiles),
    )


def launch_steps(
    launch: Launcher,
    moments: Tensor,
    channels: Tensor | None,
    weights: tuple[Tensor, Tensor],
    found: tuple[Tensor, Tensor],
    count: int,
    levels: float,
) -> None:
    """Start the kernel that makes step and shift of each group from the statistics of channels.

    Args:
        launch: starts the kernel.
        moments: float64 (B, O, 4).
        channels: int64, those that a group has, or None for all. One that is none of the O makes
            step and shift NaN.
        weights: (4,) of the step and of the shift.
        found: step and shift (G,), which are written.
        count: values of a group.
        levels: divisor of the cap, or 0 without one.
    """
    samples, features, _ = moments.shape
    groups = found[0].numel()
    chosen = features if channels is None else channels.numel()
    kept = None if channels is None else dense(channels)
    launch(
        "moments",
        "qmir_moments_steps",
        (groups, 1, 1),
        (THREADS, 1, 1),
        (dense(moments), kept, *weights, *found, samples // groups, chosen, features, count,
         levels),
    )  # fmt: skip
