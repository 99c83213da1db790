"""qmir::conv2d and qmir::conv2d_acc: exact accumulators up to the border, one rounding order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.convolutions import NAMED, Case, cases, operands
from support.integers import (
    FILLS,
    codes,
    containers,
    dequantize,
    fills,
    pack_fields,
    same_bytes,
    seeds,
    with_threads,
)
from support.tolerances import AFFINE_RESULT

import qmir_ao.backend.cpu.conv2d  # noqa: F401  (registers the kernels)
from qmir_ao.ops.conv2d import conv2d, conv2d_acc_ref, conv2d_ref


def int64_accumulators(x: np.ndarray, weight: np.ndarray, case: Case) -> np.ndarray:
    (pad_h, pad_w), (step_h, step_w) = case.padding, case.stride
    padded = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (pad_h, pad_h), (pad_w, pad_w)))
    span = tuple(d * (k - 1) + 1 for d, k in zip(case.dilation, case.kernel, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, span, axis=(2, 3))
    windows = windows[:, :, ::step_h, ::step_w, :: case.dilation[0], :: case.dilation[1]]
    batch, _, rows, cols = windows.shape[:4]
    grouped = windows.reshape(batch, case.groups, case.inputs, rows, cols, *case.kernel)
    kernel = weight.astype(np.int64).reshape(case.groups, case.features, case.inputs, *case.kernel)
    return np.einsum("bgcpqij,gocij->bgopq", grouped, kernel).reshape(batch, -1, rows, cols)


def check_accumulators(
    seed: int, case: Case, bits: int, x_bits: int, x_fill: str, w_fill: str
) -> None:
    rng = np.random.default_rng(seed)
    x = codes(rng, case.x_shape(), x_bits, x_fill)
    weight = codes(rng, tuple(case.weight_size()), bits, w_fill)
    args = (torch.from_numpy(x), pack_fields(weight, bits), *case.geometry(bits))
    kernel, reference = torch.ops.qmir.conv2d_acc(*args), conv2d_acc_ref(*args)
    expected = int64_accumulators(x, weight, case)
    assert kernel.dtype == reference.dtype == torch.int32
    assert np.array_equal(kernel.numpy(), expected)
    assert np.array_equal(reference.numpy(), expected)


@settings(max_examples=1000)
@given(seeds, cases, containers, st.sampled_from([2, 4, 8]), fills, fills)
def test_accumulators_match_int64(
    seed: int, case: Case, bits: int, x_bits: int, x_fill: str, w_fill: str
) -> None:
    check_accumulators(seed, case, bits, x_bits, x_fill, w_fill)


@pytest.mark.parametrize("case", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_named_sizes_match_int64(case: Case, bits: int) -> None:
    for fill in FILLS:
        check_accumulators(7, case, bits, 8, fill, fill)


@settings(max_examples=300)
@given(seeds, cases, containers, st.booleans(), st.booleans())
def test_kernel_gives_the_bytes_of_the_reference(
    seed: int, case: Case, bits: int, per_sample: bool, per_row: bool
) -> None:
    args, _ = operands(seed, case, bits, per_sample, per_row)
    assert same_bytes(torch.ops.qmir.conv2d(*args), conv2d_ref(*args))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", NAMED.values(), ids=NAMED)
def test_every_output_is_written(case: Case) -> None:
    args, _ = operands(11, case, 4)
    assert same_bytes(torch.ops.qmir.conv2d(*args), conv2d_ref(*args))


@settings(max_examples=150)
@given(seeds, cases, containers, st.booleans(), st.booleans())
def test_result_is_the_convolution_of_the_dequantized_operands(
    seed: int, case: Case, bits: int, per_sample: bool, per_row: bool
) -> None:
    args, q = operands(seed, case, bits, per_sample, per_row)
    x, x_step, x_shift, _, w_step, w_shift, bias, *_ = args
    layout = (None, case.stride, case.padding, case.dilation, case.groups)
    conv = torch.nn.functional.conv2d
    expected = conv(dequantize(x, x_step, x_shift), dequantize(q, w_step, w_shift), *layout)
    if bias is not None:
        expected = expected + bias.double().reshape(-1, 1, 1)
    alpha, column = x_step.double().reshape(-1, 1, 1, 1), (-1, 1, 1)
    acc = alpha * w_step.double().reshape(column) * conv(x.double(), q.double(), *layout)
    ones = torch.ones(q.shape, dtype=torch.float64)
    sums = alpha * w_shift.double().reshape(column) * conv(x.double(), ones, *layout)
    constant = expected - (acc - sums)
    magnitude = acc.abs() + sums.abs() + constant.abs()
    assert ((torch.ops.qmir.conv2d(*args) - expected).abs() <= AFFINE_RESULT * magnitude).all()


@pytest.mark.parametrize("name", ["body-3x3", "depthwise"])
def test_one_shift_serves_the_steps_of_all_channels(name: str) -> None:
    args, _ = operands(1, NAMED[name], 4)
    shared = args[5][2:3]
    each = shared.repeat(args[4].numel())
    short = torch.ops.qmir.conv2d(*args[:5], shared, *args[6:])
    assert same_bytes(short, torch.ops.qmir.conv2d(*args[:5], each, *args[6:]))


def test_zero_padding_pads_the_value_zero_not_the_code_zero() -> None:
    case = Case(1, 1, 2, 3, (3, 3), (5, 6), (1, 1), (1, 1), (1, 1))
    args, _ = operands(1, case, 4)
    padded = torch.nn.functional.pad(args[0], (1, 1, 1, 1))
    inner = Case(1, 1, 2, 3, (3, 3), (7, 8), (1, 1), (0, 0), (1, 1))
    as_codes = torch.ops.qmir.conv2d(padded, *args[1:8], *inner.geometry(4))
    result = torch.ops.qmir.conv2d(*args)
    assert same_bytes(result[..., 1:-1, 1:-1], as_codes[..., 1:-1, 1:-1])
    assert (result[..., 0, :] != as_codes[..., 0, :]).any()


def test_flipping_one_packed_nibble_is_seen() -> None:
    case = NAMED["body-3x3"]
    args, _ = operands(1, case, 4)
    damaged = args[3].clone()
    damaged[300] ^= 0x01
    changed = torch.ops.qmir.conv2d(*args) != torch.ops.qmir.conv2d(*args[:3], damaged, *args[4:])
    assert changed.any(dim=-1).any(dim=-1).any(dim=0).nonzero().flatten().tolist() == [600 // 540]


@pytest.mark.parametrize("name", ["body-3x3", "depthwise", "pointwise", "tall-image"])
def test_threads_and_batch_mates_do_not_matter(name: str) -> None:
    case = NAMED[name]._replace(batch=3)
    args, _ = operands(5, case, 4)
    single = with_threads(1, lambda: torch.ops.qmir.conv2d(*args))
    for count in (2, 3):
        assert same_bytes(with_threads(count, lambda: torch.ops.qmir.conv2d(*args)), single)
    for i in range(3):
        alone = (args[0][i : i + 1], args[1][i : i + 1], args[2][i : i + 1], *args[3:])
        assert same_bytes(torch.ops.qmir.conv2d(*alone), single[i : i + 1])


def test_empty_batch_and_channels_last_input() -> None:
    args, _ = operands(2, NAMED["body-3x3"], 4, per_sample=False)
    assert torch.ops.qmir.conv2d(args[0][:0], *args[1:]).shape == (0, 60, 9, 13)
    other = args[0].to(memory_format=torch.channels_last)
    assert same_bytes(torch.ops.qmir.conv2d(other, *args[1:]), torch.ops.qmir.conv2d(*args))


def test_export_with_dynamic_batch_height_and_width() -> None:
    case = Case(3, 1, 4, 5, (3, 3), (8, 9), (1, 1), (1, 1), (1, 1))
    args, _ = operands(1, case, 4)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, step: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            size = case.weight_size()
            return conv2d(x, step, shift, *args[3:7], bits=4, weight_size=size, padding=1)

    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    shapes = ({0: batch, 2: height, 3: width}, {0: batch}, {0: batch})
    program = torch.export.export(Layer(), args[:3], dynamic_shapes=shapes)
    other, _ = operands(4, case._replace(batch=2, image=(5, 14)), 4)
    assert same_bytes(program.module()(*other[:3]), conv2d_ref(*other[:3], *args[3:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 3, 6, 7)}, "qmir::conv2d: x must hold int8 codes"),
        ({0: torch.zeros(3, 6, 7, dtype=torch.int8)}, r"x must be \(B, C, H, W\), got 3 axes"),
        ({3: torch.zeros(5, dtype=torch.uint8)}, "weight must be 27 packed bytes"),
        ({1: torch.ones(5)}, "x_step must be float32 of 1 or 2 values"),
        ({5: torch.ones(3)}, "w_shift must be float32 of 1 or 2 values"),
        ({5: torch.ones(2)}, "w_shift must have 1 value or as many as w_step, got 2 and 1"),
        ({6: torch.ones(3)}, r"bias must be float32 of shape \(2,\)"),
        ({8: 5}, "bits must be the container 2, 4 or 8, got 5"),
        ({9: [2, 3, 3]}, "weight_size must be"),
        ({9: [2, 4, 3, 3]}, "C must be groups"),
        ({10: [0, 1]}, r"stride must be two integers >= 1, got \[0, 1\]"),
        ({11: [1, -1]}, "padding must be two integers >= 0"),
        ({12: [1]}, "dilation must be two integers >= 1"),
        ({12: [9, 9]}, "larger than the padded image, got H, W = 6, 7"),
        ({13: 3}, "groups must divide O"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:30],
)
def test_bad_arguments_are_refused(change: dict, message: str) -> None:
    case = Case(2, 1, 3, 2, (3, 3), (6, 7), (1, 1), (1, 1), (1, 1))
    args, _ = operands(1, case, 4, per_row=False)
    bad = [change.get(i, value) for i, value in enumerate(args)]
    for form in (torch.ops.qmir.conv2d, conv2d_ref):
        with pytest.raises(RuntimeError, match=message):
            form(*bad)
