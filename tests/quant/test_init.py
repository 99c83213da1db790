"""Initialisations: the paper's formulas, the Gaussian table, the first-batch search."""

import math

import pytest
import torch

from qmir_ao.ops.dls import dls_qparams
from qmir_ao.ops.dls_fake_quant import dls_fake_quant
from qmir_ao.quant.init import (
    GAUSSIAN_STEP,
    closed_form,
    lsq_step,
    named_preset,
    search_grid,
    searched_scalars,
    weight_steps,
)
from qmir_ao.quant.spec import code_range


def _grid(x, scalars, bits):
    step, shift = dls_qparams(x, *scalars, *code_range(bits))
    return float(step[0]), float(shift[0])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_named_presets_give_the_paper_ranges(bits):
    x = torch.randn(1, 400) * 1.7 + 0.6
    mean, std, low, high = (float(v) for v in (x.mean(), x.std(), x.min(), x.max()))
    top = 2 ** (bits - 1) - 1
    wanted = {
        "mu3s": (3 * std / top, -mean),
        "mu4s": (4 * std / top, -mean),
        "minmax": ((high - low) / (2**bits - 1), -(high + low) / 2),
        "mu_halfrange": ((high - low) / 2 / top, -mean),
        "mid3s": (3 * std / top, -(high + low) / 2),
    }
    for name, (step, shift) in wanted.items():
        got = _grid(x, named_preset(name, bits), bits)
        assert got == pytest.approx((step, shift), rel=1e-4), name


def _gaussian_error(step, levels):
    """Mean square error of a uniform symmetric quantizer on a unit Gaussian, by fine sums."""
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    top = (levels - 1) / 2
    level = torch.clamp(torch.round(x / step + top), 0, levels - 1) - top
    return float((density * (level * step - x).square()).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("bits", range(2, 9))
def test_gaussian_steps_are_optimal(bits):
    low, high = GAUSSIAN_STEP[bits] * 0.9, GAUSSIAN_STEP[bits] * 1.1
    for _ in range(40):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if _gaussian_error(left, 2**bits) < _gaussian_error(right, 2**bits):
            high = right
        else:
            low = left
    assert low == pytest.approx(GAUSSIAN_STEP[bits], rel=5e-3)


def test_closed_form_at_two_bits_is_the_documented_one():
    scalars = closed_form(2, -2)
    assert scalars.scale_weights.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert scalars.shift_weights.tolist() == [-1.0, -0.5, 0.0, 0.0]


def _relative_error(x, scalars, bits):
    y = dls_fake_quant(x, *scalars, *code_range(bits))
    return float((y - x).square().sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize(
    ("bits", "gaussian", "silu"), [(2, 0.125, 0.25), (4, 0.0125, 0.010), (8, 1.2e-4, 1.2e-4)]
)
def test_search_is_good_on_symmetric_and_skewed_tensors(bits, gaussian, silu):
    x = torch.randn(1, 50000)
    tail = torch.nn.functional.silu(torch.randn(1, 50000) * 2)
    assert _relative_error(x, searched_scalars(x, bits, -(2 ** (bits - 1)), False), bits) < gaussian
    skewed = searched_scalars(tail, bits, -(2 ** (bits - 1)), False)
    assert _relative_error(tail, skewed, bits) < silu


def test_search_beats_every_preset_at_two_bits():
    x = torch.randn(4, 3000) * 3 + 1
    best = _relative_error(x, searched_scalars(x, 2, -2, True), 2)
    for name in ("mu3s", "mu4s", "minmax", "mu_halfrange", "mid3s"):
        assert best < _relative_error(x, named_preset(name, 2), 2)


def test_search_survives_an_outlier():
    x = torch.randn(1, 20000)
    x[0, 7] = 400.0
    step, _ = search_grid(x.reshape(-1), torch.ones(20000), 8, -128)
    assert 0 < step <= 401 / 255


def test_search_is_deterministic_and_subsamples():
    x = torch.randn(2, 200000)
    first, second = (searched_scalars(x, 4, -8, False) for _ in range(2))
    assert torch.equal(first.scale_weights, second.scale_weights)
    assert torch.equal(first.shift_weights, second.shift_weights)


@pytest.mark.parametrize(
    "x", [torch.full((2, 999), 0.1), torch.ones(3, 1), torch.zeros(4)], ids=["flat", "one", "zero"]
)
def test_search_without_spread_falls_back(x):
    assert searched_scalars(x, 2, -2, False).scale_weights.tolist() == [0.0, 1.0, 0.0, 0.0]


def test_one_constant_sample_does_not_spoil_the_others():
    x = torch.cat([torch.randn(1, 5000), torch.ones(1, 5000)])
    mixed, alone = searched_scalars(x, 2, -2, False), searched_scalars(x[:1], 2, -2, False)
    assert torch.allclose(mixed.scale_weights, alone.scale_weights, rtol=0.05)


def test_lsq_step_is_the_published_formula():
    w = torch.randn(30, 7)
    assert float(lsq_step(w, 7)) == pytest.approx(2 * float(w.abs().mean()) / 7**0.5)
    assert float(lsq_step(torch.zeros(3), 7)) > 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_steps_beat_lsq_and_minmax(bits):
    low, high = code_range(bits)
    rows = torch.randn(6, 300) * torch.rand(6, 1)

    def error(step):
        codes = torch.clamp(torch.round(rows / step), low, high)
        return (codes * step - rows).square().sum(1)

    found = error(weight_steps(rows, low, high).reshape(-1, 1))
    assert bool((found <= error(rows.abs().amax(1, keepdim=True) / high) + 1e-9).all())
    lsq = 2 * rows.abs().mean(1, keepdim=True) / high**0.5
    assert float(found.sum()) <= float(error(lsq).sum()) * 1.01


def test_all_zero_channels_get_a_usable_step():
    rows = torch.randn(4, 50)
    rows[2] = 0
    steps = weight_steps(rows, -8, 7)
    assert float(steps[2]) == pytest.approx(float(steps[[0, 1, 3]].mean()))
    assert bool((weight_steps(torch.zeros(3, 5), -8, 7) > 0).all())
