"""CUDA kernels of qmir::ss2d_scan and its backward in the simulator, against float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.host_launcher import HostLauncher, needs_compiler
from support.image_scans import OPTIONAL, Size, cases, operands, with_gradient
from support.integers import same_bytes
from support.scan_tables import mutated
from support.scans import NAMES, assert_as_accurate, in_float64
from torch import Tensor

from qmir_ao.backend.cuda import ss2d_scan as module
from qmir_ao.backend.cuda.scan_real import MAX_STATES, backward_variant, forward_variant
from qmir_ao.backend.cuda.ss2d_scan import launch_ss2d_scan, launch_ss2d_scan_backward
from qmir_ao.ops.ss2d_scan import ss2d_scan_backward_ref, ss2d_scan_ref

pytestmark = needs_compiler

# Every number of states is compiled on its own, which takes seconds. Chunk lengths: by default a
# small image is one chunk; None is that.
SIZES: dict[str, tuple[Size, int | None]] = {
    "one-pixel": ((1, 1, 3, 1, 1), None),
    "one-row": ((2, 3, 3, 1, 40), 16),
    "one-column": ((1, 17, 3, 37, 1), 8),
    "one-chunk": ((1, 33, 3, 7, 9), None),
    "parts-of-columns": ((1, 5, 3, 40, 11), 16),
    "several-columns-to-a-chunk": ((2, 5, 3, 5, 37), 23),
    "twenty-states": ((1, 5, 20, 9, 10), 16),
}
sizes = pytest.mark.parametrize(("size", "steps"), SIZES.values(), ids=SIZES)


def forward(steps: int | None, seed: int = 0, folder: Path | None = None) -> Callable[..., Tensor]:
    return lambda *args: launch_ss2d_scan(HostLauncher(seed, folder), *args, steps=steps)


def backward(steps: int | None, seed: int = 0) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *args: launch_ss2d_scan_backward(HostLauncher(seed), *args, steps=steps)


@pytest.mark.usefixtures("poisoned_empty")
@sizes
@pytest.mark.parametrize("softplus", [True, False])
def test_forward_is_as_accurate_as_the_reference(
    size: Size, steps: int | None, softplus: bool
) -> None:
    drawn = cases(size, (True, True), softplus)
    assert_as_accurate(forward(steps), ss2d_scan_ref, drawn, ("y",))


@pytest.mark.usefixtures("poisoned_empty")
@sizes
def test_gradients_are_as_accurate_as_the_reference(size: Size, steps: int | None) -> None:
    drawn = with_gradient(cases(size, (True, True)))
    assert_as_accurate(backward(steps), ss2d_scan_backward_ref, drawn, NAMES)


@pytest.mark.parametrize("optional", OPTIONAL.values(), ids=OPTIONAL)
def test_absent_operands(optional: tuple[bool, bool]) -> None:
    drawn = cases((1, 5, 3, 7, 9), optional)
    assert_as_accurate(forward(16), ss2d_scan_ref, drawn, ("y",))
    assert_as_accurate(backward(16), ss2d_scan_backward_ref, with_gradient(drawn), NAMES)


@pytest.mark.parametrize("steps", [None, 16])
def test_bf16_is_the_rounded_float32_result(steps: int | None) -> None:
    tensors = [x.bfloat16() for x in operands((2, 5, 3, 6, 9))]
    grad = torch.randn(tensors[0].shape).bfloat16()
    wide = [x.float() for x in tensors]
    y = forward(steps)(*tensors, True)
    assert same_bytes(y, forward(steps)(*wide, True).bfloat16())
    gradients = backward(steps)(grad, *tensors, True)
    for name, got, want in zip(
        NAMES, gradients, backward(steps)(grad.float(), *wide, True), strict=True
    ):
        assert same_bytes(got, want.bfloat16()), name


def test_parameters_may_stay_float32_beside_bf16() -> None:
    wide = [
        x.bfloat16().float() if i in (0, 1, 3, 4) else x
        for i, x in enumerate(operands((1, 5, 3, 6, 9)))
    ]
    tensors = [x.bfloat16() if i in (0, 1, 3, 4) else x for i, x in enumerate(wide)]
    y = forward(None)(*tensors, True)
    assert same_bytes(y, forward(None)(*wide, True).bfloat16())
    grad = torch.randn(y.shape).bfloat16()
    gradients = backward(None)(grad, *tensors, True)
    for x, got, want in zip(
        tensors, gradients, backward(None)(grad.float(), *wide, True), strict=True
    ):
        assert same_bytes(got, want.to(x.dtype))


def test_orders_of_threads_batch_mates_and_blocks_change_no_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = operands((3, 5, 3, 9, 12))
    grad = torch.randn_like(tensors[0])

    def everything(chosen: slice, seed: int) -> list[Tensor]:
        u, delta, A, B, C, D, bias = tensors
        part = [u[chosen], delta[chosen], A, B[chosen], C[chosen], D, bias]
        return [
            forward(16, seed)(*part, True),
            *backward(16, seed)(grad[chosen], *part, True),
        ]

    whole = everything(slice(None), 0)
    for seed in (1, 2):
        again = everything(slice(None), seed)
        assert all(same_bytes(a, b) for a, b in zip(whole, again, strict=True)), seed
    for i in range(3):
        alone = everything(slice(i, i + 1), i)
        for position in (0, 1, 2, 4, 5):  # y, du, ddelta, dB, dC: what belongs to one sample
            assert same_bytes(whole[position][i : i + 1], alone[position]), (i, position)
    monkeypatch.setattr(
        module, "forward_variant", lambda *kind: forward_variant(*kind)._replace(warps=4)
    )
    assert same_bytes(forward(16)(*tensors, True), whole[0])


def test_steps_that_need_a_clamp() -> None:
    tensors = operands((1, 5, 3, 7, 9))
    tensors[1][0, 3, 2, 4] = 1e4  # decays to zero, far below the smallest float
    drawn = [(*tensors, True)]
    assert_as_accurate(forward(16), ss2d_scan_ref, drawn, ("y",))
    got = backward(16)(torch.ones_like(tensors[0]), *tensors, True)
    want = ss2d_scan_backward_ref(torch.ones_like(tensors[0]).double(), *in_float64(tensors), True)
    for x, exact in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize("steps", [None, 16])
def test_nan_stays_nan(position: int, steps: int | None) -> None:
    tensors = operands((1, 20, 3, 5, 8))
    tensors[position].view(-1)[0] = float("nan")
    want = ss2d_scan_ref(*tensors, True).isnan()
    assert want.any()
    assert torch.equal(forward(steps)(*tensors, True).isnan(), want)


def test_strided_operands_give_the_same_bytes() -> None:
    tensors = operands((2, 5, 3, 6, 7))
    strided = [
        None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1) for x in tensors
    ]
    assert same_bytes(forward(16)(*strided, True), forward(16)(*tensors, True))


def test_other_operands_use_the_reference() -> None:
    launch = HostLauncher(0)
    for tensors in (
        in_float64(operands((2, 3, 3, 4, 5))),
        operands((1, 2, MAX_STATES + 1, 2, 3)),
    ):
        got = launch_ss2d_scan(launch, *tensors, True)
        assert same_bytes(got, ss2d_scan_ref(*tensors, True))
    assert not launch.launched


@pytest.mark.parametrize("size", [(0, 3, 4, 5, 6), (2, 3, 4, 0, 6), (2, 3, 4, 5, 0)])
def test_empty_images_and_batches(size: Size) -> None:
    tensors = operands(size)
    assert forward(None)(*tensors, True).shape == tensors[0].shape
    gradients = backward(None)(torch.zeros(tensors[0].shape), *tensors, True)
    for x, gradient in zip(tensors, gradients, strict=True):
        assert gradient.shape == x.shape
        assert not gradient.isnan().any()


def test_every_variant_fits() -> None:
    for states in range(1, MAX_STATES + 1):
        assert forward_variant(states, torch.float32).shared(3, 2) <= 99 * 1024
        # An Orin has 163 KB for a block, as have the large GPUs.
        limit = 99 if states < 63 else 163
        kind = backward_variant(states, torch.float32)
        assert kind.shared(4, 2, history=True) <= limit * 1024
    assert forward_variant(16, torch.bfloat16).warps == 8


def test_a_mutated_kernel_is_caught(tmp_path: Path) -> None:
    size, steps = SIZES["parts-of-columns"]
    folder = mutated(tmp_path, "ss2d_scan", r"decays\[i\] \* h \+ ends\[i\]", "ends[i]")
    kernel: Callable[..., Any] = forward(steps, folder=folder)
    with pytest.raises(AssertionError, match="y"):
        assert_as_accurate(kernel, ss2d_scan_ref, cases(size, (True, True)), ("y",))
