"""Read and write image files safely: limits before decoding, one error class, atomic writes.

Arrays are (H, W, C) with RGB order; uint8, or uint16 where a file has 16 bits per channel.
"""

import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qmir_ao.errors import ConfigError, ImageError, QmirError

Pixels = npt.NDArray[Any]

MAX_PIXELS = 64_000_000
"""Default of the environment variable QMIR_MAX_PIXELS."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
WRITABLE = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
ALPHA_SUFFIXES = (".png", ".tif", ".tiff", ".webp")
DEEP_SUFFIXES = (".png", ".tif", ".tiff")
"""Formats that hold 16 bits per channel."""
JPEG_QUALITY = 95
# Only plain raster decoders: Pillow also knows formats that start other programs (EPS).
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
_TIFF_BITS, _ORIENTATION = 258, 0x0112


@dataclass(frozen=True)
class LoadedImage:
    """Decoded image: `pixels` (H, W, 1 or 3) and `alpha` (H, W) or None, uint8 or uint16."""

    pixels: Pixels
    alpha: Pixels | None

    @property
    def peak(self) -> int:
        """Largest value: 255 or 65535."""
        return int(np.iinfo(self.pixels.dtype).max)


def pixel_limit() -> int:
    """Largest number of pixels that is decoded: `$QMIR_MAX_PIXELS`, default 64 million."""
    text = os.environ.get("QMIR_MAX_PIXELS", str(MAX_PIXELS))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"QMIR_MAX_PIXELS must be a positive whole number, got {text!r}")
    return int(text)


def list_images(folder: Path) -> list[Path]:
    """Image files directly in `folder` (by suffix), sorted by name.

    Raises:
        ImageError: not a folder, or no image in it.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder}: not a folder; give a folder with images ({_suffixes()})")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise ImageError(f"{folder}: holds no images; known suffixes are {_suffixes()}")
    return found


def read_image(path: Path, channels: int = 3) -> Pixels:
    """Read a file as uint8 (H, W, channels); alpha is dropped, 16 bits are scaled to 8.

    Args:
        path: image file.
        channels: 3 for RGB (grey is repeated), 1 for grey (colour is converted, BT.601).

    Raises:
        ImageError: missing, empty, truncated, not an image, or over the pixel limit.
    """
    pixels = load_image(path, channels).pixels
    if pixels.dtype == np.uint16:
        # 65535 = 255 * 257: this keeps black, white and every 8-bit level exactly.
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return pixels


def load_image(path: Path, channels: int = 3) -> LoadedImage:
    """Read a file with its depth and alpha; see `read_image` for arguments and errors.

    The EXIF orientation is applied, palettes are expanded, CMYK becomes RGB, and of an animation
    the first frame is taken.
    """
    path = Path(path)
    try:
        raw = _decode(path)
    except QmirError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError...
        raise ImageError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); "
            f"it must be a complete image file ({_suffixes()})"
        ) from error
    return _split(raw, channels)


def _decode(path: Path) -> Pixels:
    from PIL import Image

    if not path.is_file():
        raise ImageError(f"{path}: no such file")
    size = path.stat().st_size
    if size == 0:
        raise ImageError(f"{path}: the file is empty (0 bytes)")
    with warnings.catch_warnings():
        # Our own limit decides; Pillow's lower warning threshold would only add noise.
        warnings.simplefilter("ignore")
        with Image.open(path, formats=_FORMATS) as image:
            limit = pixel_limit()
            if image.width * image.height > limit:
                raise ImageError(
                    f"{path}: {image.width}x{image.height} pixels are more than the limit of "
                    f"{limit}; set QMIR_MAX_PIXELS to allow it"
                )
            image.load()
            turned = int(image.getexif().get(_ORIENTATION, 1) or 1)
            if _is_deep(image, path):
                return _turn(_decode_deep(path), turned)
            if image.mode in ("I", "F"):
                raise ImageError(
                    f"{path}: pixel type {image.mode!r} (32 bits) is not supported; "
                    "save it with 8 or 16 bits per channel"
                )
            return _turn(np.asarray(image.convert(_target_mode(image))), turned)


