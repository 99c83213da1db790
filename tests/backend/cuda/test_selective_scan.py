"""The float scan on CUDA, run by the simulator: as accurate as the reference operator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import SCAN_OPTIONAL, SCAN_SIZES, scan_operands
from support.host_launcher import HostLauncher, needs_compiler
from support.scans import NAMES, assert_as_accurate, without_softplus

from qmir_ao.backend.cuda.selective_scan import (
    launch_selective_scan,
    launch_selective_scan_backward,
)
from qmir_ao.ops.selective_scan import selective_scan_backward_ref, selective_scan_ref

pytestmark = needs_compiler

Size = tuple[int, int, int, int, int]
SIZES: dict[str, Size] = SCAN_SIZES | {
    "blocks-of-channels": (1, 1, 72, 4, 33),
    "one-tile": (1, 2, 9, 16, 32),
    "sixty-states": (1, 1, 5, 60, 40),
}


def on(function: Callable[..., Any], seed: int) -> Callable[..., Any]:
    return lambda *args: function(HostLauncher(seed), *args)


def drawn(size: Size, optional: tuple[bool, bool], softplus: bool) -> list[tuple[Any, ...]]:
    batch, groups, channels, *_ = size
    cases = [
        scan_operands(size, *optional, seed=seed)
        for seed in range(max(8, -(-64 // (batch * groups * channels))))
    ]
    return [(*(x if softplus else without_softplus(x)), softplus) for x in cases]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("optional", SCAN_OPTIONAL.values(), ids=SCAN_OPTIONAL)
@pytest.mark.parametrize("softplus", [True, False])
def test_forward_is_as_accurate_as_the_reference(size, optional, softplus, poisoned_empty):
    run = on(launch_selective_scan, sum(size))
    assert_as_accurate(run, selective_scan_ref, drawn(size, optional, softplus), ("y",))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("optional", SCAN_OPTIONAL.values(), ids=SCAN_OPTIONAL)
def test_gradients_are_as_accurate_as_the_reference(size, optional, poisoned_empty):
    run = on(launch_selective_scan_backward, sum(size))
    cases = [(torch.randn_like(case[0]), *case) for case in drawn(size, optional, True)]
    assert_as_accurate(run, selective_scan_backward_ref, cases, NAMES)


# Several chunks of several tiles, the last one cut off.
LONG: Size = (1, 2, 9, 5, 2100)


@pytest.mark.parametrize("softplus", [True, False])
def test_long_sequences_are_as_accurate(softplus, poisoned_empty):
    cases = [
        (*(scan_operands(LONG) if softplus else without_softplus(scan_operands(LONG))), softplus)
    ]
    assert_as_accurate(on(launch_selective_scan, 1), selective_scan_ref, cases, ("y",))
    cases = [(torch.randn_like(case[0]), *case) for case in cases]
    run = on(launch_selective_scan_backward, 2)
    assert_as_accurate(run, selective_scan_backward_ref, cases, NAMES)


def test_order_of_threads_does_not_matter():
    tensors = scan_operands((2, 2, 9, 10, 70))
    grad = torch.randn_like(tensors[0])
    results = []
    for seed in range(6):
        y = launch_selective_scan(HostLauncher(seed), *tensors, True)
        back = launch_selective_scan_backward(HostLauncher(seed), grad, *tensors, True)
        results.append((y, *back))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_batch_mates_do_not_matter():
    u, delta, A, B, C, D, bias = scan_operands((3, 2, 9, 10, 70))
    whole = launch_selective_scan(HostLauncher(0), u, delta, A, B, C, D, bias, True)
    for i in range(3):
        one = slice(i, i + 1)
        alone = launch_selective_scan(
            HostLauncher(1), u[one], delta[one], A, B[one], C[one], D, bias, True
        )
        assert torch.equal(whole[one], alone)


@pytest.mark.parametrize("scale", [100.0, -30.0])
def test_decays_beyond_the_range_of_float32(scale):
    u, delta, A, B, C, D, bias = scan_operands((1, 1, 9, 10, 40))
    A = A * scale
    y = launch_selective_scan(HostLauncher(0), u, delta, A, B, C, D, bias, True)
    want = selective_scan_ref(*(t.double() for t in (u, delta, A, B, C, D, bias)), True)
    if scale > 0:
        assert y.isfinite().all()
        assert (y - want).abs().max() <= 1e-5 * want.abs().max()
    else:  # growing states: infinity or NaN where float32 ends, exact before that
        small = (want.abs() < 1e20).cummin(-1).values
        error = (y - want).abs()[small] / want.abs().clamp(min=1.0)[small]
        assert small.any() and error.max() < 1e-3


def test_nan_stays_in_its_channel_and_goes_on_in_time():
    tensors = scan_operands((2, 2, 9, 10, 70))
    tensors[1][0, 3, 40] = float("nan")
    y = launch_selective_scan(HostLauncher(0), *tensors, True)
    assert y[0, 3, 40:].isnan().all() and int(y.isnan().sum()) == 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    tensors = scan_operands((2, 2, 9, 10, 70))
    given = [t.to(dtype) if i in (0, 1, 3, 4) else t for i, t in enumerate(tensors)]
    if dtype == torch.float64:
        given = [t.double() for t in tensors]
    grad = torch.randn_like(given[0])
    y = launch_selective_scan(HostLauncher(0), *given, True)
    back = launch_selective_scan_backward(HostLauncher(0), grad, *given, True)
    assert y.dtype == dtype and all(b.dtype == t.dtype for b, t in zip(back, given, strict=True))
    exact = [t.double() for t in given]
    want = selective_scan_ref(*exact, True)
    wanted = selective_scan_backward_ref(grad.double(), *exact, True)
    # One rounding to the type, after float32 arithmetic that is far more exact.
    unit = max(torch.finfo(dtype).eps, 2.0**-16)
    for mine, theirs in zip((y, *back), (want, *wanted), strict=True):
        assert (mine.double() - theirs).abs().max() <= unit * theirs.abs().max()


@pytest.mark.parametrize("size", [(0, 2, 3, 4, 5), (2, 2, 3, 4, 0)], ids=str)
def test_empty_sequences_launch_nothing(size):
    launch, tensors = HostLauncher(0), scan_operands(size)
    y = launch_selective_scan(launch, *tensors, True)
    back = launch_selective_scan_backward(launch, y, *tensors, True)
    assert y.shape == tensors[0].shape and not launch.launched
    assert all(b.shape == t.shape for b, t in zip(back, tensors, strict=True))


def test_strided_views_and_too_many_states():
    u, delta, A, B, C, D, bias = scan_operands((2, 2, 9, 10, 33))
    turned = u.transpose(1, 2).contiguous().transpose(1, 2)
    settings = (delta, A, B, C, D, bias, True)
    straight = launch_selective_scan(HostLauncher(0), u, *settings)
    assert torch.equal(straight, launch_selective_scan(HostLauncher(0), turned, *settings))
    many, launch = scan_operands((1, 1, 2, 70, 3)), HostLauncher(0)
    got = launch_selective_scan(launch, *many, True)
    assert torch.equal(got, selective_scan_ref(*many, True)) and not launch.launched


def test_a_changed_state_matrix_is_noticed():
    tensors = scan_operands(SIZES["light"])
    other = [t * 1.0001 if i == 2 else t for i, t in enumerate(tensors)]
    with pytest.raises(AssertionError):
        assert_as_accurate(
            lambda *_: launch_selective_scan(HostLauncher(0), *other, True),
            selective_scan_ref,
            [(*tensors, True)],
            ("y",),
        )


def test_shapes_that_do_not_fit_are_refused():
    u, *rest = scan_operands((2, 2, 9, 10, 33))
    with pytest.raises(RuntimeError, match="delta must be"):
        launch_selective_scan(HostLauncher(0), u[:, :, :-1], *rest, True)
