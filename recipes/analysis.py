"""Analyse a network on a folder of images: sensitivity, bits under a budget, float beside integers.

Everything lies in one folder: results files, from which another call goes on, and the page.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

import qmir_ao
from qmir_ao.backend.bit_budget import BitAssignment
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.backend.table import Table
from qmir_ao.errors import CheckpointError, ConfigError
from qmir_ao.recipes.analysis_page import write
from qmir_ao.recipes.images import Pixels
from qmir_ao.recipes.pixels import to_float, to_tensor
from qmir_ao.recipes.tasks import Task

SENSITIVITY, COMPARISON = "sensitivity.json", "comparison.json"
ASSIGNMENT, PAGE = "assignment.json", "analysis.html"
Progress = Callable[[int, int], None]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Analysis:
    """What was found; None for what was not asked for."""

    sensitivity: Table | None
    assignment: BitAssignment | None
    comparison: Table | None
    page: Path


def probe_pairs(
    task: Task, folder: Path, inputs: Path | None = None, *, count: int = 4, side: int = 48
) -> list[Pair]:
    """Middles of the first test images: (input, ground truth), (1, C, h, w) in [0, 1].

    Args:
        task: how inputs are made from ground truth.
        folder: ground-truth images.
        inputs: their inputs, where they are not made.
        count: most images.
        side: most pixels of an input's side.

    Raises:
        ConfigError: no pixels asked for.
        ImageError: no images, or unreadable ones.
    """
    if count < 1 or side < 1:
        raise ConfigError(f"analyze: needs at least one image and pixel, got {count} and {side}")
    pairs = []
    for source in task.sources(folder, inputs)[:count]:
        low, truth = source.load()
        top, left = (max(0, (length - side) // 2) for length in low.shape[:2])
        scale = task.scale
        around = truth[scale * top :, scale * left :][: scale * side, : scale * side]
        pairs.append((_image(low[top : top + side, left : left + side]), _image(around)))
    return pairs


def _image(pixels: Pixels) -> Tensor:
    return to_tensor(to_float(np.ascontiguousarray(pixels)))[None]


def analyze(
    model: nn.Module,
    pairs: list[Pair],
    output: Path,
    *,
    title: str,
    bits: tuple[int, ...] = (2, 4, 8),
    budget: str | None = None,
    lowered: LoweredModule | None = None,
    measuring: Progress | None = None,
    comparing: Progress | None = None,
) -> Analysis:
    """Measure, and write tables as JSON and one HTML page into `output`.

    Args:
        model: float network.
        pairs: from `probe_pairs`.
        output: folder; measurements that it holds already are not made again.
        title: name of the network.
        bits: widths to try for each layer; empty leaves the sensitivity out.
        budget: also choose bits under this budget.
        lowered: also compare with this lowered form.
        measuring: called with (done, total) layers.
        comparing: called with (done, total) images.

    Raises:
        ConfigError: nothing asked for, an impossible budget, or `output` holds measurements of
            something else.
        CheckpointError: `output` cannot be written.
    """
    if not bits and (lowered is None or budget is not None):
        raise ConfigError("analyze: without bits there is no sensitivity, and no budget to search")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written ({error})") from error
    sensitivity = assignment = comparison = None
    if bits:
        sensitivity = qmir_ao.sensitivity(
            model, pairs, bits=bits, file=output / SENSITIVITY, progress=measuring
        )
    if budget is not None:
        assignment = qmir_ao.assign_bits(model, pairs, budget, bits=bits, table=sensitivity)
        assignment.table.to_json(output / ASSIGNMENT)
    if lowered is not None:
        comparison = qmir_ao.compare(
            model, lowered, pairs, file=output / COMPARISON, progress=comparing
        )
    page = write(output / PAGE, title, sensitivity, comparison, assignment)
    return Analysis(sensitivity, assignment, comparison, page)
