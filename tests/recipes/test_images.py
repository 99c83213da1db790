"""Reading and writing images: depths, alpha, palettes, orientation, junk, limits."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from qmir_ao.errors import ConfigError, ImageError
from qmir_ao.recipes.images import (
    Pixels,
    list_images,
    load_image,
    read_image,
    write_image,
)


def picture(h: int = 7, w: int = 5, channels: int = 3, dtype: type = np.uint8) -> Pixels:
    rng = np.random.default_rng(0)
    return rng.integers(0, np.iinfo(dtype).max + 1, (h, w, channels)).astype(dtype)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_come_back_exactly(tmp_path: Path, suffix: str, channels: int) -> None:
    path, pixels = tmp_path / f"a{suffix}", picture(channels=channels)
    write_image(path, pixels)
    np.testing.assert_array_equal(read_image(path, channels), pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_formats_keep_size_and_order(tmp_path: Path, suffix: str) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[..., 0] = 200
    write_image(tmp_path / f"a{suffix}", pixels)
    back = read_image(tmp_path / f"a{suffix}")
    assert back.shape == pixels.shape
    assert np.abs(back.astype(int) - pixels).max() < 12


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_kept_and_scaled(tmp_path: Path, suffix: str, channels: int) -> None:
    path, pixels = tmp_path / f"deep{suffix}", picture(channels=channels, dtype=np.uint16)
    pixels[0, 0] = 65535
    write_image(path, pixels)
    loaded = load_image(path, channels)
    np.testing.assert_array_equal(loaded.pixels, pixels)
    assert loaded.peak == 65535
    expected = np.floor(pixels / 257 + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(read_image(path, channels), expected)


def test_16_bit_alpha_png(tmp_path: Path) -> None:
    pixels, alpha = picture(dtype=np.uint16), picture(channels=1, dtype=np.uint16)[:, :, 0]
    write_image(tmp_path / "a.png", pixels, alpha)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.alpha is not None
    np.testing.assert_array_equal(loaded.pixels, pixels)
    np.testing.assert_array_equal(loaded.alpha, alpha)


def test_grey_is_repeated_and_colour_is_mixed(tmp_path: Path) -> None:
    grey = picture(channels=1)
    write_image(tmp_path / "grey.png", grey)
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), grey.repeat(3, axis=2))
    colour = picture()
    write_image(tmp_path / "colour.png", colour)
    mixed = read_image(tmp_path / "colour.png", 1)[:, :, 0]
    expected = cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY)
    assert np.abs(mixed.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("transparent", [False, True])
def test_palette(tmp_path: Path, transparent: bool) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    extra = {"transparency": 1} if transparent else {}
    image.save(tmp_path / "p.png", **extra)
    loaded = load_image(tmp_path / "p.png")
    expected = [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]]
    np.testing.assert_array_equal(loaded.pixels, expected)
    if transparent:
        np.testing.assert_array_equal(loaded.alpha, [[255, 0], [255, 0]])
    else:
        assert loaded.alpha is None


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_split_off(tmp_path: Path, mode: str) -> None:
    pixels = picture(channels=len(mode))
    Image.fromarray(pixels, mode).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 1 if mode == "LA" else 3)
    np.testing.assert_array_equal(loaded.pixels, pixels[:, :, :-1])
    np.testing.assert_array_equal(loaded.alpha, pixels[:, :, -1])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[:, :, 0], pixels[:, :, 0])


def test_two_level_and_cmyk_images(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bw.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bw.png", 1)[..., 0], [[255, 0]])
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "c.jpg", quality=100)
    cyan = read_image(tmp_path / "c.jpg")[4, 4]
    assert cyan[0] < 5 and cyan[1] > 250 and cyan[2] > 250


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_exif_orientation(tmp_path: Path, orientation: int, dtype: type) -> None:
    upright = picture(6, 4, dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    if dtype == np.uint8:
        Image.fromarray(upright).save(tmp_path / "o.png", exif=exif)
        stored = upright
    else:
        stored = upright.astype(np.uint16) * 257
        write_image(tmp_path / "o.png", stored)
        _insert_exif(tmp_path / "o.png", exif.tobytes())
    with Image.open(tmp_path / "o.png") as image:
        from PIL import ImageOps

        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "o.png"), expected)


def _insert_exif(path: Path, exif: bytes) -> None:
    """Put an eXIf chunk in front of the first IDAT chunk of a PNG."""
    data, body = path.read_bytes(), exif.removeprefix(b"Exif\x00\x00")
    chunk = b"eXIf" + body
    whole = struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    at = data.index(b"IDAT") - 4
    path.write_bytes(data[:at] + whole + data[at:])


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(40, 40)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"])
def test_truncated_files_are_refused(tmp_path: Path, kind: str) -> None:
    data, path = encoded(kind), tmp_path / f"cut.{kind.lower()}"
    for share in (0.02, 0.3, 0.8):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageError, match="cut"):
            read_image(path)


def test_truncated_16_bit_png_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "deep.png", picture(40, 40, dtype=np.uint16))
    data = (tmp_path / "deep.png").read_bytes()
    (tmp_path / "deep.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"deep\.png"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes"),
        (b"hello, this is text", "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read"),
    ],
    ids=["empty", "text", "postscript", "png magic"],
)
def test_junk_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        read_image(tmp_path / "x.png")


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="not a folder"):
        list_images(tmp_path / "absent")
    with pytest.raises(ImageError, match="holds no images"):
        list_images(tmp_path)


def test_32_bit_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ImageError, match="32 bits"):
        read_image(tmp_path / "f.tiff")


@pytest.mark.parametrize("size", [(9, 9), (20_000, 20_000), (2_000_000, 2_000_000)])
def test_pixel_limit_is_checked_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    if size == (9, 9):
        monkeypatch.setenv("QMIR_MAX_PIXELS", "80")
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"QMIR_MAX_PIXELS|bomb"):
        read_image(tmp_path / "bomb.png")


def test_pixel_limit_must_be_a_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", picture())
    monkeypatch.setenv("QMIR_MAX_PIXELS", "many")
    with pytest.raises(ConfigError, match="'many'"):
        read_image(tmp_path / "a.png")


def test_mutated_files_give_pixels_or_one_error(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(1), tmp_path / "m.png"
    seen = 0
    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP"):
        original = encoded(kind)
        for _ in range(60):
            data = bytearray(original)
            for position in rng.integers(0, min(len(data), 600), 3):
                data[position] = rng.integers(256)
            path.write_bytes(data)
            try:
                assert read_image(path).dtype == np.uint8
            except ImageError:
                seen += 1
    assert seen > 0


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot write .\.gif."):
        write_image(tmp_path / "a.gif", picture())
    with pytest.raises(ImageError, match="uint8 or uint16"):
        write_image(tmp_path / "a.png", picture().astype(np.float32))
    with pytest.raises(ImageError, match="cannot be written"):
        write_image(tmp_path / "absent" / "a.png", picture())
    assert list(tmp_path.iterdir()) == []
