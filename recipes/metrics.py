"""PSNR and SSIM as the restoration papers compute them, through torchmetrics.

Images are (H, W, C), uint8, or float in units of the peak where a protocol scores unrounded
values. Luma is BT.601 studio range from RGB, not rounded; a border is cropped; SSIM uses an 11x11
Gaussian window (sigma 1.5) on the valid region and is the mean over the channels.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.images import Pixels

LUMA = np.array([65.481, 128.553, 24.966])
"""BT.601 studio luma of RGB in [0, 1], without its offset of 16."""
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
CHANNELS = ("y", "rgb", "grey")
WINDOWS = ("plane", "volume")
PERCEPTUAL = ("alex", "vgg", "squeeze")
"""Networks of LPIPS."""
PERCEPTUAL_SIDE = 31
"""Pixels that leave something after the strides of the first of them."""
PEAK = 255.0


@dataclass(frozen=True)
class Convention:
    """How a published table scores images.

    Attributes:
        channel: "y" (luma of colour, grey images as they are), "rgb" (all channels alike), or
            "grey" (images of one channel, as they are).
        border: pixels cropped on every side (the scale factor in super-resolution).
        rounded: whether the restored image is rounded to 8 bits before it is scored.
        window: SSIM's window: "plane", or "volume" for MATLAB's `ssim` of an array (H, W, 3),
            whose window reaches over the channels.
    """

    channel: str = "y"
    border: int = 0
    rounded: bool = True
    window: str = "plane"

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ConfigError: unknown channel or window, or a negative border.
        """
        _check_channel(self.channel)
        if self.window not in WINDOWS or self.border < 0:
            raise ConfigError(
                f"Convention: window must be one of {WINDOWS}, got {self.window!r}, and border at "
                f"least 0, got {self.border}"
            )


def luma(image: Pixels) -> npt.NDArray[np.float64]:
    """Y (H, W) of uint8 RGB (H, W, 3) in 16..235; a grey image (H, W, 1) is returned as it is."""
    if image.shape[2] == 1:
        return image[:, :, 0].astype(np.float64)
    y: npt.NDArray[np.float64] = image.astype(np.float64) / 255.0 @ LUMA + 16.0
    return y


def psnr(image: Pixels, truth: Pixels, *, channel: str = "y", border: int = 0) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images.

    Args:
        image: uint8 or float in units of the peak, (H, W, C).
        truth: the same shape; the types may differ.
        channel: see `Convention`.
        border: pixels cropped on every side.

    Raises:
        ConfigError: unknown channel, different shapes, or nothing inside the border.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = _planes(image, truth, channel, border)
    return float(peak_signal_noise_ratio(a, b, data_range=PEAK))


def ssim(image: Pixels, truth: Pixels, *, channel: str = "y", border: int = 0) -> float:
    """Structural similarity, the mean over channels; see `psnr` for arguments.

    Raises:
        ConfigError: as `psnr`, or the images are smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = _planes(image, truth, channel, border)
    if min(a.shape[2:]) < SSIM_WINDOW:
        raise ConfigError(
            f"ssim: {tuple(a.shape[2:])} pixels inside the border are fewer than the "
            f"{SSIM_WINDOW}x{SSIM_WINDOW} window"
        )
    _, full = structural_similarity_index_measure(
        a, b, kernel_size=SSIM_WINDOW, sigma=SSIM_SIGMA, data_range=PEAK, return_full_image=True
    )
    # torchmetrics pads before filtering; the published numbers use whole windows only.
    edge = SSIM_WINDOW // 2
    return float(full[..., edge:-edge, edge:-edge].mean())


def ssim_volume(image: Pixels, truth: Pixels) -> float:
    """Structural similarity of (H, W, C) as MATLAB's `ssim` sees it: one volume, edges repeated.

    The SIDD numbers are made that way: the window is 11x11x11 and the mean is over all pixels.

    Raises:
        ConfigError: the images differ in shape.
    """
    from scipy.ndimage import gaussian_filter

    a, b = (_scaled(x) for x in _same_shape(image, truth))

    def smooth(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        radius = SSIM_WINDOW // 2
        filtered: npt.NDArray[np.float64] = gaussian_filter(
            x, SSIM_SIGMA, mode="nearest", radius=radius
        )
        return filtered

    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    mean_a, mean_b = smooth(a), smooth(b)
    spread = smooth(a * a) - mean_a**2 + smooth(b * b) - mean_b**2
    both = smooth(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (spread + c2))).mean())


def score(image: Pixels, truth: Pixels, convention: Convention) -> tuple[float, float]:
    """PSNR and SSIM of one image under a convention; rounding is the caller's."""
    channel, border = convention.channel, convention.border
    decibel = psnr(image, truth, channel=channel, border=border)
    if convention.window == "plane":
        return decibel, ssim(image, truth, channel=channel, border=border)
    window = slice(border, -border or None)
    return decibel, ssim_volume(image[window, window], truth[window, window])


