"""Tiles, files, folders and scores of restoration."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qmir_ao.errors import ConfigError, ImageError, NonFiniteError
from qmir_ao.recipes.data import bicubic_downscale
from qmir_ao.recipes.evaluate import bicubic_upscale, evaluate
from qmir_ao.recipes.images import Pixels, load_image, read_image, write_image
from qmir_ao.recipes.metrics import psnr_y
from qmir_ao.recipes.restore import restore, restore_pixels, sections


class Repeat(nn.Module):
    """Enlarge by repeating pixels; notes the shapes it saw and whether it was training."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.seen: list[tuple[int, ...]] = []
        self.trained = False

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        self.trained |= self.training
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


class Blur(nn.Module):
    """A 3x3 mean: its context must come from the neighbouring tile."""

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (1, 1, 1, 1), "reflect")
        return nn.functional.avg_pool2d(padded, 3, 1)


def picture(h: int, w: int, channels: int = 3, dtype: type = np.uint8) -> Pixels:
    rng = np.random.default_rng(0)
    return rng.integers(0, np.iinfo(dtype).max + 1, (h, w, channels)).astype(dtype)


def repeated(pixels: Pixels, scale: int = 2) -> Pixels:
    return pixels.repeat(scale, 0).repeat(scale, 1)


@pytest.mark.parametrize("length", [1, 199, 200, 201, 399, 400, 997])
def test_sections_are_the_published_ones(length: int) -> None:
    parts, pad = sections(length, 200)
    count = length // 200 + 1
    assert len(parts) == count and (length + pad) % count == 0 and pad < count
    size = (length + pad) // count
    assert [part.core.start for part in parts] == [i * size for i in range(count)]
    assert parts[0].context.start == 0 and parts[-1].context.stop == length + pad
    for left, right in itertools.pairwise(parts):
        assert left.core.stop == right.core.start
        assert left.context.stop - left.core.stop == size // 10
        assert right.core.start - right.context.start == size // 10


