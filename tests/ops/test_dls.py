"""DLS: reference against an independent oracle, kernel against reference, bad input, parity."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from support import oracles, tolerances
from support.cases import DLS_FLAGS as FLAGS
from support.cases import DLS_RANGES as RANGES
from support.cases import DLS_SHAPES as SHAPES
from support.cases import DLS_V as V
from support.cases import DLS_W as W
from support.cases import dls_case as _case
from support.paths import GOLDEN, needs_golden

import qmir_ao.backend.cpu.dls  # noqa: F401  (registers the kernels)
from qmir_ao.backend.cpu.registration import KERNELS
from qmir_ao.errors import NonFiniteError
from qmir_ao.ops.dls import (
    STEP_EPS,
    dls_dequantize,
    dls_dequantize_ref,
    dls_qparams,
    dls_qparams_ref,
    dls_quantize,
    dls_quantize_ref,
)
from qmir_ao.ops.dls_fake_quant import (
    dls_fake_quant,
    dls_fake_quant_backward_ref,
    dls_fake_quant_ref,
)

QMIR = torch.ops.qmir


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("grid", RANGES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 100), (2, 3, 9, 11)], ids=str)
def test_reference_equals_oracle_in_float64(shape, grid, flags):
    x, grad = (t.double() for t in _case(shape))
    settings = (*grid, *flags)
    inputs = (x, W.double(), V.double())
    y, wanted = oracles.gradients(oracles.dls, inputs, settings, grad)
    torch.testing.assert_close(dls_fake_quant_ref(*inputs, *settings), y, rtol=1e-12, atol=1e-12)
    got = dls_fake_quant_backward_ref(grad, *inputs, *settings)
    for mine, theirs in zip(got, wanted, strict=True):
        assert oracles.relative(mine, theirs) < 1e-9


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("grid", RANGES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_reference(shape, grid, flags, poisoned_empty):
    x, grad = _case(shape)
    settings = (*grid, *flags)
    got = QMIR.dls_fake_quant(x, W, V, *settings)
    assert torch.equal(got, dls_fake_quant_ref(x, W, V, *settings))
    backward = QMIR.dls_fake_quant_backward(grad, x, W, V, *settings)
    for mine, theirs in zip(
        backward, dls_fake_quant_backward_ref(grad, x, W, V, *settings), strict=True
    ):
        assert oracles.relative(mine, theirs) <= 2 * tolerances.FLOAT32_EPS


@pytest.mark.parametrize("grid", [*RANGES, (0, 255)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_codes_equal_reference(shape, grid, per_tensor, poisoned_empty):
    x, _ = _case(shape)
    step, shift = dls_qparams(x, W, V, *grid, per_tensor)
    for mine, theirs in zip(
        (step, shift), dls_qparams_ref(x, W, V, *grid, per_tensor, False), strict=True
    ):
        assert torch.equal(mine, theirs)
    codes = dls_quantize(x, step, shift, *grid)
    assert torch.equal(codes, dls_quantize_ref(x, step, shift, *grid))
    assert codes.dtype == (torch.uint8 if grid[1] > 127 else torch.int8)
    values = dls_dequantize(codes, step, shift)
    assert torch.equal(values, dls_dequantize_ref(codes, step, shift))
    assert torch.equal(values, dls_fake_quant(x, W, V, *grid, per_tensor))


def test_kernel_gradients_match_float64_oracle():
    x, grad = _case((2, 60, 123))
    settings = (-8, 7, False, False, False)
    inputs = (x, W, V)
    y, got = oracles.gradients(dls_fake_quant, inputs, settings, grad)
    exact = tuple(t.double() for t in inputs)
    wanted_y, wanted = oracles.gradients(oracles.dls, exact, settings, grad.double())
    flips = ((y - wanted_y).abs() > 0.01).float().mean()
    assert flips <= tolerances.CODE_MISMATCH * 10
    for mine, theirs in zip(got, wanted, strict=True):
        assert oracles.relative(mine, theirs) < tolerances.OFFICIAL_GRAD


def test_perturbed_scalar_is_noticed():
    x, _ = _case((2, 500))
    other = W + torch.tensor([0.0, 1e-4, 0.0, 0.0])
    assert not torch.equal(
        QMIR.dls_fake_quant(x, W, V, -8, 7, False, False, False),
        dls_fake_quant_ref(x, other, V, -8, 7, False, False, False),
    )


@hypothesis.given(
    batch=st.integers(1, 4),
    count=st.integers(1, 300),
    seed=st.integers(0, 2**16),
    at=st.floats(-9, 9),
)
@hypothesis.settings(max_examples=60)
def test_batch_mates_do_not_matter(batch, count, seed, at):
    x = torch.randn(batch, count, generator=torch.Generator().manual_seed(seed)) + at
    whole = dls_fake_quant(x, W, V)
    alone = torch.cat([dls_fake_quant(x[i : i + 1], W, V) for i in range(batch)])
    assert torch.equal(whole, alone)


@hypothesis.given(bits=st.integers(2, 8), count=st.integers(1, 200), seed=st.integers(0, 2**16))
@hypothesis.settings(max_examples=60)
def test_values_on_the_grid_stay(bits, count, seed):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.randint(
        low, high + 1, (1, count), generator=torch.Generator().manual_seed(seed)
    ).to(torch.int8)
    step, shift = torch.tensor([0.125]), torch.tensor([0.5])
    assert torch.equal(
        dls_quantize(dls_dequantize(codes, step, shift), step, shift, low, high), codes
    )


@pytest.mark.parametrize("shape", [(3, 50001), (2, 40000), (1, 70001)], ids=str)
def test_threads_and_repeats_do_not_matter(shape):
    x, grad = _case(shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, *([2] * 18)):
            torch.set_num_threads(threads)
            y = QMIR.dls_fake_quant(x, W, V, -8, 7, False, False, True)
            back = QMIR.dls_fake_quant_backward(grad, x, W, V, -8, 7, False, False, True)
            results.append((y, *back))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 0.1])
def test_constant_tensor_gives_no_nan(value):
    x = torch.full((2, 37), value, requires_grad=True)
    w, v = torch.tensor([0.0, 0.3, 0.0, 0.0], requires_grad=True), V.clone().requires_grad_()
    for flags in FLAGS:
        y = dls_fake_quant(x, w, v, -8, 7, *flags)
        grads = torch.autograd.grad(y.sum(), (x, w, v))
        assert all(torch.isfinite(t).all() for t in (y, *grads))
    step, shift = dls_qparams(x.detach(), w.detach(), v.detach())
    assert torch.equal(step, torch.full((2,), STEP_EPS))
    assert torch.isfinite(shift).all()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)], ids=str)
def test_empty_tensor(shape):
    x = torch.zeros(shape, requires_grad=True)
    w = W.clone().requires_grad_()
    y = dls_fake_quant(x, w, V)
    y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape and torch.equal(w.grad, torch.zeros(4))
    step, shift = dls_qparams(x.detach(), W, V)
    groups = shape[0] if len(shape) > 1 else 1
    assert torch.equal(step, torch.full((groups,), STEP_EPS))
    assert torch.equal(shift, torch.zeros(groups))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 5000, 8999])
def test_non_finite_input_names_the_sample(bad, where):
    x, grad = _case((3, 9000))
    x[1, where] = bad
    settings = (-8, 7, False, False, False)
    calls = [
        lambda: dls_fake_quant(x, W, V),
        lambda: dls_qparams(x, W, V),
        lambda: QMIR.dls_fake_quant_backward(grad, x, W, V, *settings),
        lambda: dls_fake_quant_ref(x, W, V, *settings),
    ]
    for call in calls:
        with pytest.raises(NonFiniteError, match="sample 1"):
            call()


def test_diverged_scalars_are_reported():
    x, _ = _case((2, 10))
    with pytest.raises(NonFiniteError, match="learned scalars"):
        dls_fake_quant(x, W * float("nan"), V)


@pytest.mark.parametrize("grid", [(0, 0), (-256, 255), (1, 8), (-1, 0)], ids=str)
def test_bad_range_is_refused(grid):
    x, _ = _case((2, 10))
    with pytest.raises(RuntimeError, match=r"codes must fit 2..8 bits"):
        dls_fake_quant(x, W, V, *grid)


def test_wrong_number_of_steps_is_refused():
    x, _ = _case((3, 10))
    with pytest.raises(RuntimeError, match="step and shift must have shape"):
        dls_quantize(x, torch.ones(2), torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"must have shape \(4,\)"):
        dls_fake_quant(x, torch.ones(3), V)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_run_the_reference(dtype):
    x = torch.randn(2, 33).to(dtype).requires_grad_()
    y = dls_fake_quant(x, W, V)
    y.float().sum().backward()
    assert y.dtype == dtype and x.grad.dtype == dtype
    assert oracles.relative(y, dls_fake_quant(x.detach().float(), W, V)) < 0.02


def test_strided_input():
    x = torch.randn(2, 8, 6, 5).permute(0, 2, 3, 1)
    assert torch.equal(dls_fake_quant(x, W, V), dls_fake_quant(x.contiguous(), W, V))


def _golden_cases() -> list[str]:
    if not GOLDEN.is_dir():
        return []
    with np.load(GOLDEN / "dls_official.npz", allow_pickle=False) as data:
        return sorted({key.rsplit("/", 1)[0] for key in data.files})


@needs_golden
@pytest.mark.parametrize("case", _golden_cases())
def test_parity_with_published_code(case):
    with np.load(GOLDEN / "dls_official.npz", allow_pickle=False) as data:
        golden = {k: torch.from_numpy(np.array(data[f"{case}/{k}"])) for k in (
            "x", "gy", "y", "gx", "w", "gw", "signed", "nbits"
        )}  # fmt: skip
    bits = int(golden["nbits"])
    grid = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if golden["signed"] else (0, 2**bits - 1)
    inputs = (golden["x"], golden["w"][:4], golden["w"][4:])
    y, (dx, dw, dv) = oracles.gradients(
        dls_fake_quant, inputs, (*grid, True, True, True), golden["gy"]
    )
    error = (y - golden["y"]).abs()
    flipped = error > tolerances.OFFICIAL_VALUE * golden["y"].abs().max()
    assert int(flipped.sum()) <= max(1, tolerances.OFFICIAL_FLIPS * y.numel())
    assert oracles.relative(dx, golden["gx"]) < tolerances.OFFICIAL_GRAD
    if not flipped.any():
        assert oracles.relative(dw, golden["gw"][:4]) < tolerances.OFFICIAL_GRAD
    if case.endswith("trained"):
        assert oracles.relative(dv, golden["gw"][4:]) < tolerances.OFFICIAL_GRAD


def test_the_kernel_is_registered():
    assert "dls_fake_quant_backward" in KERNELS
