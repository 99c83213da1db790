"""qmir::selective_scan: kernel against reference against float64, all seven gradients."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from support.cases import SCAN_OPTIONAL as OPTIONAL
from support.cases import SCAN_SIZES as SIZES
from support.cases import scan_operands as operands
from support.integers import same_bytes, with_threads
from support.scans import NAMES, Operands, assert_as_accurate, in_float64, without_softplus
from torch import Tensor

import qmir_ao.backend.cpu.selective_scan as kernels
from qmir_ao.ops.selective_scan import (
    selective_scan,
    selective_scan_backward_op,
    selective_scan_backward_ref,
    selective_scan_op,
    selective_scan_ref,
)

sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def draws(size: tuple[int, int, int, int, int]) -> range:
    """Seeds over which the error is a mean: the reference may hit a few elements by luck."""
    batch, groups, channels, *_ = size
    return range(max(8, -(-64 // (batch * groups * channels))))


def kernel_gradients(tensors: Operands, grad: Tensor, softplus: bool) -> dict[str, Tensor]:
    leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
    y = selective_scan_op(*leaves, softplus)
    given = {name: x for name, x in zip(NAMES, leaves, strict=True) if x is not None}
    return dict(zip(given, torch.autograd.grad(y, given.values(), grad), strict=True))


def cases(
    size: tuple[int, int, int, int, int], optional: tuple[bool, bool], softplus: bool
) -> list[tuple[Any, ...]]:
    drawn = [operands(size, *optional, seed=seed) for seed in draws(size)]
    return [(*(x if softplus else without_softplus(x)), softplus) for x in drawn]


def with_gradient(drawn: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [(torch.randn_like(case[0]), *case) for case in drawn]


@sizes
@pytest.mark.parametrize("optional", OPTIONAL.values(), ids=OPTIONAL)
@pytest.mark.parametrize("softplus", [True, False])
def test_forward_is_as_accurate_as_the_reference(
    size: tuple[int, int, int, int, int],
    optional: tuple[bool, bool],
    softplus: bool,
    poisoned_empty: None,
) -> None:
    drawn = cases(size, optional, softplus)
    assert_as_accurate(selective_scan_op, selective_scan_ref, drawn, ("y",))


@sizes
@pytest.mark.parametrize("optional", OPTIONAL.values(), ids=OPTIONAL)
def test_gradients_are_as_accurate_as_the_reference(
    size: tuple[int, int, int, int, int], optional: tuple[bool, bool], poisoned_empty: None
) -> None:
    drawn = with_gradient(cases(size, optional, True))
    assert_as_accurate(selective_scan_backward_op, selective_scan_backward_ref, drawn, NAMES)


@hypothesis.given(
    size=st.tuples(
        st.integers(1, 3),
        st.integers(1, 4),
        st.integers(1, 40),
        st.sampled_from((1, 2, 3, 4, 8, 10, 16, 20)),
        st.integers(1, 100),
    ),
    optional=st.tuples(st.booleans(), st.booleans()),
    softplus=st.booleans(),
    decay=st.floats(-2.0, 0.5),
)
@hypothesis.settings(max_examples=40)
def test_accuracy_of_any_size(
    size: tuple[int, int, int, int, int],
    optional: tuple[bool, bool],
    softplus: bool,
    decay: float,
) -> None:
    torch.manual_seed(0)
    drawn = cases(size, optional, softplus)
    drawn = [(u, delta, A * 10.0**decay, *rest) for u, delta, A, *rest in drawn]
    assert_as_accurate(selective_scan_op, selective_scan_ref, drawn, ("y",))
    assert_as_accurate(
        selective_scan_backward_op, selective_scan_backward_ref, with_gradient(drawn), NAMES
    )


def test_one_draw_at_the_size_of_the_light_network() -> None:
    """So many elements share the largest error that one draw decides: twice the reference's."""
    case = (*operands((1, 4, 72, 10, 1024)), True)
    assert_as_accurate(selective_scan_op, selective_scan_ref, [case], ("y",))
    assert_as_accurate(
        selective_scan_backward_op, selective_scan_backward_ref, with_gradient([case]), NAMES
    )


