"""Arrays of pixels (H, W, C): to tensors and back, and MATLAB's bicubic resizing."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.images import Pixels

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


def bicubic_upscale(image: Pixels, scale: int) -> Pixels:
    """Enlarge uint8 (H, W, C) by bicubic interpolation with MATLAB's kernel (a = -0.5)."""
    x = to_tensor(image).to(torch.float64)[None]
    size = (image.shape[0] * scale, image.shape[1] * scale)
    # Only the antialiased form uses a = -0.5; when enlarging it is plain bicubic.
    y = F.interpolate(x, size, mode="bicubic", antialias=True)
    return to_pixels(y[0])


def to_float(pixels: Pixels) -> Pixels:
    """uint8 or uint16 pixels to float32 in [0, 1]; float32 pixels as they are."""
    if np.issubdtype(pixels.dtype, np.floating):
        return pixels.astype(np.float32, copy=False)
    peak = np.iinfo(pixels.dtype).max
    return pixels.astype(np.float32) / np.float32(peak)


def to_tensor(pixels: Pixels) -> Tensor:
    """(H, W, C) pixels to a float32 tensor (C, H, W); see `to_float` for the range."""
    return torch.from_numpy(np.ascontiguousarray(to_float(pixels).transpose(2, 0, 1)))


def to_pixels(image: Tensor, dtype: type = np.uint8) -> Pixels:
    """Float (C, H, W), clamped to [0, 1], to (H, W, C): uint8 or uint16 rounded, or float32."""
    values = image.detach().to("cpu", torch.float64).clamp(0, 1)
    if not np.issubdtype(dtype, np.floating):
        values = values.mul(np.iinfo(dtype).max).round()
    return np.ascontiguousarray(values.permute(1, 2, 0).numpy().astype(dtype))
