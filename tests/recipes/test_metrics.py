"""PSNR and SSIM against their formulas in numpy and against scikit-image."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.lpips as functional
from skimage.metrics import structural_similarity
from support.torchvision_double import ALEXNET, POOLED, alexnet_weights, install
from torch.nn import functional as F

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.images import Pixels
from qmir_ao.recipes.metrics import (
    Convention,
    _perceptual,
    lpips,
    luma,
    psnr,
    psnr_y,
    score,
    ssim,
    ssim_volume,
    ssim_y,
)

# torchmetrics takes the logarithm of the peak in float32: 20 * log10(255) = 48.13 to 2^-24.
PSNR_DB = 1e-5


def pair(h: int = 31, w: int = 37, channels: int = 3) -> tuple[Pixels, Pixels]:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (h, w, channels)).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    return a, b


def window_line() -> np.ndarray:
    """Gaussian of sigma 1.5 with 11 taps and sum 1."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    return line / line.sum()


def volume_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """MATLAB's `ssim` of two (H, W, 3) arrays with peak 255: 11x11x11 window, edges repeated."""
    line = window_line()
    window = line[:, None, None] * line[None, :, None] * line[None, None, :]

    def filtered(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, 5, mode="edge")
        views = np.lib.stride_tricks.sliding_window_view(padded, (11, 11, 11))
        return np.einsum("hwcijk,ijk->hwc", views, window)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = filtered(a), filtered(b)
    var_a, var_b = filtered(a * a) - mean_a**2, filtered(b * b) - mean_b**2
    both = filtered(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def gaussian_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The published SSIM of two (H, W) images with peak 255."""
    window = np.outer(window_line(), window_line())

    def filtered(x: np.ndarray) -> np.ndarray:
        views = np.lib.stride_tricks.sliding_window_view(x, (11, 11))
        return np.einsum("hwij,ij->hw", views, window)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = filtered(a), filtered(b)
    var_a = filtered(a * a) - mean_a**2
    var_b = filtered(b * b) - mean_b**2
    both = filtered(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [((0, 0, 0), 16.0), ((255, 255, 255), 235.0), ((255, 0, 0), 81.481), ((0, 0, 255), 40.966)],
)
def test_luma_of_known_colours(rgb: tuple[int, int, int], expected: float) -> None:
    assert luma(np.array([[rgb]], np.uint8))[0, 0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("border", [0, 2, 4])
def test_psnr_is_the_formula(border: int) -> None:
    a, b = pair()
    crop = slice(border, -border or None)
    error = (luma(a) - luma(b))[crop, crop]
    expected = 10 * math.log10(255**2 / np.mean(error**2))
    assert psnr_y(a, b, border) == pytest.approx(expected, abs=PSNR_DB)


@pytest.mark.parametrize("border", [0, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_the_formula(border: int, channels: int) -> None:
    a, b = pair(channels=channels)
    crop = slice(border, -border or None)
    expected = gaussian_ssim(luma(a)[crop, crop], luma(b)[crop, crop])
    assert ssim_y(a, b, border) == pytest.approx(expected, abs=1e-9)


def test_ssim_agrees_with_scikit_image() -> None:
    a, b = pair()
    _, full = structural_similarity(
        luma(a),
        luma(b),
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    assert ssim_y(a, b) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)


def test_grey_images_are_compared_as_they_are() -> None:
    a, b = pair(channels=1)
    error = a.astype(float) - b
    expected = 10 * math.log10(255**2 / np.mean(error**2))
    assert psnr_y(a, b) == pytest.approx(expected, abs=PSNR_DB)


def test_equal_images() -> None:
    a, _ = pair()
    assert psnr_y(a, a) == math.inf
    assert ssim_y(a, a) == pytest.approx(1.0)


def test_border_hides_what_is_in_it() -> None:
    a, _ = pair()
    b = a.copy()
    b[:2], b[-2:], b[:, :2], b[:, -2:] = 0, 0, 0, 0
    assert psnr_y(a, b, 2) == math.inf
    assert psnr_y(a, b, 1) < 40


def test_bad_pairs_are_refused() -> None:
    a, _ = pair()
    with pytest.raises(ConfigError, match="differ in shape"):
        psnr_y(a, a[:-1])
    with pytest.raises(ConfigError, match="nothing inside"):
        psnr_y(a[:4, :4], a[:4, :4], 2)
    with pytest.raises(ConfigError, match="11x11 window"):
        ssim_y(a[:12, :12], a[:12, :12], 2)


@pytest.mark.parametrize("border", [0, 4])
def test_rgb_takes_all_channels_alike(border: int) -> None:
    a, b = pair()
    crop = slice(border, -border or None)
    x, y = a[crop, crop].astype(float), b[crop, crop].astype(float)
    expected = 10 * math.log10(255**2 / np.mean((x - y) ** 2))
    assert psnr(a, b, channel="rgb", border=border) == pytest.approx(expected, abs=PSNR_DB)
    each = [gaussian_ssim(x[:, :, c], y[:, :, c]) for c in range(3)]
    similarity = ssim(a, b, channel="rgb", border=border)
    assert similarity == pytest.approx(sum(each) / 3, abs=1e-9)
    assert psnr(a, b, channel="rgb") != psnr(a, b, channel="y")


def test_float_pixels_are_scored_without_rounding() -> None:
    a, b = pair()
    half = (a.astype(np.float32) + 0.4) / 255
    error = half.astype(np.float64) * 255 - b
    expected = 10 * math.log10(255**2 / np.mean(error**2))
    assert psnr(half, b, channel="rgb") == pytest.approx(expected, abs=PSNR_DB)
    assert psnr(half, b, channel="rgb") != psnr(a, b, channel="rgb")


def test_the_volume_window_is_the_formula() -> None:
    a, b = pair(17, 14)
    expected = volume_ssim(a.astype(float), b.astype(float))
    assert ssim_volume(a, b) == pytest.approx(expected, abs=1e-9)
    assert ssim_volume(a, a) == pytest.approx(1.0)
    assert abs(expected - ssim(a, b, channel="rgb")) > 1e-4
    with pytest.raises(ConfigError, match="differ in shape"):
        ssim_volume(a, a[:-1])


@pytest.mark.parametrize(
    ("convention", "channels"),
    [
        (Convention("y", border=3), 3),
        (Convention("rgb"), 3),
        (Convention("grey", border=1), 1),
        (Convention("rgb", border=2, rounded=False, window="volume"), 3),
    ],
)
def test_score_follows_the_convention(convention: Convention, channels: int) -> None:
    a, b = pair(channels=channels)
    border, channel = convention.border, convention.channel
    inside = slice(border, -border or None)
    expected = (
        ssim(a, b, channel=channel, border=border)
        if convention.window == "plane"
        else ssim_volume(a[inside, inside], b[inside, inside])
    )
    assert score(a, b, convention) == (psnr(a, b, channel=channel, border=border), expected)


@pytest.mark.parametrize("bad", [{"channel": "x"}, {"window": "cube"}, {"border": -1}])
def test_bad_conventions_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        Convention(**bad)


def test_grey_refuses_colour() -> None:
    a, b = pair()
    with pytest.raises(ConfigError, match="'grey' needs"):
        psnr(a, b, channel="grey")
    with pytest.raises(ConfigError, match="channel must be one of"):
        ssim(a, b, channel="luma")


def test_lpips_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    a, b = pair()
    with pytest.raises(ConfigError, match=r"needs torchvision .* never installs it"):
        lpips(a, b)


def lpips_formula(image: Pixels, truth: Pixels) -> float:
    """Squared distances of unit feature vectors, weighted by the published heads, in float64."""
    heads = torch.load(
        Path(functional.__file__).parent / "lpips_models/alex.pth", map_location="cpu"
    )
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    features: list[list[torch.Tensor]] = []
    for pixels in (image, truth):
        x = (2.0 * torch.from_numpy(pixels).double() / 255.0 - 1.0 - shift) / scale
        x = x.permute(2, 0, 1)[None]
        features.append([])
        for place, (shape, (weight, bias)) in enumerate(
            zip(ALEXNET, alexnet_weights(), strict=True)
        ):
            _, _, _, stride, padding = shape
            x = F.conv2d(x, weight.double(), bias.double(), stride, padding).relu()
            norm = x.square().sum(1, keepdim=True).sqrt()
            features[-1].append(x / norm.clamp_min(1e-10))
            if place in POOLED:
                x = F.max_pool2d(x, 3, 2)
    total = 0.0
    for place, (mine, wanted) in enumerate(zip(*features, strict=True)):
        head = heads[f"lin{place}.model.1.weight"].double().reshape(1, -1, 1, 1)
        total += float(((mine - wanted).square() * head).sum(1).mean())
    return total


def test_lpips_is_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = install(monkeypatch)
    _perceptual.cache_clear()
    a, b = pair(67, 79)
    assert lpips(a, b) == pytest.approx(lpips_formula(a, b), rel=1e-4)
    assert lpips(a, a) == 0.0
    assert lpips(a, b) > lpips(a, (a.astype(int) * 9 // 10 + b // 10).astype(np.uint8)) > 0.0
    # Pixels beyond the range, as noise makes them, are those at its end.
    beyond = a.astype(np.float32) / 255.0
    beyond[0, 0], beyond[1, 1] = 1.5, -0.5
    clipped = np.clip(beyond, 0.0, 1.0)
    assert lpips(beyond, b) == lpips(clipped, b) > 0.0
    assert asked == ["alexnet"], "the network is loaded once"
    _perceptual.cache_clear()


def test_lpips_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    a, b = pair()
    with pytest.raises(ConfigError, match=r"network must be one of .* got 'resnet'"):
        lpips(a, b, "resnet")
    with pytest.raises(ConfigError, match="needs RGB images, got 1 channel"):
        lpips(a[..., :1], b[..., :1])
    with pytest.raises(ConfigError, match=r"\(30, 37, 3\) is smaller than 31x31"):
        lpips(a[:30], b[:30])
