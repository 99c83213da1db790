"""qmir::linear on CUDA, run by the simulator: exact sums and the reference's bytes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.host_launcher import needs_compiler
from support.integers import (
    codes,
    containers,
    fills,
    grid,
    linear_operands,
    pack_fields,
    same_bytes,
    seeds,
)
from support.variants import NATIVE_S4, PRODUCTS, Variant, with_fault
from torch import Tensor

from qmir_ao.backend.cuda.launch import NO_DEFINES
from qmir_ao.backend.cuda.linear import launch_linear, launch_linear_acc
from qmir_ao.errors import DeviceError
from qmir_ao.ops._integer import MAX_TAPS
from qmir_ao.ops.linear import linear_ref

pytestmark = needs_compiler

variants = pytest.mark.parametrize("defines", PRODUCTS, ids=["s8", "s4"])
sizes = st.tuples(st.integers(1, 19), st.integers(1, 70), st.integers(1, 70))
# Rows, inputs, features: below and above the tiles, aligned to 16 bytes, 4 bytes, and none.
NAMED = {
    "one": (1, 1, 1),
    "tile": (64, 64, 64),
    "light": (70, 60, 66),
    "expanded": (65, 144, 70),
    "deep": (5, 360, 130),
    "odd": (67, 131, 65),
}


def accumulators(
    defines: Mapping[str, int], seed: int, x: np.ndarray, weight: np.ndarray, bits: int
) -> Tensor:
    packed = pack_fields(weight, bits)
    launch = Variant(defines, seed)
    return launch_linear_acc(launch, torch.from_numpy(x), packed, bits, weight.shape[0])


def exact(x: np.ndarray, weight: np.ndarray) -> Tensor:
    return torch.from_numpy((x.astype(np.int64) @ weight.astype(np.int64).T).astype(np.int32))


@variants
@settings(max_examples=20)
@given(seeds, sizes, containers, st.sampled_from([2, 4, 8]), fills, fills)
def test_accumulators_match_int64(
    defines: Mapping[str, int],
    seed: int,
    size: tuple[int, int, int],
    bits: int,
    x_bits: int,
    x_fill: str,
    w_fill: str,
) -> None:
    rng = np.random.default_rng(seed)
    x = codes(rng, size[:2], x_bits, x_fill)
    weight = codes(rng, (size[2], size[1]), bits, w_fill)
    assert torch.equal(accumulators(defines, seed, x, weight, bits), exact(x, weight))


@variants
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", NAMED)
def test_named_sizes(defines: Mapping[str, int], name: str, bits: int) -> None:
    rows, inputs, features = NAMED[name]
    rng = np.random.default_rng(bits)
    for x_bits in (4, 8):
        x = codes(rng, (rows, inputs), x_bits, "random")
        weight = codes(rng, (features, inputs), bits, "random")
        assert torch.equal(accumulators(defines, bits, x, weight, bits), exact(x, weight))
    args, _ = linear_operands(7, (rows, inputs), features, bits, True, True)
    assert same_bytes(launch_linear(Variant(defines, bits), *args), linear_ref(*args))


@pytest.mark.parametrize("bits", [4, 8])
def test_largest_sums_do_not_overflow(bits: int) -> None:
    """Nibbles are multiplied by 16 times their value, and the sums still fit."""
    rng = np.random.default_rng(0)
    x, weight = codes(rng, (1, MAX_TAPS), 8, "min"), codes(rng, (2, MAX_TAPS), bits, "min")
    assert torch.equal(accumulators(NO_DEFINES, 0, x, weight, bits), exact(x, weight))


@variants
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("at", [0, 63, 64, 199])
def test_a_wide_code_may_come_late(defines: Mapping[str, int], bits: int, at: int) -> None:
    """The 4-bit products so far and the 8-bit ones from there on make one sum."""
    rng = np.random.default_rng(at)
    x, weight = codes(rng, (70, 200), 4, "random"), codes(rng, (66, 200), bits, "random")
    for code in (8, -9, 127, -128):
        x[69, at] = code
        assert torch.equal(accumulators(defines, at, x, weight, bits), exact(x, weight))


@pytest.mark.parametrize("bits", [2, 4])
def test_narrow_codes_take_4_bit_products(tmp_path: Path, bits: int) -> None:
    """With a fault in the 4-bit products, only what is multiplied by them is wrong."""
    folder = with_fault(tmp_path, "qlinear", "mma_s4_m16n8k64(d, rows, columns)", "(void)0")
    rng = np.random.default_rng(0)
    weight = codes(rng, (9, 70), bits, "random")
    packed = pack_fields(weight, bits)
    for x_bits, taken in ((4, True), (8, False)):
        x = codes(rng, (9, 70), x_bits, "ends")
        launch = Variant(NATIVE_S4, folder=folder)
        got = launch_linear_acc(launch, torch.from_numpy(x), packed, bits, 9)
        assert torch.equal(got, exact(x, weight)) is not taken


@variants
@settings(max_examples=20)
@given(seeds, sizes, containers, st.booleans(), st.booleans())
def test_kernel_gives_the_bytes_of_the_reference(
    defines: Mapping[str, int],
    seed: int,
    size: tuple[int, int, int],
    bits: int,
    per_sample: bool,
    per_row: bool,
) -> None:
    rows, inputs, features = size
    shape = (3, rows, inputs) if seed % 3 else (rows, inputs)
    args, _ = linear_operands(seed, shape, features, bits, per_sample, per_row)
    assert same_bytes(launch_linear(Variant(defines, seed), *args), linear_ref(*args))


@variants
def test_steps_of_each_token(defines: Mapping[str, int]) -> None:
    args, _ = linear_operands(1, (2, 50, 60), 66, 4, True, True)
    tokens = grid(np.random.default_rng(1), 100)
    args = (args[0], *tokens, *args[3:])
    assert same_bytes(launch_linear(Variant(defines), *args), linear_ref(*args))


@pytest.mark.parametrize("bias", [0.0, 1e-30, 1.0, 3e38, None])
@pytest.mark.parametrize("w_shift", [0.0, 1e-38, 0.3, 1e30])
def test_constants_of_extreme_rows(w_shift: float, bias: float | None) -> None:
    """Where two floats do not decide the constant of a row, the double arithmetic does."""
    args, _ = linear_operands(1, (12, 33), 66, 4, True, True)
    step = torch.full((12,), 0.125)
    inf, nan = float("inf"), float("nan")
    shift = torch.tensor([0.0, -0.0, 1e-45, -1e-38, 1e-20, 0.3, -7.0, 1e20, 3e38, inf, -inf, nan])
    b = None if bias is None else torch.full((66,), bias) * torch.linspace(-1, 1, 66)
    args = (args[0], step, shift, args[3], args[4], torch.full((66,), w_shift), b, *args[7:])
    got, wanted = launch_linear(Variant(), *args), linear_ref(*args)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert same_bytes(got.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))


def test_constants_decided_by_two_floats_are_those_of_doubles() -> None:
    """Many rows and features whose bias nearly cancels the rest, on and beside the boundaries."""
    args, _ = linear_operands(1, (300, 5), 128, 8, True, True)
    beta = torch.linspace(0.5, 2.0, 300)
    constant = (5 * args[5].double() - args[4].double() * 3) * beta[150].double()
    args = (args[0], args[1], beta, *args[3:6], (-constant).float(), *args[7:])
    assert same_bytes(launch_linear(Variant(), *args), linear_ref(*args))


@variants
def test_order_of_threads_and_batch_mates_do_not_matter(defines: Mapping[str, int]) -> None:
    args, _ = linear_operands(5, (3, 30, 61), 70, 4, True, True)
    args = (args[0].clamp(-8, 7), *args[1:])
    first = launch_linear(Variant(defines), *args)
    for seed in range(1, 6):
        assert same_bytes(launch_linear(Variant(defines, seed), *args), first)
    for i in range(3):
        alone = (args[0][i : i + 1], args[1][i : i + 1], args[2][i : i + 1], *args[3:])
        assert same_bytes(launch_linear(Variant(defines), *alone), first[i : i + 1])


@pytest.mark.parametrize("inputs", [48, 60, 61])
def test_misaligned_and_strided_views(inputs: int) -> None:
    args, _ = linear_operands(3, (7, 9, inputs), 11, 4, False, True)
    flat = torch.zeros(7 * 9 * inputs + 1, dtype=torch.int8)
    flat[1:] = args[0].reshape(-1)
    shifted = flat[1:].reshape(args[0].shape)
    assert same_bytes(launch_linear(Variant(), shifted, *args[1:]), linear_ref(*args))
    strided = args[0].transpose(0, 1)
    wanted = linear_ref(strided, *args[1:])
    assert same_bytes(launch_linear(Variant(), strided, *args[1:]), wanted)
    assert launch_linear(Variant(), args[0][:0], *args[1:]).shape == (0, 9, 11)


def test_a_flipped_nibble_is_noticed() -> None:
    args, _ = linear_operands(1, (1, 8, 60), 16, 4, True, True)
    damaged = args[3].clone()
    damaged[7] ^= 0x10
    got = launch_linear(Variant(), *args[:3], damaged, *args[4:])
    assert (got != linear_ref(*args)).any(dim=(0, 1)).nonzero().flatten().tolist() == [0]


def test_bad_arguments_are_refused() -> None:
    args, _ = linear_operands(1, (2, 3, 10), 6, 4, True, True)
    with pytest.raises(RuntimeError, match="x must hold int8 codes"):
        launch_linear(Variant(), args[0].float(), *args[1:])
    elsewhere = args[3].to("meta")
    with pytest.raises(DeviceError, match="its tensors are on cpu, meta"):
        launch_linear(Variant(), *args[:3], elsewhere, *args[4:])
