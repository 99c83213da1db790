"""The benchmark downscaler and the training patches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.paths import DATA, needs_data

from qmir_ao.errors import ConfigError, ImageError
from qmir_ao.recipes.data import (
    PatchDataset,
    bicubic_downscale,
    crop_to_multiple,
    to_pixels,
    to_tensor,
)
from qmir_ao.recipes.images import Pixels, read_image, write_image
from qmir_ao.recipes.tasks import (
    GaussianDenoising,
    JpegArtifacts,
    RealDenoising,
    SuperResolution,
    Task,
)

SET5 = ("baby", "bird", "butterfly", "head", "woman")


def picture(h: int, w: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def kernel(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0))


def matlab_rows(image: np.ndarray, scale: int) -> np.ndarray:
    """`imresize` of the first axis, written from its definition in float64."""
    length = image.shape[0]
    out = []
    for row in range(length // scale):
        center = (row + 0.5) * scale - 0.5
        taps = np.arange(int(np.floor(center)) - 2 * scale - 1, int(center) + 2 * scale + 3)
        weight = kernel((taps - center) / scale)
        weight /= weight.sum()
        mirrored = np.abs(taps + 0.5) - 0.5
        mirrored = length - 0.5 - np.abs(length - 0.5 - mirrored)
        out.append(np.tensordot(weight, image[mirrored.astype(int)].astype(float), 1))
    return np.clip(np.floor(np.stack(out) + 0.5), 0, 255)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_downscale_follows_the_definition(scale: int) -> None:
    image = picture(12 * scale, 10 * scale)
    rows = matlab_rows(image, scale)
    expected = matlab_rows(rows.swapaxes(0, 1), scale).swapaxes(0, 1)
    difference = np.abs(bicubic_downscale(image, scale).astype(int) - expected)
    # Two float64 sums may fall on both sides of a half.
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@needs_data
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_downscale_equals_the_shipped_files(scale: int) -> None:
    for name in SET5:
        high = read_image(DATA / "sets/Set5/HR" / f"{name}.png")
        low = read_image(DATA / f"sets/Set5/LR_bicubic/X{scale}/{name}x{scale}.png")
        np.testing.assert_array_equal(bicubic_downscale(high, scale), low)


def test_downscale_keeps_constants_and_cuts_to_multiples() -> None:
    image = np.full((11, 8, 3), 77, np.uint8)
    low = bicubic_downscale(image, 3)
    assert low.shape == (3, 2, 3) and (low == 77).all()
    assert crop_to_multiple(image, 3).shape == (9, 6, 3)


def test_downscale_refuses_a_tiny_image() -> None:
    with pytest.raises(ConfigError, match="smaller than scale"):
        bicubic_downscale(picture(2, 9), 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pixels_survive_the_round_trip(dtype: type) -> None:
    levels = np.arange(np.iinfo(dtype).max + 1, dtype=np.uint32).astype(dtype)
    image = np.resize(levels, (len(levels) // 4, 4, 1))
    np.testing.assert_array_equal(to_pixels(to_tensor(image), dtype), image)


def test_to_pixels_clamps() -> None:
    x = torch.tensor([-0.5, 0.25, 2.0]).reshape(1, 1, 3)
    np.testing.assert_array_equal(to_pixels(x)[0, :, 0], [0, 64, 255])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, size in enumerate([(40, 50), (33, 34), (20, 60)]):
        write_image(tmp_path / f"{index}.png", picture(*size, seed=index))
    return tmp_path


def test_patches_depend_on_seed_and_index_only(folder: Path) -> None:
    make = lambda seed, length: PatchDataset(  # noqa: E731
        [folder], scale=2, patch=8, length=length, seed=seed
    )
    a, b, other = make(3, 20), make(3, 40), make(4, 20)
    for index in (19, 0, 7):
        assert torch.equal(a[index][1], b[index][1])
    assert any(not torch.equal(a[i][1], other[i][1]) for i in range(20))
    assert len(a) == 20
    with pytest.raises(IndexError):
        a[20]


def test_low_and_high_patch_show_the_same_place(tmp_path: Path) -> None:
    ramp = np.add.outer(np.arange(60), 2 * np.arange(60)).astype(np.uint8)
    write_image(tmp_path / "ramp.png", np.repeat(ramp[:, :, None], 3, axis=2))
    dataset = PatchDataset([tmp_path], scale=2, patch=8, length=40, seed=0)
    for index in range(40):
        low, high = dataset[index]
        assert low.shape == (3, 8, 8) and high.shape == (3, 16, 16)
        means = torch.nn.functional.avg_pool2d(high, 2)
        # A pixel of the bicubic downscale of a ramp is the mean of its block, away from borders.
        assert (low - means).abs()[:, 2:-2, 2:-2].max() <= 1 / 255


def test_all_eight_orientations_appear(tmp_path: Path) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[1, 5] = 255
    write_image(tmp_path / "dot.png", image)
    dataset = PatchDataset([tmp_path], scale=2, patch=8, length=64, seed=0)
    spots = {tuple(dataset[i][1][0].nonzero()[0].tolist()) for i in range(64)}
    assert len(spots) == 8


def test_large_images_are_drawn_more_often(tmp_path: Path) -> None:
    write_image(tmp_path / "large.png", np.full((96, 96, 3), 200, np.uint8))
    write_image(tmp_path / "small.png", np.full((32, 32, 3), 10, np.uint8))
    dataset = PatchDataset([tmp_path], scale=2, patch=8, length=200, seed=0)
    share = sum(dataset[i][0].mean() > 0.5 for i in range(200)) / 200
    assert 0.82 < share < 0.97


def test_small_images_are_left_out_and_progress_is_told(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    dataset = PatchDataset(
        [folder],
        scale=2,
        patch=16,
        length=4,
        seed=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(dataset.pairs) == 2
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_too_large_a_patch_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="use a smaller patch"):
        PatchDataset([folder], scale=2, patch=64, length=4, seed=0)


def test_floats_pass_through_unrounded() -> None:
    image = np.linspace(-0.2, 1.3, 24, dtype=np.float32).reshape(2, 4, 3)
    assert torch.equal(to_tensor(image).permute(1, 2, 0), torch.from_numpy(image))
    back = to_pixels(to_tensor(image), np.float32)
    np.testing.assert_array_equal(back, image.clip(0, 1))


@pytest.mark.parametrize("task", [JpegArtifacts(20), GaussianDenoising(25), SuperResolution(3)])
def test_patches_of_every_task_depend_on_seed_and_index_only(task: Task, folder: Path) -> None:
    a, b = (
        PatchDataset([folder], task=task, patch=10, length=length, seed=5) for length in (30, 90)
    )
    for index in (29, 3, 0):
        for one, two in zip(a[index], b[index], strict=True):
            assert torch.equal(one, two)
    low, high = a[0]
    assert low.shape == (task.channels, 10, 10)
    assert high.shape == (task.channels, 10 * task.scale, 10 * task.scale)


def test_training_noise_is_fresh_at_every_item(tmp_path: Path) -> None:
    write_image(tmp_path / "flat.png", np.full((12, 12, 3), 100, np.uint8))
    dataset = PatchDataset([tmp_path], task=GaussianDenoising(25), patch=12, length=9, seed=0)
    noise = torch.stack([(low - high) * 255 for low, high in (dataset[i] for i in range(9))])
    assert noise.std().item() == pytest.approx(25, rel=0.05)
    assert not torch.equal(noise[0], noise[1])


def test_compressed_patches_are_cut_from_the_compressed_image(tmp_path: Path) -> None:
    image = picture(24, 24)
    write_image(tmp_path / "a.png", image)
    task = JpegArtifacts(10)
    dataset = PatchDataset([tmp_path], task=task, patch=24, length=8, seed=0)
    whole = to_tensor(task.degrade(task.read(tmp_path / "a.png")))
    turned = [torch.rot90(whole, k, (1, 2)) for k in range(4)]
    turned += [x.flip(2) for x in turned]
    assert all(any(torch.equal(dataset[i][0], x) for x in turned) for i in range(8))


def test_given_inputs_are_used(tmp_path: Path) -> None:
    for name, value in (("target", 200), ("input", 50)):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "a.png", np.full((16, 16, 3), value, np.uint8))
    low, high = PatchDataset([tmp_path], task=RealDenoising(), patch=8, length=1, seed=0)[0]
    assert (low == 50 / 255).all() and (high == 200 / 255).all()
    folders = [tmp_path / "target"]
    given = PatchDataset(
        folders, task=JpegArtifacts(), inputs=[tmp_path / "input"], patch=8, length=1, seed=0
    )
    assert (given[0][0] == 50 / 255).all()


@pytest.mark.parametrize("skip", [False, True])
def test_pairs_that_do_not_fit_are_refused(skip: bool, tmp_path: Path) -> None:
    high, low = tmp_path / "high", tmp_path / "low"
    high.mkdir()
    low.mkdir()
    write_image(high / "a.png", picture(33, 32))
    write_image(low / "ax2.png", picture(16, 16))
    arguments = {"patch": 8, "length": 1, "seed": 0, "skip_bad_images": skip}
    with pytest.raises(ImageError, match=r"a\.png: 32x33 .* 16x16 at scale 2; they must be 32x32"):
        PatchDataset([high], scale=2, inputs=[low], **arguments)
    (low / "ax2.png").rename(low / "b.png")
    with pytest.raises(ImageError, match=r"no input for 1 of 1 images.*a\.png"):
        PatchDataset([high], scale=2, inputs=[low], **arguments)
    with pytest.raises(ConfigError, match="one folder of inputs for each"):
        PatchDataset([high], scale=2, inputs=[low, low], **arguments)


def test_bad_images_are_named_or_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = PatchDataset([folder], scale=2, patch=8, length=6, seed=0)
    (folder / "9.png").write_bytes((folder / "0.png").read_bytes()[:90])
    with pytest.raises(ImageError, match=r"9\.png: cannot be read"):
        PatchDataset([folder], scale=2, patch=8, length=6, seed=0)
    with caplog.at_level("WARNING", "qmir_ao"):
        rest = PatchDataset([folder], scale=2, patch=8, length=6, seed=0, skip_bad_images=True)
    assert [path.name for path in rest.skipped] == ["9.png"]
    assert "9.png: cannot be read" in caplog.text
    assert torch.equal(rest[5][1], good[5][1])


def test_empty_folders_and_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds no images"):
        PatchDataset([tmp_path], scale=2, patch=8, length=1, seed=0)
    with pytest.raises(ConfigError, match="no folder with images"):
        PatchDataset([], scale=2, patch=8, length=1, seed=0)
    with pytest.raises(ConfigError, match="either task or scale"):
        PatchDataset([tmp_path], patch=8, length=1, seed=0)


def test_one_pixel_images_are_left_out(folder: Path) -> None:
    write_image(folder / "dot.png", picture(1, 1))
    assert len(PatchDataset([folder], scale=4, patch=8, length=1, seed=0).pairs) == 2


def test_the_cache_holds_the_same_pixels_and_is_shared(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    plain = PatchDataset([folder], scale=2, patch=8, length=4, seed=0)
    for _ in range(2):
        mapped = PatchDataset([folder], scale=2, patch=8, length=4, seed=0, cache=cache)
        assert isinstance(mapped.pairs[0][1], np.memmap)
        assert all(torch.equal(a, b) for a, b in zip(plain[3], mapped[3], strict=True))
    assert len(list(cache.iterdir())) == 6
