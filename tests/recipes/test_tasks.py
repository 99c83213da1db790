"""Tasks: degradations as published, seeded test inputs, pairs that the user supplies."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import savemat
from support.paths import DATA, needs_data
from torch import nn

from qmir_ao.errors import ConfigError, ImageError
from qmir_ao.recipes.evaluate import evaluate
from qmir_ao.recipes.images import Pixels, write_image
from qmir_ao.recipes.metrics import Convention, psnr
from qmir_ao.recipes.tasks import (
    TASKS,
    GaussianDenoising,
    JpegArtifacts,
    RealDenoising,
    SuperResolution,
    create_task,
)

# PSNR and SSIM of the compressed images of Classic5, as ARCNN, DnCNN and SwinIR print them.
CLASSIC5 = {10: (27.82, 0.7595), 20: (30.12, 0.8344), 30: (31.48, 0.8666), 40: (32.43, 0.8849)}


def picture(h: int, w: int, channels: int = 3, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (h, w, channels)).astype(np.uint8)


def test_names_and_settings() -> None:
    assert list(TASKS) == ["sr", "jpeg", "denoise", "real-denoise"]
    assert create_task("sr", scale=3) == SuperResolution(3)
    assert create_task("jpeg", quality=40, encoder="pillow").title.startswith("JPEG artifacts")
    assert [create_task(name).loss for name in TASKS] == ["l1", *["charbonnier"] * 3]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("jpg", {}, "did you mean 'jpeg'"),
        ("denoise", {"quality": 10}, "no setting 'quality'; it takes sigma"),
        ("real-denoise", {"sigma": 10}, "it takes none"),
        ("sr", {"scale": 1}, "at least 2"),
        ("sr", {"scale": True}, "at least 2"),
        ("jpeg", {"quality": 0}, "1 to 100"),
        ("jpeg", {"quality": 10.0}, "1 to 100"),
        ("jpeg", {"protocol": "matlab"}, "protocol must be one of"),
        ("jpeg", {"encoder": "gimp"}, "encoder must be one of"),
        ("denoise", {"sigma": 0}, "above 0"),
        ("denoise", {"sigma": math.nan}, "above 0"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_task(name, **settings)


def test_conventions() -> None:
    assert SuperResolution(4).convention == Convention("y", border=4)
    assert JpegArtifacts().convention == Convention("grey")
    assert GaussianDenoising().convention == Convention("rgb")
    assert RealDenoising().convention == Convention("rgb", rounded=False, window="volume")


def test_noise_is_that_of_the_published_code() -> None:
    truth = picture(9, 7)
    # The published lines, on a BGR image in units of the peak.
    np.random.seed(0)
    bgr = truth[:, :, ::-1].astype(np.float32) / 255.0
    bgr = bgr + np.random.normal(0, 25 / 255.0, bgr.shape)
    noisy = GaussianDenoising(25).evaluation_input(truth)
    assert noisy.dtype == np.float32
    np.testing.assert_array_equal(noisy, bgr[:, :, ::-1].astype(np.float32))
    np.testing.assert_array_equal(noisy, GaussianDenoising(25).evaluation_input(truth))
    assert noisy.min() < 0 and noisy.max() > 1


def test_training_noise_has_the_right_size_and_follows_its_generator() -> None:
    task, patch = GaussianDenoising(50), np.full((64, 64, 3), 128, np.uint8)
    one, two = (task.corrupt(patch, np.random.default_rng(s)) for s in (1, 2))
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(one, task.corrupt(patch, np.random.default_rng(1)))
    assert 255 * (one - 128 / 255).std() == pytest.approx(50, rel=0.05)


@pytest.mark.parametrize("quality", [10, 40])
def test_both_encoders_give_the_same_grey_image(quality: int) -> None:
    grey = cv2.GaussianBlur(picture(48, 40, 1), (5, 5), 0)[:, :, None]
    opencv = JpegArtifacts(quality, encoder="opencv").degrade(grey)
    pillow = JpegArtifacts(quality, encoder="pillow").degrade(grey)
    assert opencv.shape == grey.shape
    np.testing.assert_array_equal(opencv, pillow)
    assert not np.array_equal(opencv, grey)


def test_the_protocols_take_grey_from_colour_each_in_its_way(tmp_path: Path) -> None:
    image = picture(20, 16)
    write_image(tmp_path / "a.png", image)
    swinir = JpegArtifacts(protocol="swinir").read(tmp_path / "a.png")
    studio = image.astype(np.float64) @ [65.481, 128.553, 24.966] / 255 + 16
    np.testing.assert_array_equal(swinir[:, :, 0], np.rint(studio))
    mambair = JpegArtifacts(protocol="mambair").read(tmp_path / "a.png")
    full = image.astype(np.float64) @ [0.299, 0.587, 0.114]
    # OpenCV cuts the fraction of PNG files off, and computes with 15 bits.
    assert np.abs(mambair[:, :, 0] - full).max() < 1.02
    np.testing.assert_array_equal(
        mambair[:, :, 0], cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_GRAYSCALE)
    )


@pytest.mark.parametrize("protocol", ["swinir", "mambair"])
def test_a_grey_file_is_taken_as_it_is(protocol: str, tmp_path: Path) -> None:
    grey = picture(12, 10, 1)
    write_image(tmp_path / "a.png", grey)
    read = JpegArtifacts(protocol=protocol).read(tmp_path / "a.png")
    np.testing.assert_array_equal(read, grey)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    for task in (SuperResolution(), JpegArtifacts(), JpegArtifacts(protocol="mambair")):
        with pytest.raises(ImageError, match=r"a\.png"):
            task.read(tmp_path / "a.png")


def test_inputs_are_found_by_the_published_names(tmp_path: Path) -> None:
    high, low = tmp_path / "HR", tmp_path / "LR"
    high.mkdir()
    low.mkdir()
    for name, given in [("a", "ax2"), ("b", "b_LRBI_x2"), ("c_HR", "cx2"), ("d", "d")]:
        write_image(high / f"{name}.png", picture(8, 8))
        write_image(low / f"{given}.png", picture(4, 4))
    found = SuperResolution(2).pairs(high, low)
    names = [given.stem for _, given in found if given is not None]
    assert names == ["ax2", "b_LRBI_x2", "cx2", "d"]
    (low / "d.png").unlink()
    with pytest.raises(ImageError, match=r"no input for 1 of 4 images.*d\.png"):
        SuperResolution(2).pairs(high, low)


def test_two_inputs_of_one_name_are_refused_and_further_ones_are_not(tmp_path: Path) -> None:
    truths, inputs = tmp_path / "truths", tmp_path / "inputs"
    for folder, names in ((truths, ("a.png",)), (inputs, ("a.png", "z.png"))):
        folder.mkdir()
        for name in names:
            write_image(folder / name, np.zeros((8, 8, 3), np.uint8))
    task = GaussianDenoising(15.0)
    assert [source.name for source in task.sources(truths, inputs)] == ["a.png"]
    write_image(inputs / "a.bmp", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ImageError, match=r"a\.bmp and a\.png are both an input called 'a'"):
        task.sources(truths, inputs)


def make_pairs(folder: Path, names: tuple[str, str], size: int = 16) -> None:
    for index, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        write_image(folder / name / "x.png", picture(size, size, seed=index))


@pytest.mark.parametrize("names", [("target", "input"), ("target_crops", "input_crops")])
def test_real_pairs_from_two_subfolders(names: tuple[str, str], tmp_path: Path) -> None:
    make_pairs(tmp_path, names)
    source = RealDenoising().sources(tmp_path)[0]
    low, truth = source.load()
    np.testing.assert_array_equal(truth, picture(16, 16, seed=0))
    np.testing.assert_array_equal(low, picture(16, 16, seed=1))


def test_real_denoising_needs_pairs(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", picture(16, 16))
    with pytest.raises(ImageError, match="needs pairs"):
        RealDenoising().sources(tmp_path)
    with pytest.raises(ConfigError, match="cannot be made"):
        RealDenoising().degrade(picture(8, 8))


def test_sidd_blocks(tmp_path: Path) -> None:
    clean = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3)).astype(np.uint8)
    noisy = np.clip(clean.astype(int) + 9, 0, 255).astype(np.uint8)
    savemat(tmp_path / "ValidationGtBlocksSrgb.mat", {"ValidationGtBlocksSrgb": clean})
    savemat(tmp_path / "ValidationNoisyBlocksSrgb.mat", {"ValidationNoisyBlocksSrgb": noisy})
    task = RealDenoising()
    for folder in (tmp_path, tmp_path / "ValidationGtBlocksSrgb.mat"):
        sources = task.sources(folder)
        assert [s.name for s in sources] == ["00-00", "00-01", "00-02", "01-00", "01-01", "01-02"]
        low, truth = sources[4].load()
        np.testing.assert_array_equal(low, noisy[1, 1])
        np.testing.assert_array_equal(truth, clean[1, 1])
    scores = evaluate(nn.Identity(), tmp_path, task=task)
    error = clean.astype(float) - noisy
    first = 10 * math.log10(255**2 / np.mean(error[0, 0] ** 2))
    assert scores.images[0].psnr == pytest.approx(first, abs=1e-4)
    savemat(tmp_path / "ValidationNoisyBlocksSrgb.mat", {"x": noisy[:1]})
    with pytest.raises(ImageError, match="do not match"):
        task.sources(tmp_path)
    savemat(tmp_path / "ValidationNoisyBlocksSrgb.mat", {"x": noisy.astype(float)})
    with pytest.raises(ImageError, match="must hold one uint8 array"):
        task.sources(tmp_path)
    (tmp_path / "ValidationNoisyBlocksSrgb.mat").write_bytes(b"\x00" * 200)
    with pytest.raises(ImageError, match="cannot be read"):
        task.sources(tmp_path)


@needs_data
@pytest.mark.parametrize("quality", CLASSIC5)
def test_compressed_classic5_has_its_published_psnr(quality: int) -> None:
    task = JpegArtifacts(quality)
    pairs = [source.load() for source in task.sources(DATA / "sets/classic5/HR")]
    scores = [psnr(low, truth, channel="grey") for low, truth in pairs]
    assert len(pairs) == 5
    assert np.mean(scores) == pytest.approx(CLASSIC5[quality][0], abs=0.005)


@needs_data
def test_a_network_that_does_nothing_scores_the_published_input() -> None:
    scores = evaluate(nn.Identity(), DATA / "sets/classic5/HR", task=JpegArtifacts(10))
    assert scores.mean("ssim") == pytest.approx(CLASSIC5[10][1], abs=0.00005)
    assert scores.mean("psnr") == scores.mean("baseline_psnr")
    assert scores.mean("ssim") == scores.mean("baseline_ssim")


@needs_data
@pytest.mark.parametrize("sigma", [15, 25, 50])
def test_noisy_mcmaster_has_the_psnr_of_its_noise(sigma: int) -> None:
    pairs = [
        source.load() for source in GaussianDenoising(sigma).sources(DATA / "sets/McMaster/HR")
    ]
    scores = [psnr(low, truth, channel="rgb") for low, truth in pairs]
    # The noise is not clipped: its PSNR is that of its standard deviation (20.17 dB at 25).
    assert len(pairs) == 9
    assert np.mean(scores) == pytest.approx(20 * math.log10(255 / sigma), abs=0.02)
