"""Statistics of the results of ss2d_scan_q on CUDA, run by the simulator."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.host_launcher import HostKernelError, HostLauncher, needs_compiler
from support.integers import same_bytes
from support.moments import assert_moments
from support.scans_q import IMAGES, image_operands
from support.variants import FLOAT_PAIRS, Variant, with_fault
from torch import Tensor

from qmir_ao.backend.cuda.launch import NO_DEFINES
from qmir_ao.backend.cuda.moments import make_room
from qmir_ao.backend.cuda.moments import merge as merge_moments
from qmir_ao.backend.cuda.scan_merge import TILE, merge, merge_kept, tiles
from qmir_ao.backend.cuda.scan_q import variant
from qmir_ao.backend.cuda.ss2d_scan_q import launch_ss2d_scan_q, launch_ss2d_scan_q_moments
from qmir_ao.ops.ss2d_scan_q import ss2d_scan_q_moments_ref

pytestmark = needs_compiler

variants = pytest.mark.parametrize("defines", [NO_DEFINES, FLOAT_PAIRS], ids=["hopper", "orin"])
OP = "ss2d_scan_q"
# One variant of the source serves all tests but those of the operator: 3 states, 4-bit delta.
KIND = variant(3, 16)
# Batch, channels, height, width: one pixel; images that end inside of a warp, at the end of a tile,
# one pixel before and one behind it; several tiles.
IMAGES_OF_DIRECTIONS = {
    "pixel": (3, 2, 1, 1),
    "small": (2, 5, 7, 9),
    "below a tile": (2, 3, 31, 33),
    "a tile": (1, 3, 32, 32),
    "beyond a tile": (2, 3, 25, 41),
    "tiles": (2, 3, 61, 53),
}
SIZES = {"light": (2, 18, 10, 7, 9), "row": (3, 5, 3, 1, 40), "column": (1, 17, 3, 37, 1)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def directions_of(name: str) -> tuple[Tensor, tuple[int, ...]]:
    batch, channels, height, width = IMAGES_OF_DIRECTIONS[name]
    images = drawn(batch, 4, channels, height * width) * drawn(1, 1, channels, 1).exp()
    return images, (batch, channels, height, width)


def plain(directions: Tensor, size: tuple[int, ...]) -> Tensor:
    y = torch.empty(size)
    merge(HostLauncher(), OP, directions, y, KIND.defines)
    return y


def kept(
    launch: HostLauncher, directions: Tensor, size: tuple[int, ...], offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The result of the kernels that add up the directions, and its moments."""
    y = torch.empty(size)
    room = make_room(OP, True, offset, y, size[1], tiles(y))
    merge_kept(launch, OP, directions, y, room, KIND.defines)
    merge_moments(launch, room)
    assert room.moments is not None
    return y, room.moments


@variants
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("name", IMAGES_OF_DIRECTIONS)
def test_sum_of_directions(defines: Mapping[str, int], name: str) -> None:
    directions, size = directions_of(name)
    a, b, c, d = directions.unbind(1)
    wanted = ((a + c) + (b + d)).view(size)
    assert same_bytes(plain(directions, size), wanted)
    for seed, offset in enumerate((None, drawn(size[1]) * 3.0)):
        y, moments = kept(Variant(defines, seed + len(name)), directions, size, offset)
        assert same_bytes(y, wanted)
        assert_moments(moments, y, offset, 1, "QMIR_FLOAT_PAIRS" in defines)


@variants
@pytest.mark.usefixtures("poisoned_empty")
def test_order_of_threads_and_batch_mates_do_not_matter(defines: Mapping[str, int]) -> None:
    directions, size = directions_of("tiles")
    y, moments = kept(Variant(defines), directions, size, drawn(3))
    for seed in range(1, 4):
        again = kept(Variant(defines, seed), directions, size, drawn(3))
        assert same_bytes(again[0], y) and same_bytes(again[1], moments)
    for i in range(2):
        alone = kept(Variant(defines), directions[i : i + 1], (1, *size[1:]), drawn(3))
        assert same_bytes(alone[1], moments[i : i + 1])


@variants
@pytest.mark.parametrize("name", ["small", "tiles"])
def test_a_constant_channel_has_no_spread(defines: Mapping[str, int], name: str) -> None:
    directions, size = directions_of(name)
    directions[:, :, 1] = torch.tensor([0.3, -1.7, 0.11, 2.9]).view(4, 1)
    offset = drawn(size[1])
    y, moments = kept(Variant(defines), directions, size, offset)
    value = (y[0, 1, 0, 0] + offset[1]).double()
    for sample in moments[:, 1]:
        assert torch.equal(sample, torch.stack([value, value * 0, value, value]))


