"""Removal of camera noise: pairs that the user supplies, as folders or SIDD's blocks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qmir_ao.errors import ConfigError, ImageError
from qmir_ao.recipes.images import Pixels, pixel_limit
from qmir_ao.recipes.metrics import Convention
from qmir_ao.recipes.tasks.base import Source, Task

TRUTH_FOLDERS = ("target", "target_crops", "groundtruth", "gt", "GT", "clean")
INPUT_FOLDERS = ("input", "input_crops", "noisy", "Noisy")
TRUTH_BLOCKS = ("ValidationGtBlocksSrgb", "BenchmarkGtBlocksSrgb")
"""Variables of SIDD's files, which are called like them."""


@dataclass(frozen=True)
class RealDenoising(Task):
    """Remove camera noise; scored on RGB as MATLAB does, without rounding to 8 bits.

    A folder holds either a sub-folder of ground truth and one of inputs (`target` and `input`,
    `target_crops` and `input_crops`, ...), or SIDD's `ValidationGtBlocksSrgb.mat` and
    `ValidationNoisyBlocksSrgb.mat` (evaluation only); or inputs lie in a folder of their own.
    """

    name: ClassVar[str] = "real-denoise"
    loss: ClassVar[str] = "charbonnier"
    from_truth: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """Name."""
        return "real denoising"

    @property
    def convention(self) -> Convention:
        """PSNR and SSIM of MATLAB on RGB."""
        return Convention("rgb", rounded=False, window="volume")

    def degrade(self, truth: Pixels) -> Pixels:
        """Refused: camera noise cannot be made from ground truth."""
        raise ConfigError(
            f"task {self.name}: inputs cannot be made from ground truth; give their folder"
        )

    def input_stems(self, truth: Path) -> list[str]:
        """SIDD's names (`0001_GT_SRGB_010`, `0001_NOISY_SRGB_010`), or as the truth."""
        return [truth.stem.replace("_GT_", "_NOISY_"), truth.stem]

    def locate(self, folder: Path, inputs: Path | None) -> tuple[Path, Path | None]:
        """The folders given, or the two sub-folders of one."""
        folder = Path(folder)
        if inputs is not None:
            return folder, inputs
        if not folder.is_dir():
            raise ImageError(f"{folder}: not a folder; give a folder with noisy and clean images")
        truth = next((folder / n for n in TRUTH_FOLDERS if (folder / n).is_dir()), None)
        noisy = next((folder / n for n in INPUT_FOLDERS if (folder / n).is_dir()), None)
        if truth is None or noisy is None:
            raise ImageError(
                f"{folder}: real denoising needs pairs: sub-folders {TRUTH_FOLDERS[0]!r} and "
                f"{INPUT_FOLDERS[0]!r}, SIDD's .mat files (evaluation), or a folder with inputs"
            )
        return truth, noisy

    def sources(self, folder: Path, inputs: Path | None = None) -> list[Source]:
        """Image pairs of folders, or the blocks of SIDD's files."""
        folder = Path(folder)
        names = [folder.stem] if folder.suffix == ".mat" else TRUTH_BLOCKS
        home = folder.parent if folder.suffix == ".mat" else folder
        truth = next((home / f"{n}.mat" for n in names if (home / f"{n}.mat").is_file()), None)
        if truth is None:
            return super().sources(folder, inputs)
        noisy = truth.with_name(truth.name.replace("Gt", "Noisy")) if inputs is None else inputs
        clean, given = read_blocks(truth), read_blocks(noisy)
        if clean.shape != given.shape:
            raise ImageError(f"{noisy}: blocks {given.shape} do not match {clean.shape} of {truth}")

        def source(index: int) -> Source:
            image, block = divmod(index, clean.shape[1])
            pair = given[image, block], clean[image, block]
            return Source(f"{image:02d}-{block:02d}", lambda: pair, lambda: pair)

        return [source(index) for index in range(clean.shape[0] * clean.shape[1])]


def read_blocks(path: Path) -> Pixels:
    """Blocks of a SIDD file: uint8 (images, blocks, H, W, 3).

    Raises:
        ImageError: missing, damaged, too large, or another content.
    """
    from scipy.io import loadmat, whosmat

    path = Path(path)
    if not path.is_file():
        raise ImageError(f"{path}: no such file; noisy and clean blocks belong in one folder")
    try:
        # Header first: a small file may unpack to any size.
        headers: list[Any] = whosmat(str(path))
        arrays = [(name, shape) for name, shape, kind in headers if kind == "uint8"]
        if len(arrays) != 1 or len(arrays[0][1]) != 5 or arrays[0][1][4] != 3:
            raise ImageError(
                f"{path}: must hold one uint8 array (images, blocks, H, W, 3), holds {headers}"
            )
        name, shape = arrays[0]
        if int(np.prod(shape[:4], dtype=np.int64)) > 2 * pixel_limit():
            raise ImageError(f"{path}: {shape} is too large; set QMIR_MAX_PIXELS to allow it")
        blocks: Pixels = loadmat(str(path), variable_names=[name])[name]
    except ImageError:
        raise
    except Exception as error:  # the parser raises whatever the damaged bytes lead it to
        raise ImageError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); it must be a .mat file of "
            "version 5 to 7, as SIDD publishes it"
        ) from error
    return blocks
