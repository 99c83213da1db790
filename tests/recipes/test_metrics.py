"""PSNR and SSIM against their formulas in numpy and against scikit-image."""

import math

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.images import Pixels
from qmir_ao.recipes.metrics import luma, psnr_y, ssim_y

# torchmetrics takes the logarithm of the peak in float32: 20 * log10(255) = 48.13 to 2^-24.
PSNR_DB = 1e-5


def pair(h: int = 31, w: int = 37, channels: int = 3) -> tuple[Pixels, Pixels]:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (h, w, channels)).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    return a, b


def gaussian_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The published SSIM of two (H, W) images with peak 255."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

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