def psnr_y(image: Pixels, truth: Pixels, border: int = 0) -> float:
    """`psnr` on luma, the number of the super-resolution tables."""
    return psnr(image, truth, border=border)


def ssim_y(image: Pixels, truth: Pixels, border: int = 0) -> float:
    """`ssim` on luma, the number of the super-resolution tables."""
    return ssim(image, truth, border=border)


def lpips(image: Pixels, truth: Pixels, network: str = "alex") -> float:
    """Learned perceptual distance of two RGB images (lower is better), where it can be computed.

    Args:
        image: uint8 or float in units of the peak, (H, W, 3); values beyond the peak are clipped.
        truth: the same shape.
        network: one of `PERCEPTUAL`.

    Raises:
        ConfigError: as `check_lpips`, or the images differ in shape or are too small.
    """
    check_lpips(network, image.shape[2])
    if min(image.shape[:2]) < PERCEPTUAL_SIDE:
        raise ConfigError(
            f"lpips: image {image.shape} is smaller than {PERCEPTUAL_SIDE}x{PERCEPTUAL_SIDE}"
        )
    a, b = _planes(image, truth, "rgb", 0)
    # The metric's networks take float32 in [-1, 1].
    a, b = ((2.0 * x.float() / PEAK - 1.0).clamp(-1.0, 1.0) for x in (a, b))
    with torch.inference_mode():
        return float(_perceptual(network)(a, b))


def check_lpips(network: str, channels: int) -> None:
    """Refuse what `lpips` cannot do, before any image is restored.

    Raises:
        ConfigError: unknown network, images that are not RGB, or torchvision is missing.
    """
    if network not in PERCEPTUAL:
        raise ConfigError(f"lpips: network must be one of {PERCEPTUAL}, got {network!r}")
    if channels != 3:
        raise ConfigError(f"lpips: needs RGB images, got {channels} channel(s)")
    if importlib.util.find_spec("torchvision") is None:
        raise ConfigError(
            "lpips: torchmetrics needs torchvision for this, and qmir_ao never installs it because "
            "pip would exchange your torch for another build; install the one made for torch "
            f"{torch.__version__} yourself: pip install torchvision --no-deps (same index as torch)"
        )


@cache
def _perceptual(network: str) -> Any:
    """The metric with its network, loaded once."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type=network)  # type: ignore[arg-type]


def _check_channel(channel: str) -> None:
    if channel not in CHANNELS:
        raise ConfigError(f"metrics: channel must be one of {CHANNELS}, got {channel!r}")


def _same_shape(image: Pixels, truth: Pixels) -> tuple[Pixels, Pixels]:
    if image.shape != truth.shape:
        raise ConfigError(f"metrics: images differ in shape: {image.shape} and {truth.shape}")
    return image, truth


def _scaled(image: Pixels) -> npt.NDArray[np.float64]:
    """Values in units of 1/255 of the peak, float64."""
    if np.issubdtype(image.dtype, np.floating):
        return image.astype(np.float64) * PEAK
    return image.astype(np.float64) * (PEAK / np.iinfo(image.dtype).max)


def _planes(
    image: Pixels, truth: Pixels, channel: str, border: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 (1, C, h, w) of both images: the channel asked for, inside the border."""
    _check_channel(channel)
    pair = _same_shape(image, truth)
    if channel == "grey" and image.shape[2] != 1:
        raise ConfigError(f"metrics: channel 'grey' needs (H, W, 1), got {image.shape}")
    if min(image.shape[:2]) <= 2 * border:
        raise ConfigError(f"metrics: image {image.shape} has nothing inside a border of {border}")
    window = slice(border, -border or None)
    planes = []
    for pixels in pair:
        values = _scaled(pixels)
        if channel == "y" and values.shape[2] == 3:
            values = luma(values)[:, :, None]
        cropped = np.ascontiguousarray(values[window, window].transpose(2, 0, 1))
        planes.append(torch.from_numpy(cropped)[None])
    return planes[0], planes[1]
