"""RFA: reference against the published loop, kernel against reference, parity, bad input."""

import numpy as np
import pytest
import torch
from support import oracles, tolerances
from support.cases import RFA_CASES as CASES
from support.cases import rfa_case as _case
from support.paths import GOLDEN, needs_golden

import qmir_ao.backend.cpu.rfa  # noqa: F401  (registers the kernels)
from qmir_ao.backend.cpu.registration import KERNELS
from qmir_ao.errors import NonFiniteError
from qmir_ao.ops.pack import pack
from qmir_ao.ops.rfa import rfa_dequantize, rfa_pack, rfa_quantize, rfa_quantize_ref
from qmir_ao.ops.rfa_fake_quant import (
    rfa_fake_quant,
    rfa_fake_quant_backward_ref,
    rfa_fake_quant_ref,
)

QMIR = torch.ops.qmir


@pytest.mark.parametrize("order", ["init", "moved", "unsorted"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("shape", "groups", "shifts"), [((13, 5, 3, 3), 1, 1), ((7, 9), 7, 7), ((7, 9), 7, 1)], ids=str
)
def test_reference_equals_published_loop_in_float64(shape, groups, shifts, bits, order):
    inputs, quant_min = _case(shape, groups, bits, order, shifts)
    inputs = tuple(t.double() for t in inputs)
    grad = torch.randn(shape).double()
    y, wanted = oracles.gradients(oracles.rfa_loop, inputs, (quant_min,), grad)
    torch.testing.assert_close(rfa_fake_quant_ref(*inputs, quant_min), y, rtol=1e-12, atol=1e-12)
    got = rfa_fake_quant_backward_ref(grad, *inputs, quant_min)
    for mine, theirs in zip(got, wanted, strict=True):
        assert oracles.relative(mine, theirs) < 1e-9


@pytest.mark.parametrize("order", ["init", "moved", "unsorted"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("shape", "groups", "shifts"), CASES, ids=str)
def test_kernel_equals_reference(shape, groups, shifts, bits, order, poisoned_empty):
    inputs, quant_min = _case(shape, groups, bits, order, shifts)
    grad = torch.randn(shape)
    assert torch.equal(
        QMIR.rfa_fake_quant(*inputs, quant_min), rfa_fake_quant_ref(*inputs, quant_min)
    )
    assert torch.equal(QMIR.rfa_quantize(*inputs, quant_min), rfa_quantize_ref(*inputs, quant_min))
    got = QMIR.rfa_fake_quant_backward(grad, *inputs, quant_min)
    wanted = rfa_fake_quant_backward_ref(grad, *inputs, quant_min)
    for mine, theirs in zip(got[:3], wanted[:3], strict=True):
        assert mine.shape == theirs.shape
        assert oracles.relative(mine, theirs) <= 2 * tolerances.FLOAT32_EPS
    assert oracles.relative(got[3], wanted[3]) <= 16 * tolerances.FLOAT32_EPS


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_by_an_explicit_loop(bits):
    (w, step, shift, thresholds), quant_min = _case((5, 40), 5, bits)
    codes = rfa_quantize(w, step, shift, thresholds, quant_min)
    a = thresholds.numpy()
    for row in range(5):
        ratio = (w[row].numpy() + shift[row].numpy()) / step[row].numpy()
        for column, value in enumerate(np.clip(ratio, quant_min, -quant_min - 1)):
            level = sum(value > (a[j - 1] + a[j]) * np.float32(0.5) for j in range(1, len(a)))
            assert int(codes[row, column]) == quant_min + level


def test_a_value_on_a_midpoint_goes_down():
    w = torch.tensor([[-1.5, -0.5, 0.5, 1.0]])
    thresholds = torch.tensor([-2.0, -1.0, 0.0, 1.0])
    codes = rfa_quantize(w, torch.ones(1), torch.zeros(1), thresholds, -2)
    assert codes.tolist() == [[-2, -1, 0, 1]]


def test_perturbed_threshold_is_noticed():
    (w, step, shift, thresholds), quant_min = _case((40, 40), 40, 4)
    other = thresholds.clone()
    other[8] += 0.05
    assert not torch.equal(
        QMIR.rfa_fake_quant(w, step, shift, thresholds, quant_min),
        rfa_fake_quant_ref(w, step, shift, other, quant_min),
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("groups", "shifts"), [(1, 1), (12, 12), (12, 1)])
def test_packed_weight_gives_the_same_values(bits, groups, shifts):
    inputs, quant_min = _case((12, 3, 3, 3), groups, bits, shifts=shifts)
    packed = rfa_pack(*inputs, quant_min, bits)
    assert torch.equal(packed, pack(rfa_quantize(*inputs, quant_min), bits))
    values = rfa_dequantize(packed, inputs[1], inputs[2], [12, 3, 3, 3], bits)
    assert torch.equal(values, rfa_fake_quant(*inputs, quant_min))


@pytest.mark.parametrize(("groups", "shifts"), [(1, 1), (70, 70), (70, 1)])
@pytest.mark.parametrize("bits", [4, 8])
def test_threads_and_repeats_do_not_matter(groups, shifts, bits):
    inputs, quant_min = _case((70, 1001), groups, bits, shifts=shifts)
    grad = torch.randn(70, 1001)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, *([2] * 18)):
            torch.set_num_threads(threads)
            backward = QMIR.rfa_fake_quant_backward(grad, *inputs, quant_min)
            results.append((QMIR.rfa_fake_quant(*inputs, quant_min), *backward))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight(bad):
    inputs, quant_min = _case((7, 9), 7, 4)
    inputs[0][3, 3] = bad
    for call in (rfa_fake_quant, rfa_quantize, rfa_fake_quant_ref):
        with pytest.raises(NonFiniteError, match="the weight holds NaN or infinity"):
            call(*inputs, quant_min)


def test_bad_arguments():
    (w, step, shift, thresholds), quant_min = _case((7, 9), 7, 4)
    with pytest.raises(RuntimeError, match="one per output channel"):
        rfa_fake_quant(w, step[:5], shift[:5], thresholds, quant_min)
    with pytest.raises(RuntimeError, match="shift 1 or as many as step; got 7 and 3"):
        rfa_fake_quant(w, step, shift[:3], thresholds, quant_min)
    with pytest.raises(RuntimeError, match=r"2..8 bits"):
        rfa_fake_quant(w, step, shift, torch.arange(512.0) - 256, -256)
    with pytest.raises(RuntimeError, match="take 32 bytes"):
        rfa_dequantize(torch.zeros(3, dtype=torch.uint8), step, shift, [7, 9], 4)


def test_empty_weight():
    (_, step, shift, thresholds), quant_min = _case((7, 9), 7, 4)
    w = torch.zeros(7, 0, requires_grad=True)
    y = rfa_fake_quant(w, step, shift, thresholds, quant_min)
    y.sum().backward()
    assert y.shape == (7, 0) and w.grad.shape == (7, 0)


def test_odd_number_of_levels_runs_the_reference():
    w, step, shift = torch.randn(4, 6), torch.tensor([0.3]), torch.zeros(1)
    thresholds = torch.arange(15) - 7.0
    got = QMIR.rfa_fake_quant(w, step, shift, thresholds, -7)
    assert torch.equal(got, rfa_fake_quant_ref(w, step, shift, thresholds, -7))


@needs_golden
@pytest.mark.parametrize("case", ["lin/2/init", "lin/2/moved", "lin/4/init", "lin/4/moved"])
def test_parity_with_published_code(case):
    names = ("w", "alpha", "beta", "a", "gy", "y", "gw", "g_alpha", "g_beta", "g_a")
    with np.load(GOLDEN / "rfa_official.npz", allow_pickle=False) as data:
        golden = {k: torch.from_numpy(np.array(data[f"{case}/{k}"])) for k in names}
    quant_min = -golden["a"].numel() // 2
    inputs = tuple(golden[k] for k in names[:4])
    y, got = oracles.gradients(rfa_fake_quant, inputs, (quant_min,), golden["gy"])
    flips = (y - golden["y"]).abs() > tolerances.OFFICIAL_VALUE
    assert float(flips.float().mean()) <= tolerances.OFFICIAL_FLIPS
    for mine, name in zip(got, names[6:], strict=True):
        assert oracles.relative(mine, golden[name]) < tolerances.OFFICIAL_GRAD, name


def test_the_kernel_is_registered():
    assert "rfa_fake_quant_backward" in KERNELS
