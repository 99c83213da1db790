"""Sum of the images of the four directions (cuda/include/scan_merge.cuh)."""

from collections.abc import Mapping

from torch import Tensor

from qmir_ao.backend.cuda.launch import Launcher, ceil_div

THREADS = 256
MOST_BLOCKS = 4096
"""Enough for every GPU; a thread goes on with further elements."""


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
