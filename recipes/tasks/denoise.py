"""Removal of Gaussian noise from colour images."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.images import Pixels
from qmir_ao.recipes.metrics import Convention
from qmir_ao.recipes.pixels import to_float
from qmir_ao.recipes.tasks.base import Task

TEST_SEED = 0
"""Seed of the noise of every test image, as published."""


@dataclass(frozen=True)
class GaussianDenoising(Task):
    """Remove white Gaussian noise; scored on RGB, nothing cropped.

    The noisy input is neither clipped nor rounded. Test noise comes from numpy's legacy generator,
    seeded anew for every image, drawn in the order of a BGR image. (The paper says luma for every
    task, but its table of denoising lies in the regime of RGB numbers.)

    Args:
        sigma: standard deviation in units of 1/255; 15, 25 and 50 are published.

    Raises:
        ConfigError: sigma is not between 0 and 255.
    """

    name: ClassVar[str] = "denoise"
    loss: ClassVar[str] = "charbonnier"

    sigma: float = 25.0

    def __post_init__(self) -> None:
        """Check sigma."""
        if isinstance(self.sigma, bool) or not 0 < self.sigma <= 255:
            raise ConfigError(
                f"task {self.name}: sigma must be above 0 and at most 255, got {self.sigma!r}"
            )

    @property
    def title(self) -> str:
        """Name and sigma."""
        return f"colour denoising, sigma {self.sigma:g}"

    @property
    def convention(self) -> Convention:
        """PSNR and SSIM on RGB."""
        return Convention("rgb")

    def degrade(self, truth: Pixels) -> Pixels:
        """Nothing: all of this degradation is random."""
        return truth

    def corrupt(self, patch: Pixels, rng: np.random.Generator) -> Pixels:
        """Add fresh noise."""
        noisy = to_float(patch) + rng.normal(0.0, self.sigma / 255.0, patch.shape)
        return noisy.astype(np.float32)

    def evaluation_input(self, truth: Pixels) -> Pixels:
        """Add the published test noise."""
        noise = np.random.RandomState(TEST_SEED).normal(0.0, self.sigma / 255.0, truth.shape)
        # Published code holds images as BGR, so the noise of blue is drawn first.
        return (to_float(truth) + noise[:, :, ::-1]).astype(np.float32)
