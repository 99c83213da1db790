"""qmir::ss2d_scan: four walks over an image, kernel against reference against float64."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from support.image_scans import OPTIONAL, Size, cases, operands, with_gradient
from support.integers import same_bytes, with_threads
from support.scans import (
    NAMES,
    Operands,
    assert_as_accurate,
    follow,
    in_float64,
    put_back,
    walks,
)
from torch import Tensor

import qmir_ao.backend.cpu.ss2d_scan  # noqa: F401  (registers the kernels)
from qmir_ao.backend.cpu.selective_scan import MAX_STATES
from qmir_ao.ops.selective_scan import selective_scan_op, selective_scan_ref
from qmir_ao.ops.ss2d_scan import (
    ss2d_scan,
    ss2d_scan_backward_op,
    ss2d_scan_backward_ref,
    ss2d_scan_op,
    ss2d_scan_ref,
)

SIZES: dict[str, Size] = {
    "one-pixel": (1, 1, 1, 1, 1),
    "one-row": (2, 3, 4, 1, 40),
    "one-column": (1, 17, 8, 37, 1),
    "square": (1, 16, 8, 16, 16),
    "light": (1, 18, 10, 17, 33),
    "classic": (1, 33, 16, 9, 20),
    "odd": (3, 5, 3, 7, 4),
    "twenty-states": (2, 5, 20, 5, 19),
}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def walked(scan: Any, tensors: Operands, softplus: bool) -> list[Tensor]:
    """Image of each direction, by a plain scan along its walk."""
    u, delta, A, B, C, D, bias = tensors
    channels, height, width = u.shape[1:]
    images = []
    for k, walk in enumerate(walks(height, width)):
        own = slice(k * channels, (k + 1) * channels)
        y = scan(
            follow(u, walk),
            follow(delta[:, own], walk),
            A[own],
            follow(B[:, k : k + 1], walk),
            follow(C[:, k : k + 1], walk),
            None if D is None else D[own],
            None if bias is None else bias[own],
            softplus,
        )
        images.append(put_back(y, walk, height, width))
    return images


@sizes
@pytest.mark.parametrize("optional", OPTIONAL.values(), ids=OPTIONAL)
def test_reference_adds_the_four_walks(size: Size, optional: tuple[bool, bool]) -> None:
    tensors = in_float64(operands(size, *optional))
    want = sum(walked(selective_scan_ref, tensors, True))
    torch.testing.assert_close(ss2d_scan_ref(*tensors, True), want, rtol=1e-13, atol=1e-13)


@sizes
def test_kernel_gives_the_bytes_of_four_plain_kernels(size: Size, poisoned_empty: None) -> None:
    tensors = operands(size)
    rows, columns, rows_back, columns_back = walked(selective_scan_op, tensors, True)
    want = (rows + rows_back) + (columns + columns_back)
    assert same_bytes(ss2d_scan_op(*tensors, True), want)


@sizes
@pytest.mark.parametrize("optional", OPTIONAL.values(), ids=OPTIONAL)
@pytest.mark.parametrize("softplus", [True, False])
def test_forward_is_as_accurate_as_the_reference(
    size: Size, optional: tuple[bool, bool], softplus: bool, poisoned_empty: None
) -> None:
    drawn = cases(size, optional, softplus)
    assert_as_accurate(ss2d_scan_op, ss2d_scan_ref, drawn, ("y",))


@sizes
@pytest.mark.parametrize("optional", OPTIONAL.values(), ids=OPTIONAL)
def test_gradients_are_as_accurate_as_the_reference(
    size: Size, optional: tuple[bool, bool], poisoned_empty: None
) -> None:
    drawn = with_gradient(cases(size, optional))
    assert_as_accurate(ss2d_scan_backward_op, ss2d_scan_backward_ref, drawn, NAMES)


@hypothesis.given(
    size=st.tuples(
        st.integers(1, 2),
        st.integers(1, 20),
        st.sampled_from((1, 3, 8, 10, 16)),
        st.integers(1, 35),
        st.integers(1, 35),
    )
)
@hypothesis.settings(max_examples=40)
def test_bytes_of_four_plain_kernels_at_any_size(size: Size) -> None:
    tensors = operands(size)
    rows, columns, rows_back, columns_back = walked(selective_scan_op, tensors, True)
    want = (rows + rows_back) + (columns + columns_back)
    assert same_bytes(ss2d_scan_op(*tensors, True), want)


@pytest.mark.parametrize("optional", [(True, True), (False, False)])
def test_reference_gradients_in_float64(optional: tuple[bool, bool]) -> None:
    tensors = in_float64(operands((2, 2, 2, 2, 3), *optional))
    leaves = [None if x is None else x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *a: ss2d_scan_op(*a, True), leaves)


@pytest.mark.parametrize("position", range(7))
def test_nan_stays_nan(position: int) -> None:
    tensors = operands((1, 20, 4, 5, 8))
    tensors[position].view(-1)[0] = float("nan")
    want = ss2d_scan_ref(*tensors, True).isnan()
    assert want.any()
    assert torch.equal(ss2d_scan_op(*tensors, True).isnan(), want)


def test_other_dtypes_and_many_states_use_the_reference() -> None:
    for tensors in (
        in_float64(operands((2, 3, 3, 4, 5))),
        operands((1, 2, MAX_STATES + 1, 2, 3)),
    ):
        got = ss2d_scan_op(*tensors, True)
        assert same_bytes(got, ss2d_scan_ref(*tensors, True))


@pytest.mark.parametrize("size", [(3, 18, 10, 6, 7), (3, 33, 16, 20, 5), (2, 5, 20, 7, 1)])
def test_threads_and_batch_mates_change_no_byte(size: Size) -> None:
    tensors = operands(size)
    grad = torch.randn_like(tensors[0])

    def everything(chosen: slice) -> list[Tensor]:
        u, delta, A, B, C, D, bias = tensors
        part = [u[chosen], delta[chosen], A, B[chosen], C[chosen], D, bias]
        gradients = ss2d_scan_backward_op(grad[chosen], *part, True)
        return [ss2d_scan_op(*part, True), *gradients]

    whole = everything(slice(None))
    for count in (1, 2, 3):
        again = with_threads(count, lambda: everything(slice(None)))
        assert all(same_bytes(a, b) for a, b in zip(whole, again, strict=True)), count
    for i in range(size[0]):
        alone = everything(slice(i, i + 1))
        for position in (0, 1, 2, 4, 5):  # y, du, ddelta, dB, dC: what belongs to one sample
            assert same_bytes(whole[position][i : i + 1], alone[position]), (i, position)


def test_strided_operands_give_the_same_bytes() -> None:
    tensors = operands((2, 5, 8, 6, 7))
    want = ss2d_scan(*tensors, True)
    strided = [
        None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1) for x in tensors
    ]
    assert not strided[0].is_contiguous()
    assert same_bytes(ss2d_scan(*strided, True), want)


@pytest.mark.parametrize("size", [(0, 3, 4, 5, 6), (2, 3, 4, 0, 6), (2, 3, 4, 5, 0)])
def test_empty_images_and_batches(size: Size) -> None:
    tensors = operands(size)
    leaves = [x.requires_grad_() for x in tensors]
    y = ss2d_scan_op(*leaves, True)
    assert y.shape == tensors[0].shape
    for x, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert gradient.shape == x.shape
        assert not gradient.isnan().any()


def test_export_with_dynamic_batch_and_sides() -> None:
    size = (2, 3, 4, 6, 5)
    _, _, A, _, _, D, bias = operands(size)

    class Layer(torch.nn.Module):
        def forward(self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
            return ss2d_scan(u, delta, A, B, C, D, bias, True)

    auto = torch.export.Dim.AUTO
    image, projection = dict.fromkeys((0, 2, 3), auto), dict.fromkeys((0, 3, 4), auto)
    u, delta, _, B, C, *_ = operands(size)
    program = torch.export.export(
        Layer(), (u, delta, B, C), dynamic_shapes=(image, image, projection, projection)
    )
    u, delta, _, B, C, *_ = operands((3, 3, 4, 7, 9), seed=1)
    want = ss2d_scan(u, delta, A, B, C, D, bias, True)
    assert same_bytes(program.module()(u, delta, B, C), want)


BAD = {
    "u": (0, (2, 5, 12), r"u must be \(B, D, H, W\)"),
    "delta": (1, (2, 20, 3, 5), "delta must be"),
    "delta-channels": (1, (2, 15, 3, 4), "delta must be"),
    "A": (2, (19, 3), "A must be"),
    "B-rank": (3, (2, 4, 3, 12), "B must be"),
    "B-states": (3, (2, 4, 4, 3, 4), "B must be"),
    "C-directions": (4, (2, 3, 3, 3, 4), "C must be"),
    "D": (5, (5,), "D must be"),
    "delta_bias": (6, (19,), "delta_bias must be"),
}


@pytest.mark.parametrize(("position", "shape", "message"), BAD.values(), ids=BAD)
def test_bad_shapes_are_named(position: int, shape: tuple[int, ...], message: str) -> None:
    tensors = operands((2, 5, 3, 3, 4))
    grad = torch.zeros_like(tensors[0])
    tensors[position] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=f"qmir::ss2d_scan: .*{message}"):
        ss2d_scan_op(*tensors, True)
    with pytest.raises(RuntimeError, match=f"qmir::ss2d_scan: .*{message}"):
        ss2d_scan_backward_op(grad, *tensors, True)
    if position < 5:
        meta = [x.to("meta") for x in tensors]
        with pytest.raises(RuntimeError, match=f"qmir::ss2d_scan: .*{message}"):
            ss2d_scan_op(*meta, True)
