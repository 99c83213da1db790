"""qmir::selective_scan_q: exact where it can be, one order of float operations everywhere."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.integers import code_range, codes, fills, same_bytes, seeds, with_threads
from support.scans_q import SEQUENCES, Size, float64_recurrence, operands
from support.tolerances import SCAN_TABLE, scan_q_roundings

import qmir_ao.backend.cpu.selective_scan_q  # noqa: F401  (registers the kernel)
from qmir_ao.ops.selective_scan_q import (
    ScanArgs,
    scan_table,
    selective_scan_q,
    selective_scan_q_ref,
)

sizes = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 24)
)
widths = st.sampled_from([2, 4, 8])


def dyadic(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Steps that are powers of two, shifts that are multiples of them; and these multiples."""
    step = np.exp2(rng.integers(-3, 3, count)).astype(np.float32)
    multiple = rng.integers(-2, 3, count)
    shift = torch.from_numpy((step * multiple).astype(np.float32))
    return torch.from_numpy(step), shift, multiple


@settings(max_examples=500)
@given(
    seeds, sizes, st.lists(widths, min_size=4, max_size=4), st.lists(fills, min_size=4, max_size=4)
)
def test_undamped_scan_is_exact_against_int64(
    seed: int, size: Size, bits: list[int], fill: list[str]
) -> None:
    batch, groups, channels, states, steps = size
    rng = np.random.default_rng(seed)
    # Every intermediate is an integer multiple of one unit; float32 holds it below 2^24.
    bound = int(np.prod([2 ** (b - 1) + 2 for b in bits]))
    steps = min(steps, (2**24 - 1 - 2**12) // (bound * states))
    assume(steps >= 1)
    sequence, projection = (batch, groups * channels, steps), (batch, groups, states, steps)
    values, tensors, unit = [], [], np.ones(batch)
    for shape, b, kind in zip(
        (sequence, sequence, projection, projection), bits, fill, strict=True
    ):
        step, shift, multiple = dyadic(rng, batch)
        q = codes(rng, shape, b, kind)
        values.append(q.astype(np.int64) - multiple.reshape(-1, *[1] * (len(shape) - 1)))
        tensors += [torch.from_numpy(q), step, shift]
        unit = unit * step.double().numpy()
    u, delta, B, C = values
    A = torch.zeros(groups * channels, states)
    args = ScanArgs(*tensors[:6], A, *tensors[6:], None, None, False, *code_range(bits[1]))
    group = np.repeat(np.arange(groups), channels)
    h = np.zeros((batch, groups * channels, states), np.int64)
    expected = np.zeros(sequence, np.int64)
    for t in range(steps):
        h += (delta[..., t] * u[..., t])[..., None] * B[..., t][:, group]
        expected[..., t] = (C[..., t][:, group] * h).sum(-1)
    scaled = torch.from_numpy(expected * unit.reshape(-1, 1, 1)).float()
    assert torch.equal(torch.ops.qmir.selective_scan_q(*args), scaled)
    assert torch.equal(selective_scan_q_ref(*args), scaled)


@settings(max_examples=250)
@given(seeds, sizes, widths, st.booleans(), st.booleans())
def test_kernel_gives_the_bytes_of_the_reference(
    seed: int, size: Size, bits: int, per_sample: bool, softplus: bool
) -> None:
    args = operands(seed, size, bits, per_sample, softplus)
    if not softplus:  # a negative delta grows without bound
        args = args._replace(delta_shift=args.delta_step * code_range(bits)[0], delta_bias=None)
    assert same_bytes(torch.ops.qmir.selective_scan_q(*args), selective_scan_q_ref(*args))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", SEQUENCES.values(), ids=SEQUENCES)
def test_named_sizes_give_the_bytes_of_the_reference(size: Size, bits: int) -> None:
    args = operands(3, size, bits)
    result = torch.ops.qmir.selective_scan_q(*args)
    assert torch.isfinite(result).all()
    assert same_bytes(result, selective_scan_q_ref(*args))


def test_four_thousand_steps_give_the_bytes_of_the_reference() -> None:
    args = operands(5, (1, 1, 17, 10, 4096), 4)
    assert same_bytes(torch.ops.qmir.selective_scan_q(*args), selective_scan_q_ref(*args))


@settings(max_examples=60)
@given(seeds, sizes, widths, st.booleans())
def test_result_is_close_to_float64(seed: int, size: Size, bits: int, per_sample: bool) -> None:
    args = operands(seed, size, bits, per_sample)
    exact, magnitude, exponent, offset = float64_recurrence(args)
    roundings = scan_q_roundings(size[4], size[3], exponent, offset)
    error = (torch.ops.qmir.selective_scan_q(*args) - exact).abs()
    assert (error <= roundings * 2.0**-24 * magnitude).all()


def test_the_table_holds_delta_and_decays() -> None:
    args = operands(3, (2, 1, 5, 6, 4), 4)
    table = scan_table(args)
    assert table.shape == (2, 5, 16, 8)
    z = args.delta_step.reshape(-1, 1, 1) * torch.arange(-8.0, 8.0) - args.delta_shift.reshape(
        -1, 1, 1
    )
    delta = torch.nn.functional.softplus(z + args.delta_bias.reshape(-1, 1))
    torch.testing.assert_close(table[..., 0], delta, rtol=SCAN_TABLE, atol=0.0)
    decays = torch.exp(table[..., :1] * args.A.reshape(1, 5, 1, 6))
    torch.testing.assert_close(table[..., 1:7], decays, rtol=SCAN_TABLE, atol=0.0)


def test_softplus_is_the_identity_above_its_threshold() -> None:
    args = operands(1, (1, 1, 2, 3, 4), 8)
    args = args._replace(delta_step=torch.full((1,), 2.0), delta_shift=torch.zeros(1))
    delta = scan_table(args)[0, 0, :, 0]
    assert torch.isfinite(delta).all()
    assert delta[-1] == torch.tensor(254.0) + args.delta_bias[0]


def test_changing_one_code_is_seen_from_its_step_on() -> None:
    args = operands(3, (1, 2, 17, 6, 40), 4)
    delta = args.delta.clone()
    delta[0, 18, 9] = 7 if delta[0, 18, 9] != 7 else 6
    changed = torch.ops.qmir.selective_scan_q(*args) != torch.ops.qmir.selective_scan_q(
        *args._replace(delta=delta)
    )
    where = changed[0].nonzero()
    assert where[:, 0].unique().tolist() == [18]
    assert where[:, 1].min() == 9


def test_threads_and_batch_mates_do_not_matter() -> None:
    args = operands(5, (3, 4, 18, 10, 100), 4)
    single = with_threads(1, lambda: torch.ops.qmir.selective_scan_q(*args))
    for count in (2, 3):
        again = with_threads(count, lambda: torch.ops.qmir.selective_scan_q(*args))
        assert same_bytes(again, single)
    per_sample = [f for f in ScanArgs._fields if f not in ("A", "D") and "delta_b" not in f][:12]
    for i in range(3):
        alone = args._replace(**{name: getattr(args, name)[i : i + 1] for name in per_sample})
        assert same_bytes(torch.ops.qmir.selective_scan_q(*alone), single[i : i + 1])


def test_unsigned_codes_and_strided_input() -> None:
    args = operands(7, (2, 2, 5, 4, 21), 8)
    raised = {name: (getattr(args, name).int() + 128).to(torch.uint8) for name in ("delta", "u")}
    unsigned = args._replace(**raised, delta_quant_min=0, delta_quant_max=255)
    result = torch.ops.qmir.selective_scan_q(*unsigned)
    assert same_bytes(result, selective_scan_q_ref(*unsigned))
    strided = args.u.transpose(0, 1).contiguous().transpose(0, 1)
    assert same_bytes(
        torch.ops.qmir.selective_scan_q(*args._replace(u=strided)),
        torch.ops.qmir.selective_scan_q(*args),
    )


def test_empty_sequence() -> None:
    args = operands(3, (2, 1, 4, 3, 1), 4)
    empty = {name: getattr(args, name)[..., :0] for name in ("u", "delta", "B", "C")}
    assert torch.ops.qmir.selective_scan_q(*args._replace(**empty)).shape == (2, 4, 0)


def test_export_with_dynamic_batch_and_length() -> None:
    args = operands(1, (3, 2, 3, 4, 5), 4)

    class Layer(torch.nn.Module):
        def forward(self, *codes: torch.Tensor) -> torch.Tensor:
            limits = {"delta_quant_min": -8, "delta_quant_max": 7}
            return selective_scan_q(
                *codes[:6], args.A, *codes[6:], args.D, args.delta_bias, **limits
            )

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    sequence, projection, scalar = {0: batch, 2: length}, {0: batch, 3: length}, {0: batch}
    shapes = ((sequence, scalar, scalar) * 2 + (projection, scalar, scalar) * 2,)
    program = torch.export.export(Layer(), (*args[:6], *args[7:13]), dynamic_shapes=shapes)
    other = operands(9, (2, 2, 3, 4, 11), 4)
    inputs = (*other[:6], *other[7:13])
    expected = selective_scan_q_ref(*other[:6], args.A, *other[7:13], *args[13:])
    assert same_bytes(program.module()(*inputs), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 4, 5)}, "qmir::selective_scan_q: u must hold int8 or uint8 codes"),
        ({"u": torch.zeros(4, 5, dtype=torch.int8)}, r"u must be \(B, E, L\)"),
        ({"delta": torch.zeros(2, 4, 6, dtype=torch.int8)}, r"delta must hold.*\(2, 4, 5\), got"),
        ({"B": torch.zeros(2, 3, 5, dtype=torch.int8)}, r"B must be \(B, K, N, L\)"),
        ({"C": torch.zeros(2, 1, 3, 4, dtype=torch.int8)}, "C must hold int8 or uint8 codes"),
        ({"A": torch.zeros(4, 2)}, r"A must be float32 of shape \(4, 3\), got \(4, 2\)"),
        ({"D": torch.zeros(3)}, r"D must be float32 of shape \(4,\)"),
        ({"delta_bias": torch.zeros(4).double()}, "delta_bias must be float32"),
        ({"B_step": torch.ones(3)}, "B_step must be float32 of 1 or 2 values"),
        ({"delta_quant_max": 6}, r"delta holds codes outside -8\.\.6; quantize it"),
        ({"delta_quant_max": 900}, "codes must fit 2..8 bits"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:30],
)
def test_bad_arguments_are_refused(change: dict, message: str) -> None:
    args = operands(1, (2, 1, 4, 3, 5), 4)
    args.delta[1, 3, 4] = 7
    for form in (torch.ops.qmir.selective_scan_q, selective_scan_q_ref):
        with pytest.raises(RuntimeError, match=message):
            form(*args._replace(**change))


def test_channels_must_divide_into_groups() -> None:
    args = operands(1, (1, 2, 3, 4, 5), 4)
    odd = args._replace(u=args.u[:, :5], delta=args.delta[:, :5], A=args.A[:5], D=None)
    with pytest.raises(RuntimeError, match=r"E must be a multiple of K.*got E = 5, K = 2, N = 4"):
        torch.ops.qmir.selective_scan_q(*odd._replace(delta_bias=None))
