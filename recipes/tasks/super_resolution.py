"""Super-resolution from MATLAB-bicubic inputs, classic and lightweight."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.images import Pixels
from qmir_ao.recipes.metrics import Convention
from qmir_ao.recipes.pixels import bicubic_downscale, bicubic_upscale
from qmir_ao.recipes.tasks.base import Task


@dataclass(frozen=True)
class SuperResolution(Task):
    """Enlarge images; scored on luma without a border as wide as the scale.

    Classic and lightweight super-resolution are one task: they differ in network and training.

    Args:
        scale: whole number from 2; the published ones are 2, 3 and 4.

    Raises:
        ConfigError: another scale.
    """

    name: ClassVar[str] = "sr"

    scale: int = 2

    def __post_init__(self) -> None:
        """Check the scale."""
        if type(self.scale) is not int or self.scale < 2:
            raise ConfigError(
                f"task {self.name}: scale must be a whole number of at least 2, got {self.scale!r}"
            )

    @property
    def title(self) -> str:
        """Name and scale."""
        return f"super-resolution x{self.scale}"

    @property
    def convention(self) -> Convention:
        """PSNR and SSIM on luma, `scale` pixels cropped."""
        return Convention("y", border=self.scale)

    @property
    def baseline_name(self) -> str:
        """The usual comparison."""
        return "bicubic"

    def degrade(self, truth: Pixels) -> Pixels:
        """MATLAB's bicubic downscaling."""
        return bicubic_downscale(truth, self.scale)

    def baseline(self, low: Pixels) -> Pixels:
        """Bicubic enlargement."""
        return bicubic_upscale(low, self.scale)

    def input_stems(self, truth: Path) -> list[str]:
        """Names of the published sets: `babyx2`, Manga109's `x_LRBI_x2`, or as the truth."""
        stem = truth.stem.removesuffix("_HR")
        return [f"{stem}x{self.scale}", f"{stem}_LRBI_x{self.scale}", truth.stem]
