"""Evaluate a restoration network on a folder of images: PSNR and SSIM as published."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torch import nn

from qmir_ao.errors import ConfigError
from qmir_ao.recipes import distributed
from qmir_ao.recipes.images import Pixels
from qmir_ao.recipes.metrics import Convention, check_lpips, lpips, score
from qmir_ao.recipes.pixels import bicubic_upscale, to_float
from qmir_ao.recipes.restore import restore_pixels
from qmir_ao.recipes.tasks.base import Source, Task
from qmir_ao.recipes.tasks.super_resolution import SuperResolution

__all__ = ["COLUMNS", "Evaluation", "ImageScore", "bicubic_upscale", "evaluate"]

COLUMNS = ("psnr", "ssim", "baseline_psnr", "baseline_ssim")
PERCEPTUAL_COLUMNS = ("lpips", "baseline_lpips")


@dataclass(frozen=True)
class ImageScore:
    """Scores of one image; the baseline is the input (enlarged bicubically where it is smaller).

    LPIPS, of the whole image in RGB, is None where it was not asked for.
    """

    name: str
    psnr: float
    ssim: float
    baseline_psnr: float
    baseline_ssim: float
    lpips: float | None = None
    baseline_lpips: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of a folder; the means are over images."""

    task: Task
    convention: Convention
    images: list[ImageScore]

    @property
    def scale(self) -> int:
        """Enlargement."""
        return self.task.scale

    @property
    def border(self) -> int:
        """Pixels cropped before scoring."""
        return self.convention.border

    def mean(self, column: str) -> float:
        """Mean over the images of one of `columns`."""
        return fmean(getattr(image, column) for image in self.images)

    @property
    def columns(self) -> tuple[str, ...]:
        """What was measured."""
        perceptual = any(image.lpips is not None for image in self.images)
        return (*COLUMNS, *PERCEPTUAL_COLUMNS) if perceptual else COLUMNS

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the infinite PSNR of equal images becomes None."""
        columns = self.columns
        images = [
            {name: getattr(image, name) for name in ("name", *columns)} for image in self.images
        ]
        return {
            "task": self.task.name,
            **asdict(self.task),  # type: ignore[call-overload]
            "scale": self.scale,
            **asdict(self.convention),
            "mean": {column: _finite(self.mean(column)) for column in columns},
            "images": [{key: _finite(value) for key, value in row.items()} for row in images],
        }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and math.isinf(value) else value


def evaluate(
    model: nn.Module,
    folder: Path,
    *,
    scale: int | None = None,
    task: Task | None = None,
    low_folder: Path | None = None,
    border: int | None = None,
    tile: int | None = None,
    perceptual: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run a network over a folder of ground-truth images and score the results.

    Under `torchrun` the ranks share the images, and every rank gets all scores.

    Args:
        model: float or lowered network from (1, C, h, w) to (1, C, scale*h, scale*w).
        folder: ground-truth images.
        scale: enlargement of the network; short for `task=SuperResolution(scale)`.
        task: restoration task; either this or `scale`.
        low_folder: inputs named as the task says (`<name>` or `<name>x<scale>`), instead of making
            them from the ground truth.
        border: pixels cropped before scoring; by default as published.
        tile: section length for large images, or None to run images whole.
        perceptual: also measure LPIPS with this network, "alex", "vgg" or "squeeze".
        progress: called with (done, total) after each image.

    Raises:
        ConfigError: scale below 2, neither or both of scale and task, or LPIPS that cannot be
            measured here.
        ImageError: an image is missing, unreadable or of the wrong size.
    """
    if (task is None) == (scale is None):
        raise ConfigError(f"evaluate: give either scale or task, got {scale} and {task}")
    task = SuperResolution(scale) if task is None and scale is not None else task
    assert task is not None
    convention = task.convention if border is None else replace(task.convention, border=border)
    if perceptual is not None:
        check_lpips(perceptual, task.channels)
    sources = task.sources(Path(folder), None if low_folder is None else Path(low_folder))
    share = distributed.shard(sources)
    scores = []
    for done, source in enumerate(share, start=1):
        scores.append(_score(model, source, task, convention, tile, perceptual))
        if progress is not None:
            progress(done, len(share))
    return Evaluation(task, convention, distributed.gather(scores))


def _score(
    model: nn.Module,
    source: Source,
    task: Task,
    convention: Convention,
    tile: int | None,
    perceptual: str | None,
) -> ImageScore:
    low, truth = source.load()
    # Float pixels are not rounded on their way through the network.
    given = low if convention.rounded else to_float(low)
    image = restore_pixels(model, given, scale=task.scale, tile=tile)
    if convention.rounded:
        image = _rounded(image)
    baseline = task.baseline(low)
    scores = *score(image, truth, convention), *score(baseline, truth, convention)
    if perceptual is None:
        return ImageScore(source.name, *scores)
    distances = (lpips(shown, truth, perceptual) for shown in (image, baseline))
    return ImageScore(source.name, *scores, *distances)


def _rounded(image: Pixels) -> Pixels:
    """Pixels of 8 bits."""
    if image.dtype == np.uint8:
        return image
    return np.rint(np.clip(to_float(image), 0.0, 1.0) * 255.0).astype(np.uint8)
