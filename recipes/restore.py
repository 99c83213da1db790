"""Restore images with a network: a file or a folder, in tiles where they are large.

Tiling is the published one: sections of about `tile` pixels, each run with a tenth of a section
more context on its inner sides, pasted without blending. Quantizers with dynamic ranges see one
tile at a time, so another tile size gives slightly different pixels.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from qmir_ao.errors import ConfigError, NonFiniteError, QmirError
from qmir_ao.recipes import distributed
from qmir_ao.recipes.data import to_pixels, to_tensor
from qmir_ao.recipes.images import (
    WRITABLE,
    LoadedImage,
    Pixels,
    list_images,
    load_image,
    write_image,
)

TILE = 200
"""Published section length; shorter images run whole."""
MIN_TILE = 16


@dataclass(frozen=True)
class Section:
    """One tile along one axis: `core` is kept, `context` (its superset) is computed."""

    core: slice
    context: slice


@dataclass
class RestoreReport:
    """Files written, and files that failed with their reasons."""

    written: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)


def sections(length: int, tile: int) -> tuple[list[Section], int]:
    """Split an axis as published.

    Args:
        length: pixels along the axis.
        tile: sections are about this long.

    Returns:
        The sections, and how many pixels the axis must be padded by at its end.
    """
    count = length // tile + 1
    pad = -length % count
    size = (length + pad) // count
    shave = size // 10
    parts = []
    for index in range(count):
        low, high = index * size, (index + 1) * size
        first, last = index == 0, index == count - 1
        context = slice(low if first else low - shave, high if last else high + shave)
        parts.append(Section(slice(low, high), context))
    return parts, pad


def restore_pixels(
    model: nn.Module,
    pixels: Pixels,
    *,
    scale: int,
    tile: int | None = TILE,
    progress: Callable[[float], None] | None = None,
) -> Pixels:
    """Run a network over one image.

    Args:
        model: network from (1, C, h, w) to (1, C, scale*h, scale*w), values in [0, 1].
        pixels: uint8 or uint16 (H, W, C).
        scale: factor of the network.
        tile: section length, or None to run the image whole.
        progress: called with the finished share after each tile.

    Returns:
        Pixels of the same type, (scale*H, scale*W, C).

    Raises:
        ConfigError: tile is too small, or the network's output has another size.
        NonFiniteError: the network's output holds NaN or infinity.
    """
    if tile is not None and tile < MIN_TILE:
        raise ConfigError(f"restore: tile must be at least {MIN_TILE} pixels or None, got {tile}")
    h, w, channels = pixels.shape
    rows, pad_h = sections(h, tile or h + 1)
    columns, pad_w = sections(w, tile or w + 1)
    padded = np.pad(pixels, ((0, pad_h), (0, pad_w), (0, 0)), mode="reflect")
    size = (padded.shape[0] * scale, padded.shape[1] * scale, channels)
    result = np.empty(size, pixels.dtype)
    training = model.training
    model.eval()
    try:
        for done, (row, column) in enumerate(_grid(rows, columns), start=1):
            part = _run(model, padded[row.context, column.context], scale)
            result[_scaled(row.core, scale), _scaled(column.core, scale)] = part[
                _scaled(_inner(row), scale), _scaled(_inner(column), scale)
            ]
            if progress is not None:
                progress(done / (len(rows) * len(columns)))
    finally:
        if training:
            model.train()
    return np.ascontiguousarray(result[: h * scale, : w * scale])


def _grid(rows: list[Section], columns: list[Section]) -> Iterator[tuple[Section, Section]]:
    return ((row, column) for row in rows for column in columns)


def _scaled(part: slice, scale: int) -> slice:
    return slice(part.start * scale, part.stop * scale)


def _inner(section: Section) -> slice:
    start = section.core.start - section.context.start
    return slice(start, start + section.core.stop - section.core.start)


def _run(model: nn.Module, pixels: Pixels, scale: int) -> Pixels:
    with torch.no_grad():
        y = model(to_tensor(pixels)[None])
    expected = (1, pixels.shape[2], pixels.shape[0] * scale, pixels.shape[1] * scale)
    if tuple(y.shape) != expected:
        raise ConfigError(
            f"restore: the network returned {tuple(y.shape)}, expected {expected} at scale "
            f"{scale}; give the scale the network was made for"
        )
    if not bool(torch.isfinite(y).all()):
        raise NonFiniteError(
            "restore: the network's output holds NaN or infinity, which is no image; its weights "
            "come from a training that diverged or are damaged, take others"
        )
    return to_pixels(y[0], pixels.dtype.type)


def restore(
    model: nn.Module,
    source: Path,
    target: Path,
    *,
    scale: int,
    channels: int = 3,
    tile: int | None = TILE,
    progress: Callable[[float, int, str], None] | None = None,
) -> RestoreReport:
    """Restore a file or every image of a folder; a bad file does not stop the others.

    16-bit images stay 16-bit and alpha is enlarged by bicubic interpolation where the target
    format holds them. Each file appears under its name only when it is complete. Under `torchrun`
    the ranks share the files, and every rank gets the whole report.

    Args:
        model: float or lowered network; see `restore_pixels`.
        source: image file, or folder with images.
        target: file to write if `source` is a file and this has an image suffix; otherwise a
            folder, made if missing, that gets PNG files.
        scale: factor of the network.
        channels: 3 for RGB networks, 1 for grey ones.
        tile: section length, or None to run images whole.
        progress: called with (files done, files, name) of this rank; the first number counts tiles
            too.

    Returns:
        What was written and what failed; callers should exit non-zero if anything failed.

    Raises:
        ConfigError: target equals source, or a wrong tile.
        ImageError: the source is a folder without images.
    """
    source, target = Path(source), Path(target)
    jobs = distributed.shard(_plan(source, target))
    failures: list[str | None] = []
    for index, (path, out) in enumerate(jobs):

        def tell(share: float, index: int = index, name: str = path.name) -> None:
            if progress is not None:
                progress(index + share, len(jobs), name)

        try:
            image = load_image(path, channels)
            restored = restore_pixels(model, image.pixels, scale=scale, tile=tile, progress=tell)
            write_image(out, restored, _alpha(image, scale))
            failures.append(None)
        except ConfigError:
            raise
        except (QmirError, OSError) as error:
            failures.append(str(error))
            tell(1.0)
    report = RestoreReport()
    outcomes = [(*job, failure) for job, failure in zip(jobs, failures, strict=True)]
    for path, out, failure in distributed.gather(outcomes):
        if failure is None:
            report.written.append(out)
        else:
            report.failed[path] = failure
    return report


def _plan(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Pairs of input and output file; makes the target folder."""
    if not source.is_dir():
        as_file = target.suffix.lower() in WRITABLE and not target.is_dir()
        out = target if as_file else target / f"{source.stem}.png"
        jobs = [(source, out)]
    else:
        paths = list_images(source)
        stems = [path.stem for path in paths]
        # a.jpg and a.png of one folder must not become the same a.png
        names = [p.name if stems.count(p.stem) > 1 else p.stem for p in paths]
        jobs = [
            (path, target / f"{name.removesuffix('.png')}.png")
            for path, name in zip(paths, names, strict=True)
        ]
    for path, out in jobs:
        if os.path.realpath(path) == os.path.realpath(out):
            raise ConfigError(f"restore: {out} would overwrite its input; give another target")
    jobs[0][1].parent.mkdir(parents=True, exist_ok=True)
    return jobs


def _alpha(image: LoadedImage, scale: int) -> Pixels | None:
    if image.alpha is None or scale == 1:
        return image.alpha
    x = to_tensor(image.alpha[:, :, None]).to(torch.float64)[None]
    size = (image.alpha.shape[0] * scale, image.alpha.shape[1] * scale)
    y = F.interpolate(x, size, mode="bicubic", antialias=True)
    return to_pixels(y[0], image.alpha.dtype.type)[:, :, 0]
