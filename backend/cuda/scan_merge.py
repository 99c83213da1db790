"""Sum of the images of the four directions (cuda/include/scan_merge.cuh, scan_merge_tile.cuh)."""

from collections.abc import Mapping

from torch import Tensor

from qmir_ao.backend.cuda.launch import Launcher, ceil_div
from qmir_ao.backend.cuda.moments import Room

THREADS = 256
MOST_BLOCKS = 4096
"""Enough for every GPU; a thread goes on with further elements."""
TILE = 1024
"""Pixels of a block that leaves statistics."""
TILE_THREADS = 128


def merge(launch: Launcher, op: str, parts: Tensor, y: Tensor, defines: Mapping[str, int]) -> None:
    """Write (rows + rows back) + (columns + columns back) to `y`.

    Args:
        launch: starts the kernel.
        op: operator name, that of its source as well.
        parts: images (B, 4, D, L) of the directions.
        y: their sum, (B, D, H, W).
        defines: preprocessor constants of the source.
    """
    blocks = min(ceil_div(y.numel(), THREADS), MOST_BLOCKS)
    launch(
        op, f"qmir_{op}_merge", (blocks, 1, 1), (THREADS, 1, 1),
        [parts, y, y.shape[0], y[0].numel()], defines=defines,
    )  # fmt: skip


def tiles(y: Tensor) -> int:
    """Of each channel of each sample of an image (B, D, H, W)."""
    return ceil_div(y.shape[2] * y.shape[3], TILE)


def merge_kept(
    launch: Launcher, op: str, directions: Tensor, y: Tensor, room: Room, defines: Mapping[str, int]
) -> None:
    """Write to `y` what `merge` writes, and to `room` a part of its statistics for each tile.

    Args:
        launch: starts the kernel.
        op: operator name, that of its source as well.
        directions: images (B, 4, D, L) of the directions.
        y: their sum, (B, D, H, W).
        room: for `tiles(y)` parts of each channel.
        defines: preprocessor constants of the source.
    """
    blocks = y.shape[0] * y.shape[1] * room.tiles
    launch(
        op, f"qmir_{op}_merge_kept", (blocks, 1, 1), (TILE_THREADS, 1, 1),
        [directions, y, y.shape[2] * y.shape[3], *room.arguments], defines=defines,
    )  # fmt: skip
