"""DLS steps, codes and values on CUDA, run by the simulator: the CPU kernels' bytes."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.cases import DLS_RANGES, DLS_SHAPES, DLS_V, DLS_W, dls_case
from support.host_launcher import HostLauncher, needs_compiler
from support.tolerances import PAIR_STATISTIC
from support.variants import FLOAT_PAIRS, SUMS, Variant, with_fault
from torch import Tensor

import qmir_ao.backend.cpu.dls  # noqa: F401  (registers the kernels)
from qmir_ao.backend.cuda.dls import (
    SHORT,
    launch_dls_dequantize,
    launch_dls_qparams,
    launch_dls_quantize,
    launch_dls_quantize_pack,
)
from qmir_ao.ops.dls import (
    STEP_EPS,
    dls_dequantize_ref,
    dls_qparams,
    dls_qparams_ref,
    dls_quantize_ref,
)
from qmir_ao.ops.pack import pack_ref

pytestmark = needs_compiler

variants = pytest.mark.parametrize("defines", SUMS, ids=["double", "pairs"])
# Tokens of 60 and 7; the longest short group and the shortest long one; a partial 16 above and
# below 8; vectors of 4; more chunks than one thread folds.
SHAPES = [
    *DLS_SHAPES,
    (33, 60),
    (71, 7),
    (3, SHORT),
    (2, SHORT + 1),
    (2, 4096 + 3),
    (2, 4096 + 12),
    (1, 66 * 4096 + 9),
]


def same(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_those_of_the_cpu(shape: tuple[int, ...], per_tensor: bool) -> None:
    x, _ = dls_case(shape)
    cap = per_tensor
    launch = HostLauncher(seed=len(shape) + shape[0])
    got = launch_dls_qparams(launch, x, DLS_W, DLS_V, -8, 7, per_tensor, cap)
    assert same(got, dls_qparams(x, DLS_W, DLS_V, -8, 7, per_tensor, cap))
    assert same(got, dls_qparams_ref(x, DLS_W, DLS_V, -8, 7, per_tensor, cap))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("shape", [(33, 60), (3, SHORT + 1), (2, 9001)], ids=str)
def test_pairs_of_floats_find_the_statistics_of_doubles(
    shape: tuple[int, ...], scale: float
) -> None:
    """At any scale, either statistic may be off by one unit."""
    x = (dls_case(shape)[0] + 100.0) * scale
    single = torch.eye(4)
    for i in range(4):
        got = launch_dls_qparams(Variant(FLOAT_PAIRS), x, DLS_W, single[i], -8, 7, False, False)
        exact = dls_qparams(x, DLS_W, single[i])
        assert ((got[1] - exact[1]).abs() <= PAIR_STATISTIC * exact[1].abs()).all()


@variants
@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-30, 1e30])
def test_a_constant_group_has_no_spread(
    defines: Mapping[str, int], value: float, offset: float
) -> None:
    for count in (37, 5000):
        x = torch.full((2, count), value + offset)
        zero = torch.zeros(4)
        spread = torch.tensor([0.0, 1.0, 0.0, 0.0])
        step, shift = launch_dls_qparams(Variant(defines), x, spread, zero, -8, 7, False, False)
        assert torch.equal(step, torch.full((2,), STEP_EPS)) and torch.equal(shift, zero[:2])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("grid", [*DLS_RANGES, (0, 255)], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 7), (5,), (3, 16, 13), (2, 3, 17, 33), (33, 60)], ids=str)
def test_codes_and_values_equal_reference(shape: tuple[int, ...], grid: tuple[int, int]) -> None:
    x, _ = dls_case(shape)
    for per_tensor in (False, True):
        found = dls_qparams_ref(x, DLS_W, DLS_V, *grid, per_tensor, False)
        codes = launch_dls_quantize(HostLauncher(grid[1]), x, *found, *grid)
        wanted = dls_quantize_ref(x, *found, *grid)
        assert codes.dtype == wanted.dtype and torch.equal(codes, wanted)
        values = launch_dls_dequantize(HostLauncher(grid[1]), codes, *found)
        assert torch.equal(values, dls_dequantize_ref(codes, *found))
        for bits in (2, 4):
            packed = launch_dls_quantize_pack(HostLauncher(bits), x, *found, *grid, bits)
            assert torch.equal(packed, pack_ref(wanted, bits))


def test_codes_at_the_boundaries() -> None:
    """Halves round to even, beyond the range they are clipped, as in the reference."""
    step, shift = torch.tensor([0.25]), torch.tensor([0.5])
    halves = (torch.arange(-40, 40) + 0.5) * 0.25 - 0.5
    near = torch.stack([torch.nextafter(halves, torch.tensor(s)) for s in (-99.0, 99.0)])
    x = torch.cat([halves, near.reshape(-1), torch.tensor([3e38, -3e38, 1e-45, -0.0])])
    got = launch_dls_quantize(HostLauncher(), x, step, shift, -8, 7)
    assert torch.equal(got, dls_quantize_ref(x, step, shift, -8, 7))


@variants
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("count", "where"), [(900, 0), (900, 555), (9000, 0), (9000, 8999)])
def test_what_is_not_finite_gives_nan_in_its_sample_only(
    defines: Mapping[str, int], count: int, where: int, bad: float
) -> None:
    x, _ = dls_case((3, count))
    clean = launch_dls_qparams(Variant(defines), x, DLS_W, DLS_V, -8, 7, False, False)
    x[1, where] = bad
    found = launch_dls_qparams(Variant(defines), x, DLS_W, DLS_V, -8, 7, False, False)
    for got, before in zip(found, clean, strict=True):
        assert got.isnan().tolist() == [False, True, False]
        assert torch.equal(got[::2], before[::2])
    codes = launch_dls_quantize(HostLauncher(), x, *found, -8, 7)
    values = launch_dls_dequantize(HostLauncher(), codes, *found)
    assert values[1].isnan().all() and values[::2].isfinite().all()


@variants
@pytest.mark.parametrize("shape", [(40, 37), (3, 20001)], ids=str)
def test_order_of_threads_does_not_matter(
    defines: Mapping[str, int], shape: tuple[int, ...]
) -> None:
    x, _ = dls_case(shape)
    settings = (DLS_W, DLS_V, -8, 7, False, False)
    first = launch_dls_qparams(Variant(defines, 0), x, *settings)
    for seed in range(1, 6):
        assert same(launch_dls_qparams(Variant(defines, seed), x, *settings), first)
    for i in range(2):
        alone = launch_dls_qparams(Variant(defines), x[i : i + 1], *settings)
        assert same(alone, (first[0][i : i + 1], first[1][i : i + 1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_empty_tensors_run_the_reference(dtype: torch.dtype) -> None:
    launch = HostLauncher()
    x = torch.randn(2, 33).to(dtype)
    found = launch_dls_qparams(launch, x, DLS_W, DLS_V, -8, 7, False, False)
    assert same(found, dls_qparams_ref(x, DLS_W, DLS_V, -8, 7, False, False))
    codes = launch_dls_quantize(launch, x, *found, -8, 7)
    assert torch.equal(codes, dls_quantize_ref(x, *found, -8, 7))
    empty = launch_dls_qparams(launch, torch.zeros(2, 0), DLS_W, DLS_V, -8, 7, False, False)
    assert torch.equal(empty[0], torch.full((2,), STEP_EPS))
    assert launch.launched == []


def test_a_perturbed_scalar_is_noticed() -> None:
    x, _ = dls_case((2, 500))
    other = DLS_W + torch.tensor([0.0, 1e-4, 0.0, 0.0])
    got = launch_dls_qparams(HostLauncher(), x, DLS_W, DLS_V, -8, 7, False, False)
    assert not same(got, dls_qparams_ref(x, other, DLS_V, -8, 7, False, False))


def cancelling(count: int) -> Tensor:
    """Values whose mean is what their sum lost by rounding, and so depends on its order."""
    half = torch.randn(3, count // 2) * 10.0 ** torch.empty(3, count // 2).uniform_(-9.0, 9.0)
    rest = torch.zeros(3, count % 2)
    return torch.cat([half, rest, -half.flip(1)], dim=1)[:, torch.randperm(count)]


MEAN_AS_SHIFT = (torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 0.0]), -8, 7, False, False)


@pytest.mark.parametrize("count", [33, 45, SHORT, 4096 + 3, 4096 + 12, 66 * 4096 + 9])
def test_the_order_of_sums_is_that_of_the_cpu(count: int) -> None:
    x = cancelling(count)
    wanted = dls_qparams(x, *MEAN_AS_SHIFT)
    assert same(launch_dls_qparams(HostLauncher(count), x, *MEAN_AS_SHIFT), wanted)


def test_another_order_of_sums_is_noticed(tmp_path: Path) -> None:
    right = "const int from = rest < kLanes / 2 ? lane - kLanes / 2 : lane;"
    wrong = right.replace("lane - kLanes / 2", "lane + rest - kLanes")
    x = cancelling(45 - 8)
    faulty = with_fault(tmp_path, "dls", right, wrong)
    got = launch_dls_qparams(HostLauncher(0, faulty), x, *MEAN_AS_SHIFT)
    assert not same(got, dls_qparams(x, *MEAN_AS_SHIFT))


def test_wrong_number_of_steps_is_refused() -> None:
    x, _ = dls_case((3, 10))
    with pytest.raises(RuntimeError, match="step and shift must have shape"):
        launch_dls_quantize(HostLauncher(), x, torch.ones(2), torch.zeros(2), -8, 7)
    with pytest.raises(RuntimeError, match=r"must have shape \(4,\)"):
        launch_dls_qparams(HostLauncher(), x, torch.ones(3), DLS_V, -8, 7, False, False)
    with pytest.raises(RuntimeError, match=r"codes must fit 2..8 bits"):
        launch_dls_qparams(HostLauncher(), x, DLS_W, DLS_V, 0, 0, False, False)
