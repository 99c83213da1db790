"""DLS on CUDA, run by the simulator: the kernels against the reference operator."""

import pytest
import torch
from support import oracles, tolerances
from support.cases import DLS_FLAGS, DLS_RANGES, DLS_SHAPES, DLS_V, DLS_W, dls_case
from support.host_launcher import HostLauncher, needs_compiler

from qmir_ao.backend.cuda.dls_fake_quant import (
    LONGEST_ROW,
    launch_dls_fake_quant,
    launch_dls_fake_quant_backward,
)
from qmir_ao.ops.dls_fake_quant import dls_fake_quant_backward_ref, dls_fake_quant_ref

pytestmark = needs_compiler

# Short and long groups, with and without vectors, several tiles.
SHAPES = [*DLS_SHAPES, (33, 60), (71, 7), (2, 3 * 8192 + 4), (2, LONGEST_ROW), (1, LONGEST_ROW + 1)]


@pytest.mark.parametrize("flags", DLS_FLAGS, ids=str)
@pytest.mark.parametrize("grid", DLS_RANGES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_reference(shape, grid, flags, poisoned_empty):
    launch = HostLauncher(seed=sum(shape))
    x, grad = dls_case(shape)
    settings = (*grid, *flags)
    got = launch_dls_fake_quant(launch, x, DLS_W, DLS_V, *settings)
    assert torch.equal(got, dls_fake_quant_ref(x, DLS_W, DLS_V, *settings))
    backward = launch_dls_fake_quant_backward(launch, grad, x, DLS_W, DLS_V, *settings)
    wanted = dls_fake_quant_backward_ref(grad, x, DLS_W, DLS_V, *settings)
    for mine, theirs in zip(backward, wanted, strict=True):
        assert oracles.relative(mine, theirs) <= 2 * tolerances.FLOAT32_EPS


@pytest.mark.parametrize("shape", [(3, 1000), (2, 9000)], ids=str)
def test_bf16_in_and_out(shape, poisoned_empty):
    settings = (-8, 7, False, False, True)
    x, grad = (t.bfloat16() for t in dls_case(shape))
    got = launch_dls_fake_quant(HostLauncher(1), x, DLS_W, DLS_V, *settings)
    assert torch.equal(got, dls_fake_quant_ref(x, DLS_W, DLS_V, *settings))
    backward = launch_dls_fake_quant_backward(HostLauncher(2), grad, x, DLS_W, DLS_V, *settings)
    wanted = dls_fake_quant_backward_ref(grad, x, DLS_W, DLS_V, *settings)
    assert backward[0].dtype == torch.bfloat16
    for mine, theirs in zip(backward, wanted, strict=True):
        # Both round the same float32 number, which may differ in its last bit, to bf16.
        assert oracles.relative(mine, theirs) <= 2 * tolerances.FLOAT32_EPS + (
            tolerances.BF16_FLIPS if mine.dtype == torch.bfloat16 else 0.0
        )


@pytest.mark.parametrize("shape", [(40, 37), (3, 20001)], ids=str)
def test_order_of_threads_does_not_matter(shape):
    x, grad = dls_case(shape)
    settings = (-8, 7, False, False, True)
    results = []
    for seed in range(6):
        y = launch_dls_fake_quant(HostLauncher(seed), x, DLS_W, DLS_V, *settings)
        back = launch_dls_fake_quant_backward(HostLauncher(seed), grad, x, DLS_W, DLS_V, *settings)
        results.append((y, *back))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("count", [37, 9001])
def test_batch_mates_do_not_matter(count):
    x, _ = dls_case((4, count))
    settings = (-8, 7, False, False, False)
    whole = launch_dls_fake_quant(HostLauncher(0), x, DLS_W, DLS_V, *settings)
    for i in range(4):
        alone = launch_dls_fake_quant(HostLauncher(1), x[i : i + 1], DLS_W, DLS_V, *settings)
        assert torch.equal(whole[i : i + 1], alone)


@pytest.mark.parametrize("count", [37, 9001])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_sample(count, bad):
    x, grad = dls_case((3, count))
    x[1, count - 2] = bad
    settings = (-8, 7, False, False, False)
    y = launch_dls_fake_quant(HostLauncher(0), x, DLS_W, DLS_V, *settings)
    dx, dw, dv = launch_dls_fake_quant_backward(HostLauncher(0), grad, x, DLS_W, DLS_V, *settings)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    assert dx[[0, 2]].isfinite().all() and not dx[1].isfinite().any()
    assert dw.isnan().any() and dv.isnan().any()


@pytest.mark.parametrize("count", [37, 9001])
@pytest.mark.parametrize("value", [0.0, -3.7])
def test_constant_groups_give_no_nan(count, value):
    x, w = torch.full((2, count), value), torch.tensor([0.0, 0.3, 0.0, 0.0])
    grad = torch.randn(2, count)
    for flags in DLS_FLAGS:
        y = launch_dls_fake_quant(HostLauncher(0), x, w, DLS_V, -8, 7, *flags)
        back = launch_dls_fake_quant_backward(HostLauncher(0), grad, x, w, DLS_V, -8, 7, *flags)
        assert all(t.isfinite().all() for t in (y, *back))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)], ids=str)
def test_empty_tensors_launch_nothing(shape):
    launch = HostLauncher(0)
    x, settings = torch.zeros(shape), (-8, 7, False, False, False)
    assert launch_dls_fake_quant(launch, x, DLS_W, DLS_V, *settings).shape == shape
    dx, dw, _ = launch_dls_fake_quant_backward(launch, x, x, DLS_W, DLS_V, *settings)
    assert dx.shape == shape and torch.equal(dw, torch.zeros(4)) and not launch.launched


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_as_the_reference(dtype):
    x, grad = (t.to(dtype) for t in dls_case((3, 50)))
    settings = (-8, 7, False, False, False)
    y = launch_dls_fake_quant(HostLauncher(0), x, DLS_W, DLS_V, *settings)
    dx, *_ = launch_dls_fake_quant_backward(HostLauncher(0), grad, x, DLS_W, DLS_V, *settings)
    assert torch.equal(y, dls_fake_quant_ref(x, DLS_W, DLS_V, *settings))
    assert dx.dtype == dtype


def test_strided_and_misaligned_views():
    whole = torch.randn(2, 8, 6, 500)
    for x in (whole.permute(0, 2, 3, 1), whole.flatten()[1:]):
        settings = (-8, 7, True, False, False)
        y = launch_dls_fake_quant(HostLauncher(0), x, DLS_W, DLS_V, *settings)
        assert torch.equal(y, dls_fake_quant_ref(x, DLS_W, DLS_V, *settings))


def test_perturbed_scalar_is_noticed():
    x, _ = dls_case((2, 500))
    other = DLS_W + torch.tensor([0.0, 1e-4, 0.0, 0.0])
    settings = (-8, 7, False, False, False)
    y = launch_dls_fake_quant(HostLauncher(0), x, DLS_W, DLS_V, *settings)
    assert not torch.equal(y, dls_fake_quant_ref(x, other, DLS_V, *settings))


def test_bad_arguments_are_refused():
    x, _ = dls_case((2, 10))
    with pytest.raises(RuntimeError, match=r"codes must fit 2\.\.8 bits"):
        launch_dls_fake_quant(HostLauncher(0), x, DLS_W, DLS_V, 0, 0, False, False, False)
    with pytest.raises(RuntimeError, match=r"must have shape \(4,\)"):
        launch_dls_fake_quant(HostLauncher(0), x, DLS_W[:3], DLS_V, -8, 7, False, False, False)
