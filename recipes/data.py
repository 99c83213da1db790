"""Training patches of any restoration task."""

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from qmir_ao.errors import ConfigError, ImageError
from qmir_ao.recipes.images import Pixels, atomic_write
from qmir_ao.recipes.pixels import bicubic_downscale, crop_to_multiple, to_pixels, to_tensor
from qmir_ao.recipes.tasks.base import Pair, Task
from qmir_ao.recipes.tasks.super_resolution import SuperResolution

__all__ = ["PatchDataset", "bicubic_downscale", "crop_to_multiple", "to_pixels", "to_tensor"]

logger = logging.getLogger(__name__)


class PatchDataset(Dataset[tuple[Tensor, Tensor]]):
    """Random patches (input, ground truth); item i depends on the seed and i only.

    Images and their inputs stay in memory as uint8, or in memory-mapped files. An image is drawn
    with a probability proportional to its area, a patch uniformly in it; it is flipped, turned, and
    gets the random part of the task's degradation. All files are read and checked here, so that
    nothing fails after training has begun.

    Args:
        folders: folders with ground truth.
        patch: side of the input patch; smaller images are left out.
        length: number of items (batch size times iterations).
        seed: seed of all draws.
        scale: downscaling factor; short for `task=SuperResolution(scale)`.
        task: restoration task; either this or `scale`.
        inputs: folders with inputs, one for each of `folders`; made from the ground truth if None.
        skip_bad_images: leave out files that cannot be read, with a warning, instead of raising.
        cache: folder for decoded images, which later runs and other processes then share; in
            memory if None.
        progress: called with (done, total) after each image.

    Raises:
        ConfigError: neither or both of task and scale, unequal numbers of folders, or no image is
            large enough.
        ImageError: an image cannot be read, a folder has none, or a pair does not fit.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        patch: int,
        length: int,
        seed: int,
        scale: int | None = None,
        task: Task | None = None,
        inputs: Sequence[Path] | None = None,
        skip_bad_images: bool = False,
        cache: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.task = _task(task, scale)
        self.scale, self.patch, self.length, self.seed = self.task.scale, patch, length, seed
        self.skipped: list[Path] = []
        files = _files(self.task, folders, inputs)
        self.pairs: list[Pair] = []
        for done, (truth, low) in enumerate(files, start=1):
            pair = self._read(truth, low, skip_bad_images)
            if pair is not None:
                self.pairs.append(pair if cache is None else _mapped(pair, cache))
            if progress is not None:
                progress(done, len(files))
        if not self.pairs:
            side = patch * self.scale
            raise ConfigError(
                f"training: none of the {len(files) - len(self.skipped)} images has {side} pixels "
                f"on both sides, which patch {patch} at scale {self.scale} needs; use a smaller "
                "patch"
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
        s = self.scale
        small = _augment(_cut(low, top, left, self.patch), turns, mirrored)
        large = _augment(_cut(high, top * s, left * s, self.patch * s), turns, mirrored)
        return to_tensor(self.task.corrupt(small, rng)), to_tensor(large)

    def _read(self, truth: Path, low: Path | None, skip: bool) -> Pair | None:
        """Pair of one image; None if it is too small, or bad and `skip` is set."""
        try:
            image, given = self.task.read_pair(truth, low)
        except ImageError as error:
            if not skip:
                raise
            logger.warning("left out: %s", error)
            self.skipped.append(truth)
            return None
        if given is None and min(image.shape[:2]) < self.patch * self.scale:
            return None
        pair = self.task.training_pair(image, given, truth)
        return pair if min(pair[0].shape[:2]) >= self.patch else None


def _task(task: Task | None, scale: int | None) -> Task:
    if task is None and scale is not None:
        return SuperResolution(scale)
    if task is None or scale is not None:
        raise ConfigError(f"PatchDataset: give either task or scale, got {task} and {scale}")
    return task


def _files(
    task: Task, folders: Sequence[Path], inputs: Sequence[Path] | None
) -> list[tuple[Path, Path | None]]:
    """Ground-truth files of all folders with their input files."""
    if inputs is not None and len(inputs) != len(folders):
        raise ConfigError(
            f"training: {len(folders)} folders of ground truth and {len(inputs)} of inputs; give "
            "one folder of inputs for each"
        )
    given: list[Path | None] = [None] * len(folders) if inputs is None else list(inputs)
    if not folders:
        raise ConfigError("training: no folder with images; give at least one")
    return [
        pair
        for folder, low in zip(folders, given, strict=True)
        for pair in task.pairs(Path(folder), None if low is None else Path(low))
    ]


def _mapped(pair: Pair, cache: Path) -> Pair:
    """The same arrays in memory-mapped files, named by their content."""
    cache.mkdir(parents=True, exist_ok=True)
    low, high = (_map(pixels, cache) for pixels in pair)
    return low, high


def _map(pixels: Pixels, cache: Path) -> Pixels:
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(pixels), allow_pickle=False)
    data = stream.getvalue()
    path = cache / f"{hashlib.sha256(data).hexdigest()}.npy"
    if not path.is_file() or path.stat().st_size != len(data):
        atomic_write(path, data)
    mapped: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _cut(image: Pixels, top: int, left: int, side: int) -> Pixels:
    return image[top : top + side, left : left + side]


def _augment(image: Pixels, turns: int, mirrored: bool) -> Pixels:
    image = np.rot90(image, turns)
    return image[:, ::-1] if mirrored else image
