"""PSNR and SSIM on the luma channel, as the restoration papers compute them.

Images are uint8 (H, W, C). Luma is BT.601 studio range from 8-bit RGB, not rounded; a border of
`border` pixels is cropped; SSIM uses an 11x11 Gaussian window (sigma 1.5) on the valid region.
"""

import numpy as np
import numpy.typing as npt
import torch

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.images import Pixels

LUMA = np.array([65.481, 128.553, 24.966])
"""BT.601 studio luma of RGB in [0, 1], without its offset of 16."""
SSIM_WINDOW = 11


def luma(image: Pixels) -> npt.NDArray[np.float64]:
    """Y (H, W) of uint8 RGB (H, W, 3) in 16..235; a grey image (H, W, 1) is returned as it is."""
    if image.shape[2] == 1:
        return image[:, :, 0].astype(np.float64)
    y: npt.NDArray[np.float64] = image.astype(np.float64) / 255.0 @ LUMA + 16.0
    return y


def psnr_y(image: Pixels, truth: Pixels, border: int = 0) -> float:
    """Peak signal-to-noise ratio on luma in dB; infinite for equal images.

    Args:
        image: uint8 (H, W, C).
        truth: uint8 of the same shape.
        border: pixels cropped on every side (the scale factor in super-resolution).
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = _luma_pair(image, truth, border)
    return float(peak_signal_noise_ratio(a, b, data_range=255.0))


def ssim_y(image: Pixels, truth: Pixels, border: int = 0) -> float:
    """Structural similarity on luma; see `psnr_y` for arguments.

    Raises:
        ConfigError: the images differ in shape or are smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = _luma_pair(image, truth, border)
    if min(a.shape[2:]) < SSIM_WINDOW:
        raise ConfigError(
            f"ssim_y: {tuple(a.shape[2:])} pixels inside the border are fewer than the "
            f"{SSIM_WINDOW}x{SSIM_WINDOW} window"
        )
    _, full = structural_similarity_index_measure(
        a, b, kernel_size=SSIM_WINDOW, sigma=1.5, data_range=255.0, return_full_image=True
    )
    # torchmetrics pads before filtering; the published numbers use whole windows only.
    edge = SSIM_WINDOW // 2
    return float(full[..., edge:-edge, edge:-edge].mean())


def _luma_pair(image: Pixels, truth: Pixels, border: int) -> tuple[torch.Tensor, torch.Tensor]:
    if image.shape != truth.shape:
        raise ConfigError(f"metrics: images differ in shape: {image.shape} and {truth.shape}")
    if min(image.shape[:2]) <= 2 * border:
        raise ConfigError(f"metrics: image {image.shape} has nothing inside a border of {border}")
    window = slice(border, -border or None)
    a, b = (torch.from_numpy(luma(x)[window, window].copy())[None, None] for x in (image, truth))
    return a, b