def test_every_gradient_arrives() -> None:
    for optional in OPTIONAL.values():
        tensors = operands((1, 2, 3, 4, 5), *optional)
        gradients = kernel_gradients(tensors, torch.ones_like(tensors[0]), True)
        given = [name for name, x in zip(NAMES, tensors, strict=True) if x is not None]
        assert list(gradients) == given


def test_decays_beyond_the_range_of_float32() -> None:
    """Exponents from -4000 to 0 take the clamped path; they vanish, as in the reference."""
    u, _, A, B, C, D, _ = operands((2, 2, 18, 10, 37))
    delta = torch.linspace(0.0, 40.0, 37).expand_as(u).contiguous()
    A = -A.abs() * 30.0
    drawn = [(u, delta, A, B, C, D, None, False)]
    assert_as_accurate(selective_scan_op, selective_scan_ref, drawn, ("y",))
    assert_as_accurate(
        selective_scan_backward_op, selective_scan_backward_ref, with_gradient(drawn), NAMES
    )


@pytest.mark.parametrize("position", range(7))
def test_nan_stays_nan(position: int) -> None:
    tensors = operands((1, 1, 20, 4, 40))
    tensors[position].view(-1)[0] = float("nan")
    want = selective_scan_ref(*tensors, True).isnan()
    assert want.any()
    assert torch.equal(selective_scan_op(*tensors, True).isnan(), want)


@pytest.mark.parametrize("optional", [(True, True), (False, False)])
def test_reference_gradients_in_float64(optional: tuple[bool, bool]) -> None:
    tensors = in_float64(operands((2, 2, 3, 3, 5), *optional))
    leaves = [None if x is None else x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *a: selective_scan_op(*a, True), leaves)
    assert torch.autograd.gradcheck(
        lambda *a: selective_scan_op(*a, False), [leaves[0], leaves[1], *leaves[2:6], None]
    )


def test_softplus_threshold_has_slope_one() -> None:
    size = (1, 1, 4, 3, 9)
    drawn = [(*operands(size, seed=seed), True) for seed in draws(size)]
    drawn = [(u, torch.full_like(u, 25.0), A * 1e-3, *rest) for u, _, A, *rest in drawn]
    assert_as_accurate(
        selective_scan_backward_op, selective_scan_backward_ref, with_gradient(drawn), NAMES
    )


def test_results_and_gradients_have_the_types_of_their_operands() -> None:
    """Under autocast A, D and the bias are float32 beside bf16 sequences."""
    tensors = operands(SIZES["seven-steps"])
    mixed = [t.bfloat16() if i in (0, 1, 3, 4) else t for i, t in enumerate(tensors)]
    y, *found = (
        selective_scan_op(*mixed, True),
        *selective_scan_backward_op(torch.ones_like(mixed[0]), *mixed, True),
    )
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in found] == [t.dtype for t in mixed]
    torch.library.opcheck(selective_scan_op, (*mixed, True), test_utils=("test_faketensor",))


def test_other_dtypes_use_the_reference() -> None:
    tensors = in_float64(operands((2, 2, 5, 3, 7)))
    got = selective_scan_op(*tensors, True)
    assert got.dtype == torch.float64
    assert same_bytes(got, selective_scan_ref(*tensors, True))


def test_more_states_than_the_kernel_holds_use_the_reference() -> None:
    tensors = operands((1, 1, 2, kernels.MAX_STATES + 1, 5))
    assert same_bytes(selective_scan_op(*tensors, True), selective_scan_ref(*tensors, True))


@pytest.mark.parametrize("size", [(3, 4, 18, 10, 37), (3, 2, 33, 16, 100), (2, 1, 5, 20, 7)])
def test_threads_and_batch_mates_change_no_byte(size: tuple[int, int, int, int, int]) -> None:
    tensors = operands(size)
    grad = torch.randn_like(tensors[0])

    def everything(chosen: slice) -> list[Tensor]:
        u, delta, A, B, C, D, bias = tensors
        part = [u[chosen], delta[chosen], A, B[chosen], C[chosen], D, bias]
        gradients = selective_scan_backward_op(grad[chosen], *part, True)
        return [selective_scan_op(*part, True), *gradients]

    whole = everything(slice(None))
    for count in (1, 2, 3):
        again = with_threads(count, lambda: everything(slice(None)))
        assert all(same_bytes(a, b) for a, b in zip(whole, again, strict=True)), count
    for i in range(size[0]):
        alone = everything(slice(i, i + 1))
        for position in (0, 1, 2, 4, 5):  # y, du, ddelta, dB, dC: what belongs to one sample
            assert same_bytes(whole[position][i : i + 1], alone[position]), (i, position)


