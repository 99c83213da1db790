"""Training patches and the bicubic downscaling of the super-resolution benchmarks."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.images import Pixels, list_images, read_image

BORDER = 4
"""Low-resolution pixels that the downscaler pads and crops; its kernel is 4 of them wide."""


def crop_to_multiple(image: Pixels, scale: int) -> Pixels:
    """Cut the bottom and right edge of (H, W, C) so that both sides are multiples of `scale`."""
    h, w = image.shape[0] // scale * scale, image.shape[1] // scale * scale
    return image[:h, :w]


def bicubic_downscale(image: Pixels, scale: int) -> Pixels:
    """Downscale uint8 (H, W, C) exactly as MATLAB's `imresize` (bicubic, antialiased) does.

    The test sets' low-resolution images were made that way. MATLAB pads symmetrically, rounds
    halves up, and rounds between the two axes (not at scale 8, where the published files differ).

    Args:
        image: uint8 (H, W, C); cut to multiples of `scale` first.
        scale: whole number from 2.

    Returns:
        uint8 (H // scale, W // scale, C).
    """
    image = crop_to_multiple(image, scale)
    if min(image.shape[:2]) < scale:
        raise ConfigError(f"bicubic_downscale: image {image.shape} is smaller than scale {scale}")
    pad = BORDER * scale
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
    x = torch.from_numpy(padded.astype(np.float64)).permute(2, 0, 1)[None]
    height, width = x.shape[2] // scale, x.shape[3] // scale
    x = F.interpolate(x, (height, x.shape[3]), mode="bicubic", antialias=True)
    if scale != 8:
        x = _round(x)
    x = _round(F.interpolate(x, (height, width), mode="bicubic", antialias=True))
    cropped = x[0, :, BORDER:-BORDER, BORDER:-BORDER].permute(1, 2, 0)
    return np.ascontiguousarray(cropped.numpy().astype(np.uint8))


def _round(x: Tensor) -> Tensor:
    # torch.round takes halves to even, MATLAB up.
    return torch.floor(x + 0.5).clamp(0, 255)


def to_tensor(pixels: Pixels) -> Tensor:
    """(H, W, C) uint8 or uint16 to float32 (C, H, W) in [0, 1]."""
    peak = np.iinfo(pixels.dtype).max
    scaled = pixels.astype(np.float32) / np.float32(peak)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))


def to_pixels(image: Tensor, dtype: type = np.uint8) -> Pixels:
    """Float (C, H, W) in [0, 1], clamped and rounded, to (H, W, C) uint8 or uint16."""
    peak = np.iinfo(dtype).max
    scaled = image.detach().to("cpu", torch.float64).clamp(0, 1).mul(peak).round()
    return np.ascontiguousarray(scaled.permute(1, 2, 0).numpy().astype(dtype))


class PatchDataset(Dataset[tuple[Tensor, Tensor]]):
    """Random (low, high) resolution patches; item i depends on the seed and i only.

    Images and their downscaled versions stay in memory as uint8. An image is drawn with a
    probability proportional to its area, a patch uniformly in it, and it is flipped and turned.

    Args:
        folders: folders with images of high resolution.
        scale: downscaling factor.
        patch: side of the low-resolution patch; smaller images are left out.
        length: number of items (batch size times iterations).
        seed: seed of all draws.
        progress: called with (done, total) after each image.

    Raises:
        ConfigError: no image is large enough.
        ImageError: an image cannot be read.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        scale: int,
        patch: int,
        length: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        paths = [path for folder in folders for path in list_images(Path(folder))]
        self.scale, self.patch, self.length, self.seed = scale, patch, length, seed
        self.pairs: list[tuple[Pixels, Pixels]] = []
        for done, path in enumerate(paths, start=1):
            high = crop_to_multiple(read_image(path), scale)
            if min(high.shape[:2]) >= patch * scale:
                self.pairs.append((bicubic_downscale(high, scale), high))
            if progress is not None:
                progress(done, len(paths))
        if not self.pairs:
            raise ConfigError(
                f"training: none of the {len(paths)} images has {patch * scale} pixels on both "
                f"sides, which patch {patch} at scale {scale} needs; use a smaller patch"
            )
        area = np.array([low.shape[0] * low.shape[1] for low, _ in self.pairs], np.float64)
        self.cumulative = np.cumsum(area) / area.sum()

    def __len__(self) -> int:
        """Number of items."""
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Patch pair `index`: (C, patch, patch) and (C, patch*scale, patch*scale)."""
        if not 0 <= index < self.length:
            raise IndexError(f"patch {index} of {self.length}")
        rng = np.random.default_rng((self.seed, index))
        chosen = int(np.searchsorted(self.cumulative, rng.random(), side="right"))
        low, high = self.pairs[min(chosen, len(self.pairs) - 1)]
        top = int(rng.integers(low.shape[0] - self.patch + 1))
        left = int(rng.integers(low.shape[1] - self.patch + 1))
        turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
        return (
            to_tensor(_augment(_cut(low, top, left, self.patch), turns, mirrored)),
            to_tensor(_augment(self._high(high, top, left), turns, mirrored)),
        )

    def _high(self, high: Pixels, top: int, left: int) -> Pixels:
        s = self.scale
        return _cut(high, top * s, left * s, self.patch * s)


def _cut(image: Pixels, top: int, left: int, side: int) -> Pixels:
    return image[top : top + side, left : left + side]


def _augment(image: Pixels, turns: int, mirrored: bool) -> Pixels:
    image = np.rot90(image, turns)
    return image[:, ::-1] if mirrored else image