@pytest.mark.parametrize("size", [(7, 9), (33, 50), (47, 16), (64, 97)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiles_cover_every_pixel_once(size: tuple[int, int], dtype: type) -> None:
    pixels = picture(*size, dtype=dtype)
    result = restore_pixels(Repeat(), pixels, scale=2, tile=16)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, repeated(pixels))


def test_tiles_see_their_neighbours() -> None:
    pixels = picture(64, 97)
    tiled = restore_pixels(Blur(), pixels, scale=1, tile=32)
    whole = restore_pixels(Blur(), pixels, scale=1, tile=None)
    np.testing.assert_array_equal(tiled[:-1, :-1], whole[:-1, :-1])


def test_small_images_run_whole_and_model_state_comes_back() -> None:
    model = Repeat().train()
    shares: list[float] = []
    restore_pixels(model, picture(15, 31), scale=2, tile=16, progress=shares.append)
    assert model.seen == [(1, 3, 15, 17), (1, 3, 15, 17)]
    assert shares == [0.5, 1.0]
    assert model.training and not model.trained


def test_wrong_scale_and_tile_are_refused() -> None:
    with pytest.raises(ConfigError, match="give the scale"):
        restore_pixels(Repeat(2), picture(8, 8), scale=3)
    with pytest.raises(ConfigError, match="tile must be at least 16"):
        restore_pixels(Repeat(2), picture(8, 8), scale=2, tile=4)


def test_file_to_file_and_to_folder(tmp_path: Path) -> None:
    pixels = picture(9, 11)
    write_image(tmp_path / "a.bmp", pixels)
    report = restore(Repeat(), tmp_path / "a.bmp", tmp_path / "b.tif", scale=2)
    assert report.written == [tmp_path / "b.tif"] and not report.failed
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif"), repeated(pixels))
    report = restore(Repeat(), tmp_path / "a.bmp", tmp_path / "new" / "out", scale=2)
    assert report.written == [tmp_path / "new" / "out" / "a.png"]
    np.testing.assert_array_equal(read_image(report.written[0]), repeated(pixels))


def test_16_bits_and_alpha_are_kept(tmp_path: Path) -> None:
    pixels, alpha = picture(8, 8, dtype=np.uint16), np.full((8, 8), 30000, np.uint16)
    write_image(tmp_path / "a.png", pixels, alpha)
    restore(Repeat(), tmp_path / "a.png", tmp_path / "b.png", scale=2)
    loaded = load_image(tmp_path / "b.png")
    np.testing.assert_array_equal(loaded.pixels, repeated(pixels))
    np.testing.assert_array_equal(loaded.alpha, np.full((16, 16), 30000))


def test_grey_network(tmp_path: Path) -> None:
    pixels = picture(8, 9, channels=1)
    write_image(tmp_path / "g.png", pixels)
    model = Repeat(1)
    restore(model, tmp_path / "g.png", tmp_path / "h.png", scale=1, channels=1)
    assert model.seen == [(1, 1, 8, 9)]
    np.testing.assert_array_equal(read_image(tmp_path / "h.png", 1), pixels)


def test_one_bad_file_does_not_stop_a_folder(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    write_image(source / "a.png", picture(8, 8))
    (source / "b.png").write_bytes(b"")
    (source / "c.png").write_bytes((source / "a.png").read_bytes()[:90])
    write_image(source / "d.jpg", picture(8, 8))
    (source / "notes.txt").write_text("no image")
    told: list[tuple[float, int, str]] = []
    report = restore(
        Repeat(),
        source,
        target,
        scale=2,
        progress=lambda done, total, name: told.append((done, total, name)),
    )
    assert [path.name for path in report.written] == ["a.png", "d.png"]
    assert {path.name for path in report.failed} == {"b.png", "c.png"}
    assert "0 bytes" in report.failed[source / "b.png"]
    assert sorted(os.listdir(target)) == ["a.png", "d.png"]
    assert told[-1] == (4.0, 4, "d.jpg")


def test_a_network_error_is_a_failure_of_that_file(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise NonFiniteError("qmir::dls_qparams: sample 0 holds NaN")

    write_image(tmp_path / "a.png", picture(8, 8))
    report = restore(Broken(), tmp_path / "a.png", tmp_path / "b.png", scale=2)
    assert "holds NaN" in report.failed[tmp_path / "a.png"]
    assert not (tmp_path / "b.png").exists()


def test_names_that_differ_in_suffix_only_stay_apart(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a.png", "a.bmp"):
        write_image(source / name, picture(8, 8))
    report = restore(Repeat(), source, tmp_path / "out", scale=2)
    assert sorted(path.name for path in report.written) == ["a.bmp.png", "a.png"]


def test_input_is_never_overwritten(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", picture(8, 8))
    before = (tmp_path / "a.png").read_bytes()
    for target in (tmp_path / "a.png", tmp_path):
        with pytest.raises(ConfigError, match="overwrite its input"):
            restore(Repeat(), tmp_path / "a.png", target, scale=2)
    with pytest.raises(ConfigError, match="overwrite its input"):
        restore(Repeat(), tmp_path, tmp_path, scale=2)
    assert (tmp_path / "a.png").read_bytes() == before


def test_missing_source_is_reported(tmp_path: Path) -> None:
    report = restore(Repeat(), tmp_path / "absent.png", tmp_path / "b.png", scale=2)
    assert "no such file" in report.failed[tmp_path / "absent.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no images"):
        restore(Repeat(), tmp_path / "empty", tmp_path / "out", scale=2)


def smooth(h: int, w: int) -> Pixels:
    y, x = np.mgrid[:h, :w]
    waves = np.stack([np.sin(x / 5), np.cos(y / 7), np.sin((x + y) / 9)], axis=2)
    return (127 + 100 * waves).astype(np.uint8)


def test_evaluate_scores_each_image_and_the_mean(tmp_path: Path) -> None:
    for index, size in enumerate([(41, 50), (32, 33)]):
        write_image(tmp_path / f"{index}.png", smooth(*size))
    told: list[tuple[int, int]] = []
    scores = evaluate(Repeat(), tmp_path, scale=2, progress=lambda *step: told.append(step))
    first = smooth(41, 50)[:40]
    low = bicubic_downscale(first, 2)
    assert scores.images[0].psnr == psnr_y(repeated(low), first, 2)
    assert scores.images[0].baseline_psnr == psnr_y(bicubic_upscale(low, 2), first, 2)
    assert scores.images[0].baseline_psnr > scores.images[0].psnr
    both = [image.psnr for image in scores.images]
    assert scores.mean("psnr") == pytest.approx(sum(both) / 2)
    document = scores.to_dict()
    assert document["mean"]["psnr"] == scores.mean("psnr")
    assert [image["name"] for image in document["images"]] == ["0.png", "1.png"]
    assert told == [(1, 2), (2, 2)]


def test_evaluate_takes_given_inputs(tmp_path: Path) -> None:
    high, low = tmp_path / "high", tmp_path / "low"
    high.mkdir()
    low.mkdir()
    write_image(high / "a.png", smooth(32, 40))
    write_image(low / "other.png", smooth(16, 20))
    with pytest.raises(ImageError, match=r"holds no input for 1 of 1 images.*a\.png"):
        evaluate(Repeat(), high, scale=2, low_folder=low)
    write_image(low / "ax2.png", bicubic_downscale(smooth(32, 40), 2))
    given = evaluate(Repeat(), high, scale=2, low_folder=low)
    assert given == evaluate(Repeat(), high, scale=2)
    write_image(low / "ax2.png", smooth(8, 8))
    with pytest.raises(ImageError, match="do not match"):
        evaluate(Repeat(), high, scale=2, low_folder=low)
    with pytest.raises(ConfigError, match="at least 2"):
        evaluate(Repeat(), high, scale=1)


def test_bicubic_upscale_keeps_constants_and_lines() -> None:
    assert (bicubic_upscale(np.full((5, 6, 3), 91, np.uint8), 2) == 91).all()
    ramp = np.broadcast_to(np.arange(0, 160, 8, np.uint8)[None, :, None], (6, 20, 3))
    up = bicubic_upscale(np.ascontiguousarray(ramp), 2)[0, 6:-6, 0].astype(int)
    np.testing.assert_array_equal(np.diff(up), 4)


def test_evaluation_leaves_no_graph_behind(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", smooth(32, 32))
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))
    evaluate(model, tmp_path, scale=2)
    model(torch.rand(1, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
