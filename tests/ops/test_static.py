"""The static activation quantizer: oracle, kernel, parity with the published code."""

import numpy as np
import pytest
import torch
from support import oracles, tolerances
from support.paths import GOLDEN, needs_golden

import qmir_ao.backend.cpu.dls  # noqa: F401  (registers the kernels)
from qmir_ao.backend.cpu.registration import KERNELS
from qmir_ao.errors import NonFiniteError
from qmir_ao.ops.static import (
    static_fake_quant,
    static_fake_quant_backward_ref,
    static_fake_quant_ref,
)

QMIR = torch.ops.qmir
STEP, SHIFT = torch.tensor([0.3]), torch.tensor([0.07])
RANGES = [(-2, 1), (-8, 7), (0, 15), (0, 255)]


@pytest.mark.parametrize("grid", RANGES, ids=str)
def test_reference_equals_oracle_in_float64(grid):
    x, grad = torch.randn(3, 57).double(), torch.randn(3, 57).double()
    inputs = (x, STEP.double(), SHIFT.double())
    y, wanted = oracles.gradients(oracles.static, inputs, grid, grad)
    torch.testing.assert_close(static_fake_quant_ref(*inputs, *grid), y, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        static_fake_quant_backward_ref(grad, *inputs, *grid), wanted, strict=True
    ):
        assert oracles.relative(mine, theirs) < 1e-9


@pytest.mark.parametrize("grid", RANGES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 50), (2, 5, 4099), (2, 50001)], ids=str)
def test_kernel_equals_reference(shape, grid, poisoned_empty):
    x, grad = torch.randn(shape), torch.randn(shape)
    got = QMIR.static_fake_quant(x, STEP, SHIFT, *grid)
    assert torch.equal(got, static_fake_quant_ref(x, STEP, SHIFT, *grid))
    for mine, theirs in zip(
        QMIR.static_fake_quant_backward(grad, x, STEP, SHIFT, *grid),
        static_fake_quant_backward_ref(grad, x, STEP, SHIFT, *grid),
        strict=True,
    ):
        assert mine.shape == theirs.shape
        assert oracles.relative(mine, theirs) <= 2 * tolerances.FLOAT32_EPS


def test_threads_do_not_matter():
    x, grad = torch.randn(2, 50001), torch.randn(2, 50001)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(QMIR.static_fake_quant_backward(grad, x, STEP, SHIFT, -8, 7))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input(bad):
    x = torch.randn(2, 5000)
    x[1, 4321] = bad
    with pytest.raises(NonFiniteError, match="static_fake_quant: x holds NaN or infinity"):
        static_fake_quant(x, STEP, SHIFT)
    with pytest.raises(NonFiniteError):
        static_fake_quant_ref(x, STEP, SHIFT, -8, 7)


def test_empty_and_bad_arguments():
    assert static_fake_quant(torch.zeros(0, 3), STEP, SHIFT).shape == (0, 3)
    with pytest.raises(RuntimeError, match="must have one element"):
        static_fake_quant(torch.zeros(2), torch.ones(2), torch.zeros(2))


@needs_golden
def test_parity_with_published_code():
    with np.load(GOLDEN / "variants_official.npz", allow_pickle=False) as data:
        keys = ("x", "gy", "y", "gx", "alpha", "beta", "g_alpha", "g_beta")
        golden = {k: torch.from_numpy(np.array(data[f"act_quant/4|{k}"])) for k in keys}
    inputs = (golden["x"], golden["alpha"], golden["beta"])
    y, (dx, dstep, dshift) = oracles.gradients(static_fake_quant, inputs, (-8, 7), golden["gy"])
    assert oracles.relative(y, golden["y"]) < tolerances.OFFICIAL_VALUE
    assert oracles.relative(dx, golden["gx"]) < tolerances.OFFICIAL_GRAD
    assert oracles.relative(dstep, golden["g_alpha"]) < tolerances.OFFICIAL_GRAD
    # Nothing is clipped here: the published sum cancels to float32 noise, ours to zero.
    noise = tolerances.FLOAT32_EPS * float(golden["gy"].abs().sum())
    assert abs(float(dshift - golden["g_beta"])) <= noise


def test_the_kernel_is_registered():
    assert "static_fake_quant" in KERNELS
