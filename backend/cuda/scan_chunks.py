"""How scans are cut into chunks; the sizes that `cuda/include/scan_walk.cuh` calls ScanSize.

A chunk's length decides where a state is carried, and with that the last bits of a result. It
depends on a sample's shape alone, never on the batch or the device: the same input gives the same
bytes on every GPU.
"""

from typing import NamedTuple

from qmir_ao.backend.cuda.launch import MAX_INT, Size3, ceil_div, check_count
from qmir_ao.ops._directions import DIRECTIONS

WARP = 32
TILE = 16
"""Steps that a warp holds in shared memory at once; chunks are a multiple."""

TARGET_WARPS = 2048
"""Chunks of one sample, times blocks of 32 channels: 16 warps for each of 132 multiprocessors."""

SHORTEST = 64
"""Steps below which carrying a state costs as much as the chunk."""

LONGEST_SIDE = MAX_INT - TILE
"""Rows and columns of an image that the kernels count as `int`, a tile beyond the last included."""


class ScanSize(NamedTuple):
    """Sizes of a launch, in the order of the kernels' parameters.

    Attributes:
        batch: samples.
        groups: direction groups.
        per_group: channels of a group.
        length: steps of a sequence, pixels of an image.
        height: of the images; 0 for sequences.
        row_steps: steps of a chunk of rows, and of sequences.
        column_unit: steps of the columns that one warp goes through at once.
        column_steps: steps of a chunk of columns.
        slots: chunks of the direction that has most.
        time_blocks: blocks along the steps of the direction that has most.
    """

    batch: int
    groups: int
    per_group: int
    length: int
    height: int
    row_steps: int
    column_unit: int
    column_steps: int
    slots: int
    time_blocks: int

    @property
    def blocks(self) -> int:
        """Blocks of 32 channels of all groups and samples."""
        return self.batch * self.groups * ceil_div(self.per_group, WARP)

    @property
    def grid(self) -> Size3:
        """Grid of the kernels that go through the chunks."""
        return (self.time_blocks * self.blocks, 1, 1)


def chunk_steps(groups: int, per_group: int, length: int) -> int:
    """Steps of a chunk: enough chunks to fill a large GPU with one sample, none very short."""
    rows = groups * ceil_div(per_group, WARP)
    return max(SHORTEST, ceil_div(ceil_div(length * rows, TARGET_WARPS), TILE) * TILE)


def sequences(
    batch: int, groups: int, per_group: int, length: int, warps: int, steps: int | None = None
) -> ScanSize:
    """Chunks of plain sequences, `warps` to a block.

    Args:
        batch: samples.
        groups: direction groups.
        per_group: channels of a group.
        length: steps of a sequence.
        warps: warps of a block.
        steps: steps of a chunk instead of `chunk_steps`.
    """
    steps = steps or chunk_steps(groups, per_group, length)
    slots = ceil_div(length, steps)
    unused = (1, 1)
    time = ceil_div(slots, warps)
    return ScanSize(batch, groups, per_group, length, 0, steps, *unused, slots, time)


def images(
    batch: int, channels: int, height: int, width: int, warps: int, steps: int | None = None
) -> ScanSize:
    """Chunks of the four directions of images, `warps` to a block.

    The warps of a block go through columns that lie side by side. A long column is cut into parts,
    short ones are joined.

    Args:
        batch: samples.
        channels: channels of an image.
        height: rows of an image.
        width: columns of an image.
        warps: warps of a block.
        steps: steps of a chunk instead of `chunk_steps`.

    Raises:
        DeviceSizeError: an image that is longer or wider than the kernels can count.
    """
    for name, side in (("height", height), ("width", width)):
        check_count(name, side, LONGEST_SIDE)
    length = height * width
    steps = steps or chunk_steps(DIRECTIONS, channels, length)
    # One column a warp keeps the columns of a block side by side.
    unit = max(1, min(steps, SHORTEST) // height) * height
    parts = ceil_div(unit, steps)
    column_steps = ceil_div(unit, parts)
    rows, units = ceil_div(length, steps), ceil_div(length, unit)
    slots = max(rows, units * ceil_div(unit, column_steps))
    time = max(ceil_div(rows, warps), ceil_div(units, warps) * ceil_div(unit, column_steps))
    return ScanSize(
        batch, DIRECTIONS, channels, length, height, steps, unit, column_steps, slots, time
    )
