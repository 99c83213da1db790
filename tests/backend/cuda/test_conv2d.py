"""qmir::conv2d on CUDA, run by the simulator: exact up to the border, the reference's bytes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.convolutions import NAMED, SCALES, Case, cases, offsets, operands
from support.host_launcher import needs_compiler
from support.integers import codes, containers, fills, pack_fields, same_bytes, seeds
from support.variants import NATIVE_S4, PRODUCTS, Variant, with_fault

from qmir_ao.backend.cuda.conv2d import Sizes, launch_conv2d, launch_conv2d_acc
from qmir_ao.backend.cuda.launch import NO_DEFINES
from qmir_ao.errors import DeviceError
from qmir_ao.ops.conv2d import Geometry, conv2d_acc_ref, conv2d_ref

pytestmark = needs_compiler

variants = pytest.mark.parametrize("defines", PRODUCTS, ids=["s8", "s4"])
scales = st.sampled_from(sorted(SCALES))

# The named sizes, but for those that are large for the sake of the CPU's blocking, and some that
# are large for these kernels: more features and channels than a tile, taps too far apart to share a
# window, strides beyond the kernel.
SIZES = {name: case for name, case in NAMED.items() if name not in ("tall-image", "wide-image")} | {
    "beyond-a-tile": Case(1, 1, 70, 66, (3, 3), (5, 9), (1, 1), (1, 1), (1, 1)),
    "two-windows": Case(2, 1, 130, 20, (1, 3), (3, 70), (1, 1), (0, 1), (1, 1)),
    "far-taps": Case(1, 2, 5, 6, (5, 5), (31, 33), (1, 1), (7, 7), (8, 8)),
    "far-taps-strided": Case(1, 1, 9, 3, (4, 3), (40, 41), (3, 2), (9, 8), (11, 14)),
    "sparse": Case(1, 1, 4, 5, (2, 2), (23, 29), (5, 4), (0, 1), (1, 1)),
    "grouped": Case(2, 4, 15, 18, (3, 3), (8, 8), (2, 2), (1, 1), (1, 1)),
    "pointwise-strided": Case(1, 1, 60, 60, (1, 1), (9, 11), (2, 2), (0, 0), (1, 1)),
}


def small(case: Case) -> Case:
    """At most two tiles each way: the simulator is slow."""
    return case._replace(image=(min(case.image[0], 11), min(case.image[1], 19)))


@variants
@settings(max_examples=20)
@given(seeds, cases, containers, st.sampled_from([4, 8]), fills, fills)
def test_accumulators_equal_reference(
    defines: Mapping[str, int],
    seed: int,
    case: Case,
    bits: int,
    x_bits: int,
    x_fill: str,
    w_fill: str,
) -> None:
    case = small(case)
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(codes(rng, case.x_shape(), x_bits, x_fill))
    weight = pack_fields(codes(rng, tuple(case.weight_size()), bits, w_fill), bits)
    args = (x, weight, *case.geometry(bits))
    got = launch_conv2d_acc(Variant(defines, seed), *args)
    assert got.dtype == torch.int32 and torch.equal(got, conv2d_acc_ref(*args))


@variants
@settings(max_examples=20)
@given(seeds, cases, containers, st.booleans(), st.booleans(), scales)
def test_kernel_gives_the_bytes_of_the_reference(
    defines: Mapping[str, int],
    seed: int,
    case: Case,
    bits: int,
    per_sample: bool,
    per_row: bool,
    scale: str,
) -> None:
    case = small(case)
    offset = offsets(seed, case, scale, seed % 4 == 0) if seed % 3 else None
    args, _ = operands(seed, case, bits, per_sample, per_row, offset)
    assert same_bytes(launch_conv2d(Variant(defines, seed), *args), conv2d_ref(*args))


@variants
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("name", SIZES)
def test_named_sizes(defines: Mapping[str, int], name: str) -> None:
    case = SIZES[name]
    bits = {0: 2, 1: 4, 2: 8}[len(name) % 3]
    args, _ = operands(11, case, bits, x_offset=offsets(11, case, "ordinary", False))
    narrow = (args[0].clamp(-8, 7), *args[1:])
    for given_args in (args, narrow):
        got = launch_conv2d(Variant(defines, len(name)), *given_args)
        assert same_bytes(got, conv2d_ref(*given_args))
    acc = (args[0], args[3], *args[8:])
    assert torch.equal(launch_conv2d_acc(Variant(defines), *acc), conv2d_acc_ref(*acc))


def test_named_sizes_take_both_kinds_of_window() -> None:
    shared = {}
    for name, case in SIZES.items():
        x = torch.empty(case.x_shape(), device="meta", dtype=torch.int8)
        geometry = Geometry(*case.geometry(4))
        shared[name] = Sizes.of(x, geometry, geometry.out_size(x)).plan().shared
    assert not shared["far-taps"] and not shared["far-taps-strided"]
    assert shared["body-3x3"] and shared["sparse"]


@pytest.mark.parametrize("fill", [-128, 127])
def test_largest_sums_are_exact(fill: int) -> None:
    """Sums of offsets up to 2**62, and of products up to 2**31."""
    case = Case(1, 1, 131071 // 9, 1, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1))
    size = case.weight_size()
    weight = torch.full(size, fill, dtype=torch.int8)
    largest = torch.full((size[1],), 2.0 - 2.0**-23)
    args, _ = operands(1, case, 8, x_offset=largest)
    x = torch.full_like(args[0], -128)
    args = (x, *args[1:3], weight.reshape(-1).view(torch.uint8), *args[4:])
    assert same_bytes(launch_conv2d(Variant(), *args), conv2d_ref(*args))


@pytest.mark.parametrize("name", ["body-3x3", "depthwise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_offset_that_is_not_finite_reaches_every_output(name: str, value: float) -> None:
    case = NAMED[name]
    offset = offsets(3, case, "ordinary", False)
    offset[4] = value
    args, _ = operands(3, case, 4, x_offset=offset)
    assert launch_conv2d(Variant(), *args).isnan().all()


def test_narrow_codes_take_4_bit_products(tmp_path: Path) -> None:
    """With a fault in the 4-bit products, only what is multiplied by them is wrong."""
    right = "mma_s4_m16n8k64(d, rows, columns)"
    folder = with_fault(tmp_path, "qconv2d", right, "(void)0", "qconv2d_prepare")
    args, _ = operands(1, SIZES["grouped"], 4)
    wide = (args[0], args[3], *args[8:])
    narrow = (args[0].clamp(-8, 7), *wide[1:])
    for call, taken in ((narrow, True), (wide, False)):
        got = launch_conv2d_acc(Variant(NATIVE_S4, folder=folder), *call)
        assert torch.equal(got, conv2d_acc_ref(*call)) is not taken


@variants
def test_a_wide_code_may_come_late(defines: Mapping[str, int]) -> None:
    """In the last channel: the 4-bit products of the first 64 and the rest make one sum."""
    case = SIZES["two-windows"]
    args, _ = operands(2, case, 2)
    x = args[0].clamp(-8, 7)
    for channel in (0, 63, 64, 129):
        x[1, channel, 1, 69] = 99
        call = (x, args[3], *args[8:])
        assert torch.equal(launch_conv2d_acc(Variant(defines), *call), conv2d_acc_ref(*call))
        x[1, channel, 1, 69] = 0


@variants
@pytest.mark.parametrize("name", ["body-3x3", "depthwise", "far-taps", "pointwise-strided"])
def test_order_of_threads_and_batch_mates_do_not_matter(
    defines: Mapping[str, int], name: str
) -> None:
    case = SIZES[name]._replace(batch=2, image=(9, 10))
    args, _ = operands(5, case, 4, x_offset=offsets(5, case, "ordinary", False))
    first = launch_conv2d(Variant(defines), *args)
    for seed in range(1, 5):
        assert same_bytes(launch_conv2d(Variant(defines, seed), *args), first)
    for i in range(2):
        alone = (args[0][i : i + 1], args[1][i : i + 1], args[2][i : i + 1], *args[3:])
        assert same_bytes(launch_conv2d(Variant(defines), *alone), first[i : i + 1])


def test_empty_batch_channels_last_and_misaligned_input() -> None:
    args, _ = operands(2, SIZES["grouped"], 4, per_sample=False)
    x, rest = args[0], args[1:]
    wanted = conv2d_ref(*args)
    assert launch_conv2d(Variant(), x[:0], *rest).shape == (0, *wanted.shape[1:])
    last = x.to(memory_format=torch.channels_last)
    assert same_bytes(launch_conv2d(Variant(), last, *rest), wanted)
    flat = torch.zeros(x.numel() + 3, dtype=torch.int8)
    flat[3:] = x.reshape(-1)
    shifted = flat[3:].reshape(x.shape)
    assert same_bytes(launch_conv2d(Variant(), shifted, *rest), wanted)


def test_a_removed_barrier_is_noticed(tmp_path: Path) -> None:
    """A window must not be filled while others still read it."""
    barrier = "      __syncthreads();\n      const uint32_t beyond"
    fault = barrier.replace("__syncthreads();", "")
    folder = with_fault(tmp_path, "qconv2d", barrier, fault, "qconv2d_prepare")
    args, _ = operands(5, SIZES["two-windows"], 4)
    wanted = conv2d_ref(*args)
    got = [launch_conv2d(Variant(NO_DEFINES, seed, folder), *args) for seed in range(4)]
    assert not all(same_bytes(y, wanted) for y in got)


def test_bad_arguments_are_refused() -> None:
    args, _ = operands(1, NAMED["pointwise-padded"], 4)
    with pytest.raises(RuntimeError, match="x must hold int8 codes"):
        launch_conv2d(Variant(), args[0].float(), *args[1:])
    with pytest.raises(DeviceError, match="its tensors are on cpu, meta"):
        launch_conv2d(Variant(), *args[:3], args[3].to("meta"), *args[4:])
    x = torch.empty((1, 1, 2**16, 2**15), device="meta", dtype=torch.int8)
    with pytest.raises(DeviceError, match=r"at most 2\*\*31 - 1 fit"):
        Sizes.of(x, Geometry(4, [1, 1, 3, 3], [1, 1], [1, 1], [1, 1], 1), (2**16, 2**15))
