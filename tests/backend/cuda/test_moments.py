"""Statistics of the results of linear and conv2d on CUDA, run by the simulator."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from support.convolutions import NAMED, Case, offsets, operands
from support.epilogues import LAYOUTS, ending, same_values
from support.host_launcher import HostKernelError, needs_compiler
from support.integers import linear_operands, same_bytes
from support.moments import assert_moments, with_constant_channel
from support.variants import FLOAT_PAIRS, NATIVE_S4, Variant, with_fault
from torch import Tensor

from qmir_ao.backend.cuda.conv2d import launch_conv2d, launch_conv2d_moments
from qmir_ao.backend.cuda.launch import NO_DEFINES
from qmir_ao.backend.cuda.linear import launch_linear, launch_linear_moments
from qmir_ao.backend.cuda.moments import PART_DOUBLES, Room, merge
from qmir_ao.errors import DeviceError
from qmir_ao.ops._epilogue import Epilogue

pytestmark = needs_compiler

ORIN = MappingProxyType({**NATIVE_S4, **FLOAT_PAIRS})
variants = pytest.mark.parametrize("defines", [NO_DEFINES, ORIN], ids=["hopper", "orin"])

# Shape of x, features: rows that are no multiple of a tile, in one sample and in several; samples
# of one row; a vector.
ROWS = {
    "tile": ((1, 64, 64), 64),
    "samples": ((3, 7, 13), 5),
    "tiles": ((2, 135, 20), 70),
    "image": ((2, 5, 14, 60), 66),
    "tokens": ((5, 13), 9),
    "vector": ((33,), 6),
}
CASES = {
    "body": NAMED["body-3x3"],
    "beyond a tile": Case(1, 1, 70, 66, (3, 3), (5, 9), (1, 1), (1, 1), (1, 1)),
    "grouped, strided": Case(2, 4, 15, 18, (3, 3), (11, 9), (2, 1), (1, 1), (1, 1)),
    "far taps": Case(1, 2, 5, 6, (5, 5), (31, 33), (1, 1), (7, 7), (8, 8)),
    "pointwise": Case(3, 1, 61, 31, (1, 1), (17, 5), (1, 1), (0, 0), (1, 1)),
    "depthwise": Case(2, 7, 1, 1, (3, 3), (17, 33), (1, 1), (1, 1), (1, 1)),
    "depthwise, fours": Case(2, 3, 1, 2, (3, 3), (40, 44), (1, 1), (1, 1), (1, 1)),
    "one pixel": Case(2, 2, 3, 5, (2, 3), (2, 3), (1, 1), (0, 0), (1, 1)),
}


def pairs(defines: Mapping[str, int]) -> bool:
    return "QMIR_FLOAT_PAIRS" in defines


def linear_case(name: str, per_sample: bool = True) -> tuple[Any, ...]:
    shape, features = ROWS[name]
    per_sample = per_sample and len(shape) > 1
    args, _ = linear_operands(len(name), shape, features, 4, per_sample, True)
    return args


def conv_case(name: str, bits: int = 4) -> tuple[Any, ...]:
    case = CASES[name]
    args, _ = operands(7, case, bits, x_offset=offsets(7, case, "ordinary", False))
    return args


def drawn(count: int, scale: float = 1.0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)) * scale


@variants
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("name", ROWS)
def test_linear(defines: Mapping[str, int], name: str) -> None:
    args = linear_case(name)
    plain = launch_linear(Variant(defines), *args)
    for seed, offset in enumerate((None, drawn(args[8]))):
        launch = Variant(defines, seed + len(name))
        y, moments = launch_linear_moments(launch, *args, None, None, "none", offset)
        assert same_bytes(y, plain)
        assert_moments(moments, y, offset, -1, pairs(defines))


@variants
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("name", CASES)
def test_conv2d(defines: Mapping[str, int], name: str) -> None:
    args = conv_case(name)
    plain = launch_conv2d(Variant(defines), *args)
    for seed, offset in enumerate((drawn(plain.shape[1]), None)):
        launch = Variant(defines, seed + len(name))
        y, moments = launch_conv2d_moments(launch, *args, None, None, "none", offset)
        assert same_bytes(y, plain)
        assert_moments(moments, y, offset, 1, pairs(defines))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["body", "grouped, strided", "depthwise", "depthwise, fours"])
def test_of_what_the_epilogue_makes(name: str, layout: str, activation: str) -> None:
    args = conv_case(name)
    size = launch_conv2d(Variant(), *args).shape
    end = Epilogue(LAYOUTS[layout](drawn(size.numel()).view(size)), drawn(size[1]), activation)
    plain, offset = launch_conv2d(Variant(), *args, *end), drawn(size[1], 3.0)
    y, moments = launch_conv2d_moments(Variant(ORIN, len(layout)), *args, *end, offset)
    assert same_values(y, plain) and y.stride() == plain.stride()
    assert_moments(moments, y, offset, 1, True)


@variants
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_of_what_the_epilogue_of_linear_makes(defines: Mapping[str, int], activation: str) -> None:
    args = linear_case("tiles")
    size = torch.Size((2, 135, 70))
    end = Epilogue(drawn(size.numel()).view(size), drawn(70), activation)
    y, moments = launch_linear_moments(Variant(defines, 3), *args, *end, drawn(70))
    assert same_values(y, launch_linear(Variant(defines), *args, *end))
    assert_moments(moments, y, drawn(70), -1, pairs(defines))


@variants
@pytest.mark.parametrize("scale", [1e-20, 1e-13, 1e-8, 1e25, 1e38])
def test_sizes_that_pairs_of_floats_cannot_square(defines: Mapping[str, int], scale: float) -> None:
    args = linear_case("tiles")
    x_step, bias = args[1] * 0.0, torch.zeros(70)
    args = (args[0], x_step, x_step, *args[3:6], bias, *args[7:])
    size = torch.Size((2, 135, 70))
    residual = drawn(size.numel()).clamp(-2, 2).view(size) * scale
    y, moments = launch_linear_moments(Variant(defines), *args, residual)
    assert torch.equal(y, residual)
    assert_moments(moments, y, None, -1, pairs(defines))


@variants
def test_a_constant_channel_has_no_spread(defines: Mapping[str, int]) -> None:
    rows, _ = linear_operands(1, (2, 135, 20), 70, 8, True, True)
    w_shift = rows[5].clone()
    w_shift[3] = 0.0
    rows = (*rows[:3], with_constant_channel(rows[3], 70, 3), rows[4], w_shift, *rows[6:])
    offset = drawn(70)
    found = launch_linear_moments(Variant(defines), *rows, None, None, "none", offset)[1]
    value = (rows[6] + offset)[3].double()
    for sample in found[:, 3]:
        assert torch.equal(sample, torch.stack([value, value * 0, value, value]))
    for name in ("body", "depthwise"):
        image, _ = operands(7, CASES[name], 8)
        features = image[9][0]
        w_shift = image[5].expand(features).clone()
        w_shift[3] = 0.0
        weight = with_constant_channel(image[3], features, 3)
        image = (*image[:3], weight, image[4], w_shift, *image[6:])
        found = launch_conv2d_moments(Variant(defines), *image)[1]
        value = image[6][3].double()
        for sample in found[:, 3]:
            assert torch.equal(sample, torch.stack([value, value * 0, value, value]))


@variants
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sample(defines: Mapping[str, int], bad: float) -> None:
    rows = linear_case("tiles")
    image, planes = conv_case("body"), conv_case("depthwise")
    for launch, args in (
        (launch_linear_moments, rows),
        (launch_conv2d_moments, image),
        (launch_conv2d_moments, planes),
    ):
        before = launch(Variant(defines), *args)[1]
        step = args[1].clone()
        step[1] = bad
        found = launch(Variant(defines), args[0], step, *args[2:])[1]
        assert same_bytes(found[0], before[0])
        assert not found[1, :, 1].isfinite().any()


@variants
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_in_its_channel(
    defines: Mapping[str, int], bad: float
) -> None:
    args = linear_case("tiles")
    residual = torch.zeros(2, 135, 70)
    clean = launch_linear_moments(Variant(defines), *args, residual)[1]
    for row in (0, 1, 134):
        residual[1, row, 5] = bad
        found = launch_linear_moments(Variant(defines), *args, residual)[1]
        assert found[1, 5, 1].isnan() and not found[1, 5, 0].isfinite()
        others = torch.ones(2, 70, dtype=torch.bool)
        others[1, 5] = False
        assert same_bytes(found[others], clean[others])
        residual[1, row, 5] = 0.0


@variants
def test_order_of_threads_and_batch_mates_do_not_matter(defines: Mapping[str, int]) -> None:
    for launch, args in (
        (launch_linear_moments, linear_case("tiles")),
        (launch_conv2d_moments, conv_case("pointwise")),
        (launch_conv2d_moments, conv_case("depthwise")),
    ):
        y, moments = launch(Variant(defines), *args)
        for seed in range(1, 4):
            again = launch(Variant(defines, seed), *args)
            assert same_bytes(again[0], y) and same_bytes(again[1], moments)
        for i in range(2):
            alone = (args[0][i : i + 1], args[1][i : i + 1], args[2][i : i + 1], *args[3:])
            assert same_bytes(launch(Variant(defines), *alone)[1], moments[i : i + 1])


def parts_of(y: Tensor, tile: int) -> Tensor:
    """Parts of rows y (channels, count) in tiles, in the memory of `TilePart`."""
    pieces = y.split(tile, dim=1)
    parts = torch.zeros(y.shape[0], len(pieces), PART_DOUBLES, dtype=torch.float64)
    floats, integers = parts.view(torch.float32), parts.view(torch.int32)
    for i, piece in enumerate(pieces):
        deviation = piece.double() - piece[:, :1].double()
        parts[:, i, 0] = deviation.sum(1)
        parts[:, i, 1] = deviation.square().sum(1)
        floats[:, i, 4], floats[:, i, 5] = piece.amin(1), piece.amax(1)
        floats[:, i, 6] = piece[:, 0]
        integers[:, i, 7] = piece.shape[1]
    return parts


@pytest.mark.parametrize("tiles", [1, 2, 31, 32, 33, 64])
def test_tiles_merge_into_the_channel(tiles: int) -> None:
    """Tiles of other sizes and far apart; channels that are no multiple of a block's."""
    y = drawn(7 * 5 * tiles).view(7, 5 * tiles) * 2 + torch.arange(5 * tiles) * 0.5
    y = y[:, : max(5 * tiles - 3, 1)].contiguous()
    moments = torch.full((7, 1, 4), float("nan"), dtype=torch.float64)
    room = Room(None, parts_of(y, 5), 1, -(-y.shape[1] // 5), moments)
    merge(Variant(seed=tiles), room)
    assert_moments(moments, y.unsqueeze(1), None, 1)


def test_what_is_launched() -> None:
    launch = Variant()
    launch_linear_moments(launch, *linear_case("samples"))
    launch_conv2d_moments(launch, *conv_case("body"))
    assert [kernel for _, kernel in launch.launched] == [
        "qmir_linear_kept_w4", "qmir_moments_merge",
        "qmir_conv2d_prepare_w4", "qmir_conv2d_kept_w4", "qmir_moments_merge",
    ]  # fmt: skip


BARRIERS = {
    "before a tile is written": ("place);\n  __syncthreads();\n  if (end.residual)", 0),
    "before columns are added up": ("return;\n  __syncthreads();\n  add_up_tile", 1),
}


@pytest.mark.parametrize("barrier", BARRIERS)
@pytest.mark.parametrize("source", ["qlinear", "qconv2d"])
def test_a_missing_barrier_is_noticed(source: str, barrier: str, tmp_path: Path) -> None:
    right, result = BARRIERS[barrier]
    wrong = right.replace("__syncthreads();", "")
    folder = with_fault(tmp_path, source, right, wrong, "moments", "qconv2d_prepare")
    linear = source == "qlinear"
    run = launch_linear_moments if linear else launch_conv2d_moments
    args = linear_case("tiles") if linear else conv_case("body")
    # With an offset, what is added up is not what lay in the tile before.
    args = (*args, None, None, "none", drawn(70 if linear else 60))
    wanted = run(Variant(), *args)[result]
    found = [run(Variant(NO_DEFINES, seed, folder), *args)[result] for seed in range(4)]
    assert not all(same_bytes(each, wanted) for each in found)


def test_a_missing_barrier_of_the_pivot_is_noticed(tmp_path: Path) -> None:
    right = "pivot = results[0];\n  __syncthreads();"
    wrong = "pivot = results[0];"
    folder = with_fault(tmp_path, "qconv2d_depthwise", right, wrong, "moments", "qconv2d_prepare")
    args = conv_case("depthwise")
    wanted = launch_conv2d_moments(Variant(), *args)[1]
    found = [launch_conv2d_moments(Variant(NO_DEFINES, i, folder), *args)[1] for i in range(4)]
    assert not all(same_bytes(each, wanted) for each in found)


FAULTS = {
    "tile of a sample": ("qlinear", "at % tiles * kTile;", "at % tiles * (kTile - 1);"),
    "offset": ("qlinear", "y + offset[channel]", "y + offset[0]"),
    "half of a column": ("qlinear", "2 * i + half;", "2 * i;"),
    "pixels outside": ("qconv2d", "return pixels.place[pixel] >= 0;", "return true;"),
    "tile of a plane": ("qconv2d", "blockIdx.x / across % room.tiles", "0"),
    "warps of a block": (
        "qconv2d_depthwise",
        "warp = 1; warp < kWarps;",
        "warp = 2; warp < kWarps;",
    ),
    "end of a row": ("qconv2d_depthwise", "return p < count;", "return count > 0;"),
    "moved sum": ("moments", "part.sum + part.count * away;", "part.sum;"),
    "moved squares": ("moments", "2.0 * part.sum + part", "part.sum + part"),
}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    source, right, wrong = FAULTS[fault]
    others = {"qlinear", "qconv2d", "qconv2d_depthwise", "qconv2d_prepare", "moments"} - {source}
    folder = with_fault(tmp_path, source, right, wrong, *others)
    run: Any = launch_linear_moments
    args, dim = linear_case("tiles"), -1
    if source.startswith("qconv2d"):
        run, dim = launch_conv2d_moments, 1
        args = conv_case("depthwise" if source.endswith("depthwise") else "beyond a tile")
    channels = args[8] if dim == -1 else args[9][0]
    offset = drawn(channels)
    wanted = run(Variant(), *args, None, None, "none", offset)
    assert_moments(wanted[1], wanted[0], offset, dim)
    with pytest.raises((AssertionError, HostKernelError)):
        y, moments = run(Variant(NO_DEFINES, 0, folder), *args, None, None, "none", offset)
        assert same_bytes(y, wanted[0])
        assert_moments(moments, y, offset, dim)


def test_bad_arguments_are_refused() -> None:
    args = linear_case("samples")
    end = (None, None, "none")
    with pytest.raises(RuntimeError, match="moments_offset must be float32 of 5 values"):
        launch_linear_moments(Variant(), *args, *end, torch.zeros(4))
    with pytest.raises(RuntimeError, match="holds nothing and has no moments"):
        launch_linear_moments(Variant(), args[0][:0], args[1][:1], args[2][:1], *args[3:])
    with pytest.raises(DeviceError, match="its tensors are on cpu, meta"):
        launch_linear_moments(Variant(), *args, *end, torch.zeros(5, device="meta"))
    image = conv_case("pointwise")
    with pytest.raises(RuntimeError, match="moments_offset must be float32 of 31 values"):
        launch_conv2d_moments(Variant(), *image, *end, torch.zeros(31).double())
    residual = ending(1, "residual", torch.Size((3, 7, 5)), 5).residual
    y, moments = launch_linear_moments(Variant(), *args, residual)
    assert y.shape == (3, 7, 5) and moments is not None and moments.shape == (3, 5, 4)
