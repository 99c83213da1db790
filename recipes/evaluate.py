"""Evaluate a restoration network on a folder of images: PSNR and SSIM on luma."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qmir_ao.errors import ConfigError, ImageError
from qmir_ao.recipes.data import bicubic_downscale, crop_to_multiple, to_pixels, to_tensor
from qmir_ao.recipes.images import Pixels, list_images, read_image
from qmir_ao.recipes.metrics import psnr_y, ssim_y
from qmir_ao.recipes.restore import restore_pixels


@dataclass(frozen=True)
class ImageScore:
    """Scores of one image; bicubic enlargement is the baseline."""

    name: str
    psnr: float
    ssim: float
    bicubic_psnr: float
    bicubic_ssim: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of a folder; the means are over images."""

    scale: int
    border: int
    images: list[ImageScore]

    def mean(self, column: str) -> float:
        """Mean over the images of `psnr`, `ssim`, `bicubic_psnr` or `bicubic_ssim`."""
        return fmean(getattr(image, column) for image in self.images)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        columns = ("psnr", "ssim", "bicubic_psnr", "bicubic_ssim")
        return {
            "scale": self.scale,
            "border": self.border,
            "mean": {column: self.mean(column) for column in columns},
            "images": [asdict(image) for image in self.images],
        }


def bicubic_upscale(image: Pixels, scale: int) -> Pixels:
    """Enlarge uint8 (H, W, C) by bicubic interpolation with MATLAB's kernel (a = -0.5)."""
    x = to_tensor(image).to(torch.float64)[None]
    size = (image.shape[0] * scale, image.shape[1] * scale)
    # Only the antialiased form uses a = -0.5; when enlarging it is plain bicubic.
    y = F.interpolate(x, size, mode="bicubic", antialias=True)
    return to_pixels(y[0])


def evaluate(
    model: nn.Module,
    folder: Path,
    *,
    scale: int,
    low_folder: Path | None = None,
    border: int | None = None,
    tile: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run a network over a folder of ground-truth images and score the results.

    Args:
        model: float or lowered network from (1, 3, h, w) to (1, 3, scale*h, scale*w).
        folder: ground-truth images.
        scale: factor of the network; inputs are made by `bicubic_downscale`.
        low_folder: inputs named `<name>.png` or `<name>x<scale>.png`, instead of downscaling.
        border: pixels cropped before scoring; the scale by default, as published.
        tile: section length for large images, or None to run images whole.
        progress: called with (done, total) after each image.

    Raises:
        ConfigError: scale below 2.
        ImageError: an image is missing, unreadable or of the wrong size.
    """
    if scale < 2:
        raise ConfigError(f"evaluate: scale must be at least 2, got {scale}")
    edge = scale if border is None else border
    paths = list_images(Path(folder))
    scores = []
    for done, path in enumerate(paths, start=1):
        truth = crop_to_multiple(read_image(path), scale)
        low = _low(path, truth, scale, low_folder)
        image = restore_pixels(model, low, scale=scale, tile=tile)
        bicubic = bicubic_upscale(low, scale)
        scores.append(
            ImageScore(
                name=path.name,
                psnr=psnr_y(image, truth, edge),
                ssim=ssim_y(image, truth, edge),
                bicubic_psnr=psnr_y(bicubic, truth, edge),
                bicubic_ssim=ssim_y(bicubic, truth, edge),
            )
        )
        if progress is not None:
            progress(done, len(paths))
    return Evaluation(scale, edge, scores)


def _low(path: Path, truth: Pixels, scale: int, folder: Path | None) -> Pixels:
    if folder is None:
        return bicubic_downscale(truth, scale)
    names = [f"{path.stem}x{scale}.png", path.name, f"{path.stem}.png"]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise ImageError(f"{folder}: holds no input for {path.name}; looked for {names}")
    low = read_image(found[0])
    if (low.shape[0] * scale, low.shape[1] * scale) != truth.shape[:2]:
        raise ImageError(
            f"{found[0]}: {low.shape[:2]} pixels do not match {truth.shape[:2]} of {path.name} "
            f"at scale {scale}"
        )
    return low
