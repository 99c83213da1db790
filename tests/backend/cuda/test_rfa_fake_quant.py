"""RFA on CUDA, run by the simulator: the kernels against the reference operator."""

import pytest
import torch
from support import oracles, tolerances
from support.cases import RFA_CASES, rfa_case
from support.host_launcher import HostLauncher, needs_compiler

from qmir_ao.backend.cuda.rfa_fake_quant import (
    TILE,
    launch_rfa_fake_quant,
    launch_rfa_fake_quant_backward,
)
from qmir_ao.ops.rfa_fake_quant import rfa_fake_quant_backward_ref, rfa_fake_quant_ref

pytestmark = needs_compiler

# Several tiles in a row, and a row that ends where a tile does.
CASES = [*RFA_CASES, ((2, 9001), 2, 2), ((2, TILE), 2, 1)]


@pytest.mark.parametrize("order", ["init", "moved", "unsorted"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("shape", "groups", "shifts"), CASES, ids=str)
def test_kernel_equals_reference(shape, groups, shifts, bits, order, poisoned_empty):
    launch = HostLauncher(seed=bits + groups)
    inputs, quant_min = rfa_case(shape, groups, bits, order, shifts)
    grad = torch.randn(shape)
    got = launch_rfa_fake_quant(launch, *inputs, quant_min)
    assert torch.equal(got, rfa_fake_quant_ref(*inputs, quant_min))
    back = launch_rfa_fake_quant_backward(launch, grad, *inputs, quant_min)
    wanted = rfa_fake_quant_backward_ref(grad, *inputs, quant_min)
    for mine, theirs in zip(back[:3], wanted[:3], strict=True):
        assert mine.shape == theirs.shape
        assert oracles.relative(mine, theirs) <= 2 * tolerances.FLOAT32_EPS
    assert oracles.relative(back[3], wanted[3]) <= 16 * tolerances.FLOAT32_EPS


def test_order_of_threads_does_not_matter():
    inputs, quant_min = rfa_case((5, 1001), 5, 4, shifts=1)
    grad = torch.randn(5, 1001)
    results = []
    for seed in range(6):
        back = launch_rfa_fake_quant_backward(HostLauncher(seed), grad, *inputs, quant_min)
        results.append((launch_rfa_fake_quant(HostLauncher(seed), *inputs, quant_min), *back))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_becomes_nan(bad):
    inputs, quant_min = rfa_case((7, 9), 7, 4)
    inputs[0][3, 3] = bad
    y = launch_rfa_fake_quant(HostLauncher(0), *inputs, quant_min)
    assert y[3, 3].isnan() and int(y.isnan().sum()) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_keep_their_type(dtype):
    inputs, quant_min = rfa_case((7, 9), 7, 4)
    inputs = tuple(t.to(dtype) for t in inputs)
    wide = tuple(t.float() for t in inputs)
    grad = torch.randn(7, 9).to(dtype)
    y = launch_rfa_fake_quant(HostLauncher(0), *inputs, quant_min)
    back = launch_rfa_fake_quant_backward(HostLauncher(0), grad, *inputs, quant_min)
    assert all(t.dtype == dtype for t in (y, *back))
    if dtype != torch.float64:
        assert torch.equal(y, rfa_fake_quant_ref(*wide, quant_min).to(dtype))


def test_odd_number_of_levels_runs_the_reference():
    w, step, shift = torch.randn(4, 6), torch.tensor([0.3]), torch.zeros(1)
    thresholds, launch = torch.arange(15) - 7.0, HostLauncher(0)
    got = launch_rfa_fake_quant(launch, w, step, shift, thresholds, -7)
    assert torch.equal(got, rfa_fake_quant_ref(w, step, shift, thresholds, -7))
    assert not launch.launched


def test_perturbed_threshold_is_noticed():
    (w, step, shift, thresholds), quant_min = rfa_case((40, 40), 40, 4)
    other = thresholds.clone()
    other[8] += 0.05
    y = launch_rfa_fake_quant(HostLauncher(0), w, step, shift, thresholds, quant_min)
    assert not torch.equal(y, rfa_fake_quant_ref(w, step, shift, other, quant_min))


def test_bad_arguments_are_refused():
    (w, step, shift, thresholds), quant_min = rfa_case((7, 9), 7, 4)
    with pytest.raises(RuntimeError, match="one per output channel"):
        launch_rfa_fake_quant(HostLauncher(0), w, step[:5], shift[:5], thresholds, quant_min)


def test_empty_weight_launches_nothing():
    (_, *rest), quant_min = rfa_case((7, 9), 7, 4)
    launch = HostLauncher(0)
    assert launch_rfa_fake_quant(launch, torch.zeros(7, 0), *rest, quant_min).shape == (7, 0)
    assert not launch.launched
