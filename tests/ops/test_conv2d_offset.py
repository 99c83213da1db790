"""The channel offsets of qmir::conv2d: inside the image only, the same bytes in every form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.convolutions import NAMED, SCALES, Case, cases, offsets, operands
from support.integers import containers, dequantize, same_bytes, seeds, with_threads
from support.tolerances import AFFINE_RESULT, OFFSET_ROUNDING
from torch.nn.functional import conv2d as float_conv2d

import qmir_ao.backend.cpu.conv2d  # noqa: F401  (registers the kernels)
from qmir_ao.ops._integer import MAX_TAPS, fixed_point
from qmir_ao.ops.conv2d import conv2d, conv2d_ref

KERNEL = torch.ops.qmir.conv2d
scales = st.sampled_from(sorted(SCALES))
batches = st.sampled_from([1, 3])


def with_offset(args: tuple, x_offset: torch.Tensor | None) -> tuple:
    return (*args[:7], x_offset, *args[8:])


def check_against_float64(args: tuple, q: torch.Tensor, case: Case) -> None:
    x, x_step, x_shift, _, w_step, w_shift, bias, x_offset, *_ = args
    layout = (None, case.stride, case.padding, case.dilation, case.groups)
    offset = x_offset.double().reshape(-1, 1, 1)
    weight = dequantize(q, w_step, w_shift)
    expected = float_conv2d(dequantize(x, x_step, x_shift) - offset, weight, *layout)
    if bias is not None:
        expected = expected + bias.double().reshape(-1, 1, 1)
    alpha, column = x_step.double().reshape(-1, 1, 1, 1), (-1, 1, 1)
    step, shift = (t.double().reshape(-1, 1, 1, 1) for t in (w_step, w_shift))
    acc = alpha * step.reshape(column) * float_conv2d(x.double(), q.double(), *layout)
    each = torch.ones(q.shape, dtype=torch.float64)
    sums = alpha * shift.reshape(column) * float_conv2d(x.double(), each, *layout)
    magnitude = acc.abs() + sums.abs() + (expected - (acc - sums)).abs()
    operand = step.abs() * q.double().abs() + shift.abs()
    image = offset.abs().max().expand(1, *x.shape[1:])
    rounded = OFFSET_ROUNDING * float_conv2d(image, operand, *layout)
    assert ((KERNEL(*args) - expected).abs() <= AFFINE_RESULT * magnitude + rounded).all()


@settings(max_examples=400)
@given(seeds, cases, containers, batches, scales, st.booleans(), st.booleans())
def test_result_is_the_convolution_of_the_shifted_image_in_float64(
    seed: int, case: Case, bits: int, batch: int, scale: str, single: bool, per_row: bool
) -> None:
    case = case._replace(batch=batch)
    offset = offsets(seed, case, scale, single)
    args, q = operands(seed, case, bits, seed % 5 > 0, per_row, offset)
    check_against_float64(args, q, case)


@settings(max_examples=400)
@given(seeds, cases, containers, batches, scales, st.booleans(), st.booleans())
def test_kernel_gives_the_bytes_of_the_reference(
    seed: int, case: Case, bits: int, batch: int, scale: str, single: bool, per_row: bool
) -> None:
    case = case._replace(batch=batch)
    offset = offsets(seed, case, scale, single)
    args, _ = operands(seed, case, bits, seed % 5 > 0, per_row, offset)
    assert same_bytes(KERNEL(*args), conv2d_ref(*args))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", NAMED.values(), ids=NAMED)
def test_named_sizes_match_float64_and_the_bytes_of_the_reference(case: Case) -> None:
    args, q = operands(11, case, 4, x_offset=offsets(11, case, "ordinary", False))
    check_against_float64(args, q, case)
    assert same_bytes(KERNEL(*args), conv2d_ref(*args))


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (5, 7)])
@pytest.mark.parametrize("fill", [-128, 127])
def test_largest_sums_are_exact(kernel: tuple[int, int], fill: int) -> None:
    """Sums of 2**62: signed partial sums of them would overflow, doubles must round them alike."""
    taps = kernel[0] * kernel[1]
    case = Case(1, 1, MAX_TAPS // taps, 1, kernel, (3, 3), (1, 1), (2, 3), (1, 1))
    size = case.weight_size()
    weight = torch.full(size, fill, dtype=torch.int8)
    largest = torch.full((size[1],), 2.0 - 2.0**-23)
    args, _ = operands(1, case, 8, x_offset=largest)
    args = (*args[:3], weight.reshape(-1).view(torch.uint8), *args[4:])
    assert fixed_point(largest)[0].unique().item() == 2**38 - 2**14
    got = KERNEL(*args)
    assert same_bytes(got, conv2d_ref(*args))
    check_against_float64(args, weight, case)


@settings(max_examples=100)
@given(seeds, cases, containers, st.booleans())
def test_an_offset_of_zero_gives_the_bytes_of_none(
    seed: int, case: Case, bits: int, single: bool
) -> None:
    args, _ = operands(seed, case, bits)
    zero = with_offset(args, offsets(seed, case, "zero", single))
    for form in (KERNEL, conv2d_ref):
        assert same_bytes(form(*zero), form(*args))


@pytest.mark.parametrize("name", ["body-3x3", "depthwise", "pointwise"])
def test_any_shape_and_one_value_for_all_give_equal_bytes(name: str) -> None:
    case = NAMED[name]
    channels = case.groups * case.inputs
    one = torch.tensor([0.7])
    args, _ = operands(1, case, 4, x_offset=one)
    want = KERNEL(*args)
    for shape in ((channels,), (channels, 1, 1), (1, channels, 1)):
        assert same_bytes(KERNEL(*with_offset(args, one.expand(channels).reshape(shape))), want)
    for shape in ((), (1, 1, 1)):
        assert same_bytes(KERNEL(*with_offset(args, one.reshape(shape))), want)


@pytest.mark.parametrize("name", ["body-3x3", "depthwise-dilated"])
def test_an_offset_stops_at_the_border_of_the_image(name: str) -> None:
    case = NAMED[name]
    args, _ = operands(2, case, 4)
    args = (*args[:2], torch.zeros_like(args[2]), *args[3:])
    pad_h, pad_w = case.padding
    size = case._replace(image=(case.image[0] + 2 * pad_h, case.image[1] + 2 * pad_w))
    wide = (torch.nn.functional.pad(args[0], (pad_w, pad_w, pad_h, pad_h)), *args[1:8])
    geometry = size._replace(padding=(0, 0)).geometry(4)
    offset = offsets(2, case, "ordinary", False)
    got = KERNEL(*with_offset(args, offset)).double()
    everywhere = KERNEL(*with_offset((*wide, *geometry), offset)).double()
    inner = (..., slice(pad_h, -pad_h), slice(pad_w, -pad_w))
    assert torch.equal(got[inner], everywhere[inner])
    edge = (got - everywhere).abs()
    edge[inner] = 1.0
    assert float((edge > 0.1).double().mean()) > 0.9


@pytest.mark.parametrize("name", ["body-3x3", "depthwise", "pointwise", "tall-image"])
def test_threads_and_batch_mates_do_not_matter(name: str) -> None:
    case = NAMED[name]._replace(batch=3)
    args, _ = operands(5, case, 4, x_offset=offsets(5, case, "ordinary", False))
    single = with_threads(1, lambda: KERNEL(*args))
    for count in (2, 3):
        assert same_bytes(with_threads(count, lambda: KERNEL(*args)), single)
    for i in range(3):
        alone = (args[0][i : i + 1], args[1][i : i + 1], args[2][i : i + 1], *args[3:])
        assert same_bytes(KERNEL(*alone), single[i : i + 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_offset_that_is_not_finite_reaches_every_output(value: float) -> None:
    case = NAMED["depthwise"]
    offset = offsets(3, case, "ordinary", False)
    offset[4] = value
    args, _ = operands(3, case, 4, x_offset=offset)
    for form in (KERNEL, conv2d_ref):
        assert form(*args).isnan().all()


@settings(max_examples=200)
@given(seeds, scales, st.integers(1, 40))
def test_fixed_point_rounds_to_39_bits_of_the_largest_offset(
    seed: int, scale: str, channels: int
) -> None:
    case = Case(1, 1, channels, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1))
    offset = offsets(seed, case, scale, False)
    fixed, unit = fixed_point(offset)
    assert np.log2(unit) % 1 == 0 and int(fixed.abs().max()) <= 2**38
    error = (fixed.double() * unit - offset.double()).abs().max()
    assert error <= unit / 2
    assert unit / 2 <= 2.0**-38 * float(offset.abs().max()) or not offset.any()


def test_the_wrapper_passes_the_offset_on() -> None:
    case = NAMED["body-3x3"]
    args, _ = operands(1, case, 4, x_offset=offsets(1, case, "ordinary", False))
    settings = {"bits": 4, "weight_size": case.weight_size(), "padding": 1}
    assert same_bytes(conv2d(*args[:7], x_offset=args[7], **settings), KERNEL(*args))
    assert not same_bytes(conv2d(*args[:7], **settings), KERNEL(*args))


@pytest.mark.parametrize(
    "offset",
    [torch.ones(5), torch.ones(0), torch.ones(6, dtype=torch.float64), torch.ones(1).half()],
    ids=["five", "none", "double", "half"],
)
def test_bad_offsets_are_refused(offset: torch.Tensor) -> None:
    case = Case(2, 2, 3, 2, (3, 3), (6, 7), (1, 1), (1, 1), (1, 1))
    args, _ = operands(1, case, 4, x_offset=offset)
    for form in (KERNEL, conv2d_ref):
        with pytest.raises(RuntimeError, match=r"x_offset must be float32 of 1 or 6 values"):
            form(*args)