def _target_mode(image: Any) -> str:
    has_alpha = image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info
    if image.mode in ("1", "L", "LA"):
        return "LA" if has_alpha else "L"
    return "RGBA" if has_alpha else "RGB"


def _is_deep(image: Any, path: Path) -> bool:
    if image.mode.startswith("I;16"):
        return True
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24] == 16
    if image.format == "TIFF":
        bits = image.tag_v2.get(_TIFF_BITS, 8)
        return 16 in (bits if isinstance(bits, tuple) else (bits,))
    return False


def _decode_deep(path: Path) -> Pixels:
    """Decode 16 bits per channel with OpenCV: Pillow would cut them to 8."""
    import cv2

    data = np.frombuffer(path.read_bytes(), np.uint8)
    flags = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(data, flags)
    if pixels is None or pixels.dtype != np.uint16:
        raise ImageError(f"{path}: its 16-bit pixels cannot be decoded; save it as PNG")
    if pixels.ndim == 3 and pixels.shape[2] >= 3:
        order = [2, 1, 0, 3][: pixels.shape[2]]
        pixels = pixels[:, :, order]
    return pixels


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """Apply EXIF orientation 1..8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _split(raw: Pixels, channels: int) -> LoadedImage:
    if raw.ndim == 2:
        raw = raw[:, :, None]
    alpha = np.ascontiguousarray(raw[:, :, -1]) if raw.shape[2] in (2, 4) else None
    color = raw[:, :, : 1 if raw.shape[2] < 3 else 3]
    if channels == 3 and color.shape[2] == 1:
        color = np.repeat(color, 3, axis=2)
    elif channels == 1 and color.shape[2] == 3:
        grey = color.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
        color = np.floor(grey + 0.5).astype(raw.dtype)[:, :, None]
    return LoadedImage(np.ascontiguousarray(color), alpha)


def write_image(path: Path, pixels: Pixels, alpha: Pixels | None = None) -> None:
    """Write uint8 or uint16 pixels (H, W, 1 or 3) atomically; the suffix selects the format.

    16 bits are kept in PNG and TIFF and scaled to 8 elsewhere; alpha (H, W) is kept in PNG, TIFF
    and WebP and dropped elsewhere.

    Raises:
        ImageError: unknown suffix, wrong array, or the folder cannot be written.
    """
    import cv2

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in WRITABLE:
        raise ImageError(f"{path}: cannot write {suffix or 'no suffix'!r}; use {WRITABLE}")
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim != 3:
        raise ImageError(
            f"{path}: pixels must be uint8 or uint16 (H, W, C), got {pixels.dtype} {pixels.shape}"
        )
    layers = [pixels[:, :, ::-1]]
    if alpha is not None and suffix in ALPHA_SUFFIXES:
        colors = np.repeat(layers[0], 3, axis=2) if pixels.shape[2] == 1 else layers[0]
        layers = [colors, alpha.astype(pixels.dtype)[:, :, None]]
    stacked = np.ascontiguousarray(np.concatenate(layers, axis=2))
    if stacked.dtype == np.uint16 and suffix not in DEEP_SUFFIXES:
        stacked = ((stacked.astype(np.uint32) + 128) // 257).astype(np.uint8)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if suffix in (".jpg", ".jpeg") else []
    done, data = cv2.imencode(suffix, stacked, options)
    if not done:
        raise ImageError(f"{path}: {suffix} cannot hold {stacked.dtype} {stacked.shape}")
    try:
        atomic_write(path, data.tobytes())
    except OSError as error:
        raise ImageError(f"{path}: cannot be written ({error})") from error


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that its final name never shows half of it (also after a power cut).

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o666 & ~_umask())
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _suffixes() -> str:
    return ", ".join(SUFFIXES)
