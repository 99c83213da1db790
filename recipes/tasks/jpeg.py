"""Removal of JPEG artifacts from grey images, under the two published protocols."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from qmir_ao.errors import ConfigError, ImageError
from qmir_ao.recipes.images import Pixels, read_image
from qmir_ao.recipes.metrics import Convention, luma
from qmir_ao.recipes.tasks.base import Task, one_of

PROTOCOLS = ("swinir", "mambair")
ENCODERS = ("opencv", "pillow")


@dataclass(frozen=True)
class JpegArtifacts(Task):
    """Restore compressed grey images; nothing is cropped.

    The protocols differ for colour files only: "swinir" takes the BT.601 studio luma, rounded to 8
    bits (MATLAB's `rgb2ycbcr`), and compresses that; "mambair" takes OpenCV's full-range grey and
    expects compressed files made beforehand (give their folder; without one, the grey image is
    compressed here). Numbers on LIVE1 from the two protocols must not be compared.

    Args:
        quality: 1 to 100; 10, 20, 30 and 40 are published.
        protocol: "swinir" or "mambair".
        encoder: "opencv" or "pillow". Both are libjpeg, as MATLAB's encoder is: grey images come
            out equal unless the libraries were built with different transforms.

    Raises:
        ConfigError: a setting out of range.
    """

    name: ClassVar[str] = "jpeg"
    channels: ClassVar[int] = 1
    loss: ClassVar[str] = "charbonnier"

    quality: int = 10
    protocol: str = "swinir"
    encoder: str = "opencv"

    def __post_init__(self) -> None:
        """Check the settings."""
        if type(self.quality) is not int or not 1 <= self.quality <= 100:
            raise ConfigError(
                f"task {self.name}: quality must be a whole number from 1 to 100, "
                f"got {self.quality!r}"
            )
        one_of(self.name, "protocol", self.protocol, PROTOCOLS)
        one_of(self.name, "encoder", self.encoder, ENCODERS)

    @property
    def title(self) -> str:
        """Name, quality and protocol."""
        return f"JPEG artifacts, quality {self.quality} ({self.protocol} protocol)"

    @property
    def convention(self) -> Convention:
        """PSNR and SSIM on the grey image."""
        return Convention("grey")

    def read(self, path: Path) -> Pixels:
        """Grey ground truth by the protocol's formula."""
        if self.protocol == "mambair":
            return self._grey(path)
        color = read_image(path, 3)
        if is_grey(path):
            # Taken as it is: its luma would be squeezed to 16..235.
            return np.ascontiguousarray(color[:, :, :1])
        # MATLAB and the published code round luma to the nearest level.
        return np.rint(luma(color)).astype(np.uint8)[:, :, None]

    def read_input(self, path: Path) -> Pixels:
        """Compressed file, read as grey by OpenCV as published."""
        return self._grey(path)

    def degrade(self, truth: Pixels) -> Pixels:
        """Compress and decode."""
        grey = np.ascontiguousarray(truth[:, :, 0])
        coded = _opencv if self.encoder == "opencv" else _pillow
        return coded(grey, self.quality)[:, :, None]

    def _grey(self, path: Path) -> Pixels:
        import cv2

        # First through our own reader: it refuses what is too large or no image.
        read_image(path, 1)
        data = np.frombuffer(Path(path).read_bytes(), np.uint8)
        grey: Pixels | None = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
        if grey is None:
            raise ImageError(f"{path}: OpenCV cannot decode it; save it as PNG or JPEG")
        return grey[:, :, None]


def is_grey(path: Path) -> bool:
    """Whether a file stores one channel of colour, by its header."""
    from PIL import Image

    with Image.open(path) as image:
        return image.mode in ("1", "L", "LA", "I;16", "I;16B", "I;16L")


def _opencv(grey: Pixels, quality: int) -> Pixels:
    import cv2

    done, data = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ImageError(f"jpeg: OpenCV cannot compress an image of shape {grey.shape}")
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE))


def _pillow(grey: Pixels, quality: int) -> Pixels:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream)).copy()
