"""qmir::linear and qmir::linear_acc: exact accumulators, one rounding order, clear refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.integers import (
    FILLS,
    code_range,
    codes,
    containers,
    dequantize,
    fills,
    grid,
    pack_fields,
    same_bytes,
    seeds,
    with_threads,
)
from support.tolerances import AFFINE_RESULT

import qmir_ao.backend.cpu.linear  # noqa: F401  (registers the kernels)
from qmir_ao.ops.linear import linear, linear_acc, linear_acc_ref, linear_ref

sizes = st.tuples(st.integers(1, 19), st.integers(1, 70), st.integers(1, 70))


def operands(
    seed: int, shape: tuple[int, ...], features: int, bits: int, per_sample: bool, per_row: bool
) -> tuple:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(codes(rng, shape, 8, "random"))
    weight = codes(rng, (features, shape[-1]), bits, "random")
    x_grid = grid(rng, shape[0] if per_sample else 1)
    w_step, w_shift = grid(rng, features if per_row else 1)
    w_grid = (w_step, w_shift[:1] if seed % 3 == 2 else w_shift)
    bias = torch.from_numpy(rng.normal(size=features).astype(np.float32)) if seed % 2 else None
    return (x, *x_grid, pack_fields(weight, bits), *w_grid, bias, bits, features), weight


@settings(max_examples=800)
@given(seeds, sizes, containers, st.sampled_from([2, 4, 8]), fills, fills)
def test_accumulators_match_int64(
    seed: int, size: tuple[int, int, int], bits: int, x_bits: int, x_fill: str, w_fill: str
) -> None:
    rows, inputs, features = size
    rng = np.random.default_rng(seed)
    x = codes(rng, (rows, inputs), x_bits, x_fill)
    weight = codes(rng, (features, inputs), bits, w_fill)
    packed = pack_fields(weight, bits)
    expected = x.astype(np.int64) @ weight.astype(np.int64).T
    kernel = linear_acc(torch.from_numpy(x), packed, bits=bits, out_features=features)
    reference = linear_acc_ref(torch.from_numpy(x), packed, bits, features)
    assert kernel.dtype == reference.dtype == torch.int32
    assert np.array_equal(kernel.numpy(), expected)
    assert np.array_equal(reference.numpy(), expected)


@pytest.mark.parametrize("inputs", [1, 3, 4, 60, 65, 131071], ids=lambda n: f"K{n}")
@pytest.mark.parametrize("w_fill", FILLS[1:])
@pytest.mark.parametrize("x_fill", FILLS[1:])
def test_extreme_codes_do_not_overflow(inputs: int, w_fill: str, x_fill: str) -> None:
    rng = np.random.default_rng(inputs)
    x, weight = codes(rng, (2, inputs), 8, x_fill), codes(rng, (3, inputs), 8, w_fill)
    packed = torch.from_numpy(weight.reshape(-1).view(np.uint8).copy())
    acc = linear_acc(torch.from_numpy(x), packed, bits=8, out_features=3)
    assert np.array_equal(acc.numpy(), x.astype(np.int64) @ weight.astype(np.int64).T)


@settings(max_examples=250)
@given(seeds, sizes, containers, st.booleans(), st.booleans())
def test_kernel_gives_the_bytes_of_the_reference(
    seed: int, size: tuple[int, int, int], bits: int, per_sample: bool, per_row: bool
) -> None:
    rows, inputs, features = size
    shape = (3, rows, inputs) if seed % 3 else (rows, inputs)
    args, _ = operands(seed, shape, features, bits, per_sample, per_row)
    assert same_bytes(torch.ops.qmir.linear(*args), linear_ref(*args))


@settings(max_examples=100)
@given(seeds, sizes, containers, st.booleans(), st.booleans())
def test_result_is_the_product_of_the_dequantized_operands(
    seed: int, size: tuple[int, int, int], bits: int, per_sample: bool, per_row: bool
) -> None:
    rows, inputs, features = size
    args, weight = operands(seed, (2, rows, inputs), features, bits, per_sample, per_row)
    x, x_step, x_shift, _, w_step, w_shift, bias, *_ = args
    q = torch.from_numpy(weight)
    bias64 = None if bias is None else bias.double()
    expected = torch.nn.functional.linear(
        dequantize(x, x_step, x_shift), dequantize(q, w_step, w_shift), bias64
    )
    alpha, step = x_step.double().reshape(-1, 1, 1), w_step.double()
    acc = (alpha * step * (x.double() @ q.double().t())).abs()
    sums = (alpha * w_shift.double() * x.double().sum(-1, keepdim=True)).abs()
    magnitude = acc + sums + (expected.abs() + acc + sums)
    assert ((linear_ref(*args) - expected).abs() <= AFFINE_RESULT * magnitude).all()


def test_flipping_one_packed_nibble_is_seen() -> None:
    args, weight = operands(1, (1, 8, 60), 16, 4, True, True)
    damaged = args[3].clone()
    damaged[7] ^= 0x10
    clean = torch.ops.qmir.linear(*args)
    assert not same_bytes(torch.ops.qmir.linear(*args[:3], damaged, *args[4:]), clean)
    row = 7 * 2 // weight.shape[1]
    changed = (torch.ops.qmir.linear(*args[:3], damaged, *args[4:]) != clean).any(dim=(0, 1))
    assert changed.nonzero().flatten().tolist() == [row]


def test_threads_and_batch_mates_do_not_matter() -> None:
    args, _ = operands(5, (3, 700, 61), 150, 4, True, True)
    single = with_threads(1, lambda: torch.ops.qmir.linear(*args))
    for count in (2, 3):
        assert same_bytes(with_threads(count, lambda: torch.ops.qmir.linear(*args)), single)
    for i in range(3):
        alone = (args[0][i : i + 1], args[1][i : i + 1], args[2][i : i + 1], *args[3:])
        assert same_bytes(torch.ops.qmir.linear(*alone), single[i : i + 1])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 3, 4, 9), (50, 64)], ids=str)
def test_every_output_is_written(shape: tuple[int, ...]) -> None:
    args, _ = operands(3, shape, 33, 2, False, True)
    assert same_bytes(torch.ops.qmir.linear(*args), linear_ref(*args))


def test_one_axis_empty_batch_and_strided_input() -> None:
    args, _ = operands(2, (4, 6, 10), 5, 8, False, False)
    x, rest = args[0], args[1:]
    flat = torch.ops.qmir.linear(x[0, 0], *rest)
    assert same_bytes(flat, torch.ops.qmir.linear(x, *rest)[0, 0])
    assert torch.ops.qmir.linear(x[:0], *rest).shape == (0, 6, 5)
    strided = x.transpose(0, 1)
    assert same_bytes(
        torch.ops.qmir.linear(strided, *rest), torch.ops.qmir.linear(strided.contiguous(), *rest)
    )


def test_export_with_a_dynamic_batch() -> None:
    args, _ = operands(1, (3, 5, 10), 6, 4, True, True)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, step: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            return linear(x, step, shift, *args[3:7], bits=4, out_features=6)

    batch, rows = torch.export.Dim("batch"), torch.export.Dim("rows")
    shapes = ({0: batch, 1: rows}, {0: batch}, {0: batch})
    program = torch.export.export(Layer(), args[:3], dynamic_shapes=shapes)
    other, _ = operands(4, (2, 9, 10), 6, 4, True, True)
    result = program.module()(*other[:3])
    assert same_bytes(result, linear_ref(*other[:3], *args[3:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 3, 10)}, r"qmir::linear: x must hold int8 codes, got torch.float32"),
        ({0: torch.zeros(2, 10, dtype=torch.uint8)}, "subtract 128"),
        ({3: torch.zeros(29, dtype=torch.uint8)}, r"weight must be 30 packed bytes.*got \(29,\)"),
        ({3: torch.zeros(30, dtype=torch.int8)}, "as uint8.*make it with qmir::pack"),
        ({7: 3}, "bits must be the container 2, 4 or 8, got 3"),
        ({8: 0}, "out_features must be >= 1, got 0"),
        ({1: torch.ones(3), 2: torch.ones(3)}, r"x_step must be float32 of 1 or 2 values"),
        ({2: torch.ones(2, dtype=torch.float64)}, "x_shift must be float32"),
        ({4: torch.ones(1)}, "w_shift must have 1 value or as many as w_step, got 6 and 1"),
        ({5: torch.ones(2)}, r"w_shift must be float32 of 1 or 6 values, got \(2,\)"),
        ({6: torch.ones(5)}, r"bias must be float32 of shape \(6,\), got \(5,\)"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:30],
)
def test_bad_arguments_are_refused(change: dict, message: str) -> None:
    args, _ = operands(1, (2, 3, 10), 6, 4, True, True)
    bad = [change.get(i, value) for i, value in enumerate(args)]
    for form in (torch.ops.qmir.linear, linear_ref):
        with pytest.raises(RuntimeError, match=message):
            form(*bad)


def test_a_product_that_could_overflow_is_refused() -> None:
    x = torch.zeros(1, 131072, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="at most 131071 products fit an int32 accumulator"):
        linear_acc(x, torch.zeros(131072, dtype=torch.uint8), bits=8, out_features=1)


def test_one_shift_serves_the_steps_of_all_features() -> None:
    args, _ = operands(1, (2, 5, 10), 6, 4, True, True)
    shared = args[5][2:3]
    short = torch.ops.qmir.linear(*args[:5], shared, *args[6:])
    assert same_bytes(short, torch.ops.qmir.linear(*args[:5], shared.repeat(6), *args[6:]))


def test_code_ranges_are_those_of_two_complement() -> None:
    assert [code_range(bits) for bits in (2, 4, 8)] == [(-2, 1), (-8, 7), (-128, 127)]