@variants
@pytest.mark.parametrize("scale", [1e-20, 1e-13, 1e25, 1e37])
def test_sizes_that_pairs_of_floats_cannot_square(defines: Mapping[str, int], scale: float) -> None:
    directions, size = directions_of("beyond a tile")
    y, moments = kept(Variant(defines), directions.clamp(-2, 2) * scale, size, None)
    assert_moments(moments, y, None, 1, "QMIR_FLOAT_PAIRS" in defines)


@variants
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_channel(defines: Mapping[str, int], bad: float) -> None:
    directions, size = directions_of("beyond a tile")
    clean = kept(Variant(defines), directions, size, None)[1]
    others = torch.ones(clean.shape[:2], dtype=torch.bool)
    others[1, 2] = False
    for pixel in (0, 1, TILE - 1, TILE):
        changed = directions.clone()
        changed[1, 3, 2, pixel] = bad
        found = kept(Variant(defines), changed, size, None)[1]
        assert found[1, 2, 1].isnan() and not found[1, 2, 0].isfinite()
        assert same_bytes(found[others], clean[others])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("name", SIZES)
def test_the_operator(name: str) -> None:
    args = image_operands(3, SIZES[name], 4)
    for seed, offset in enumerate((drawn(SIZES[name][1]), None)):
        for steps in (None, 16):
            wanted = launch_ss2d_scan_q(HostLauncher(seed), *args, steps=steps)
            launch = HostLauncher(seed + 1)
            y, moments = launch_ss2d_scan_q_moments(launch, *args, offset, steps=steps)
            assert same_bytes(y, wanted) and moments is not None
            assert_moments(moments, y, offset, 1)


def test_what_is_launched() -> None:
    launch = HostLauncher()
    launch_ss2d_scan_q_moments(launch, *image_operands(3, SIZES["row"], 4))
    assert [kernel for _, kernel in launch.launched] == [
        "qmir_ss2d_scan_q_table", "qmir_ss2d_scan_q_apply", "qmir_ss2d_scan_q_merge_kept",
        "qmir_moments_merge",
    ]  # fmt: skip


def test_more_states_than_the_kernels_know_are_left_to_the_reference() -> None:
    args, launch = image_operands(3, IMAGES["seventy-states"], 4), HostLauncher()
    found = launch_ss2d_scan_q_moments(launch, *args, drawn(2))
    wanted = ss2d_scan_q_moments_ref(*args, drawn(2))
    assert all(same_bytes(a, b) for a, b in zip(found, wanted, strict=True))
    assert not launch.launched


def test_bad_arguments_are_refused() -> None:
    args = image_operands(3, SIZES["row"], 4)
    run = launch_ss2d_scan_q_moments
    with pytest.raises(RuntimeError, match="scan_q_moments: moments_offset must be float32 of 5"):
        run(HostLauncher(), *args, torch.zeros(4))
    with pytest.raises(RuntimeError, match="scan_q_moments: moments_offset must be float32 of 5"):
        run(HostLauncher(), *args, torch.zeros(5).double())
    with pytest.raises(RuntimeError, match="holds nothing and has no moments"):
        run(HostLauncher(), *image_operands(3, (2, 4, 3, 0, 3), 4))
    args.delta[1, 8, 0, 2] = 8
    with pytest.raises(RuntimeError, match=r"ss2d_scan_q: delta holds codes outside -8\.\.7"):
        run(HostLauncher(), *args)


FAULTS = {
    "offset of the channel": ("y + offset[channel]", "y + offset[0]"),
    "place of a tile": ("* length, begin = index * kTile;", "* length, begin = 0;"),
    "end of the image": ("if (at >= count) return false;", "if (count <= 0) return false;"),
    "order of the directions": (
        "(p[0] + p[2 * plane]) + (p[plane] + p[3 * plane])",
        "(p[0] + p[plane]) + (p[2 * plane] + p[3 * plane])",
    ),
}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    folder = with_fault(tmp_path, OP, *FAULTS[fault], "moments")
    directions, size = directions_of("beyond a tile")
    wanted, offset = plain(directions, size), drawn(3)
    with pytest.raises((AssertionError, HostKernelError)):
        y, moments = kept(HostLauncher(0, folder), directions, size, offset)
        assert same_bytes(y, wanted)
        assert_moments(moments, y, offset, 1)


def test_a_missing_barrier_is_noticed(tmp_path: Path) -> None:
    right = "  __syncthreads();\n  const auto value"
    folder = with_fault(tmp_path, OP, right, "  const auto value", "moments")
    directions, size = directions_of("beyond a tile")
    wanted = kept(HostLauncher(), directions, size, None)[1]
    found = [kept(HostLauncher(i, folder), directions, size, None)[1] for i in range(4)]
    assert not all(same_bytes(each, wanted) for each in found)