def test_twenty_runs_give_the_same_bytes(poisoned_empty: None) -> None:
    tensors = operands((2, 4, 18, 10, 37))
    grad = torch.randn_like(tensors[0])
    first = [selective_scan_op(*tensors, True), *selective_scan_backward_op(grad, *tensors, True)]
    for _ in range(19):
        y = selective_scan_op(*tensors, True)
        again = [y, *selective_scan_backward_op(grad, *tensors, True)]
        assert all(same_bytes(a, b) for a, b in zip(first, again, strict=True))


def test_strided_operands_give_the_same_bytes() -> None:
    tensors = operands((2, 2, 5, 8, 37))
    want = selective_scan_op(*tensors, True)
    strided = [
        None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1) for x in tensors
    ]
    assert not strided[0].is_contiguous()
    assert same_bytes(selective_scan_op(*strided, True), want)


def test_empty_sequences_and_batches() -> None:
    for size in ((2, 2, 3, 4, 0), (0, 2, 3, 4, 5)):
        tensors = operands(size)
        y = selective_scan_op(*tensors, True)
        assert y.shape == tensors[0].shape
        gradients = kernel_gradients(tensors, torch.ones_like(y), True)
        for name, x in zip(NAMES, tensors, strict=True):
            assert gradients[name].shape == x.shape
            assert not gradients[name].isnan().any()


def test_wrapper_reads_three_dimensions_as_one_group() -> None:
    u, delta, A, B, C, D, bias = operands((2, 1, 5, 3, 7))
    got = selective_scan(u, delta, A, B[:, 0], C[:, 0], D, bias, True)
    assert same_bytes(got, selective_scan_op(u, delta, A, B, C, D, bias, True))


BAD = {
    "u": (0, (2, 10), "u must be"),
    "delta": (1, (2, 10, 6), "delta must be"),
    "A": (2, (9, 3), "A must be"),
    "B-rank": (3, (2, 3, 7), "B must be"),
    "B-states": (3, (2, 2, 4, 7), "B must be"),
    "C": (4, (2, 2, 4, 7), "C must be"),
    "groups": (3, (2, 3, 3, 7), "multiple"),
    "B-length": (3, (2, 2, 3, 6), "B must be"),
    "B-batch": (3, (1, 2, 3, 7), "B must be"),
    "C-groups": (4, (2, 1, 3, 7), "C must be"),
    "D": (5, (9,), "D must be"),
    "delta_bias": (6, (9,), "delta_bias must be"),
}


# torch.export must not be asked for relations between sizes that it cannot prove: on fake tensors
# fewer are checked.
CHECKED_WHEN_TRACED = ("u", "delta", "A", "B-rank", "B-states", "C", "groups")


@pytest.mark.parametrize(("position", "shape", "message"), BAD.values(), ids=BAD)
def test_bad_shapes_are_named(position: int, shape: tuple[int, ...], message: str) -> None:
    tensors = operands((2, 2, 5, 3, 7))
    grad = torch.zeros_like(tensors[0])
    tensors[position] = torch.zeros(shape)
    with pytest.raises((RuntimeError, IndexError), match=f"qmir::selective_scan: .*{message}"):
        selective_scan_op(*tensors, True)
    with pytest.raises((RuntimeError, IndexError), match=f"qmir::selective_scan: .*{message}"):
        selective_scan_backward_op(grad, *tensors, True)


@pytest.mark.parametrize("case", CHECKED_WHEN_TRACED)
def test_bad_shapes_are_named_while_tracing(case: str) -> None:
    position, shape, message = BAD[case]
    tensors = [x.to("meta") for x in operands((2, 2, 5, 3, 7))]
    tensors[position] = torch.zeros(shape, device="meta")
    with pytest.raises(RuntimeError, match=f"qmir::selective_scan: .*{message}"):
        selective_scan_op(*tensors, True)
