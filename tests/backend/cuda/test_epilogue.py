"""Epilogues of the integer operators on CUDA, in the simulator.

Residuals and relu give the reference's bytes, other activations those of the CPU kernels.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.convolutions import NAMED, Case, operands
from support.epilogues import END, LAYOUTS, ending, same_values
from support.host_launcher import needs_compiler
from support.integers import linear_operands
from support.variants import PRODUCTS, Variant, with_fault

import qmir_ao.backend.cpu.conv2d
import qmir_ao.backend.cpu.linear  # noqa: F401  (registers the kernels)
from qmir_ao.backend.cpu.build import library
from qmir_ao.backend.cuda.conv2d import launch_conv2d
from qmir_ao.backend.cuda.linear import launch_linear
from qmir_ao.errors import DeviceError
from qmir_ao.ops._activations import ACTIVATIONS, EXACT
from qmir_ao.ops.conv2d import conv2d_ref
from qmir_ao.ops.linear import linear_ref

pytestmark = needs_compiler

ends = pytest.mark.parametrize("name", END)
variants = pytest.mark.parametrize("defines", PRODUCTS, ids=["s8", "s4"])
ROWS = {"one": (1, 1, 1), "pairs": (65, 60, 70), "odd": (67, 13, 65)}
"""Rows, inputs, features: one result, pairs of results, single ones; beyond a tile."""
CASES = {
    "body": Case(2, 1, 6, 66, (3, 3), (5, 9), (1, 1), (1, 1), (1, 1)),
    "odd plane": Case(1, 2, 5, 3, (3, 3), (7, 11), (2, 1), (1, 1), (1, 1)),
    "pointwise": Case(2, 1, 9, 5, (1, 1), (9, 8), (1, 1), (0, 0), (1, 1)),
    "depthwise": Case(2, 6, 1, 1, (3, 3), (5, 8), (1, 1), (1, 1), (1, 1)),
    "depthwise odd": Case(1, 3, 1, 2, (3, 3), (6, 7), (1, 1), (2, 2), (2, 2)),
}


@variants
@ends
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("sizes", ROWS.values(), ids=ROWS)
def test_linear(defines: Mapping[str, int], sizes: tuple[int, int, int], name: str) -> None:
    rows, inputs, features = sizes
    args, _ = linear_operands(3, (rows, inputs), features, 4, rows % 2 == 0, True)
    end = ending(1, name, torch.Size((rows, features)), features)
    got = launch_linear(Variant(defines, rows), *args, *end)
    assert same_values(got, linear_ref(*args, *end))


@ends
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_conv2d(case: Case, layout: str, name: str) -> None:
    args, weight = operands(5, case, 4)
    plain = conv2d_ref(*args)
    end = ending(2, name, plain.shape, weight.shape[0])
    if end.residual is not None:
        end = end._replace(residual=LAYOUTS[layout](end.residual))
    wanted = conv2d_ref(*args, *end)
    got = launch_conv2d(Variant(seed=len(layout)), *args, *end)
    assert same_values(got, wanted)
    assert got.stride() == wanted.stride()


others = pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a not in EXACT])


@others
@variants
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("sizes", [*ROWS.values(), (130, 20, 5)], ids=str)
def test_activations_of_linear(
    defines: Mapping[str, int], sizes: tuple[int, int, int], activation: str
) -> None:
    assert library() is not None
    rows, inputs, features = sizes
    args, _ = linear_operands(rows, (rows, inputs), features, 4, rows % 2 == 0, True)
    for name in ("all", "relu"):
        end = ending(1, name, torch.Size((rows, features)), features)
        end = end._replace(activation=activation)
        got = launch_linear(Variant(defines, rows), *args, *end)
        assert same_values(got, torch.ops.qmir.linear(*args, *end))


@others
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("layout", ["rows", "channels last"])
@pytest.mark.parametrize("case", [*CASES.values(), NAMED["stride-2-wide"]], ids=str)
def test_activations_of_conv2d(case: Case, layout: str, activation: str) -> None:
    case = case._replace(image=(min(case.image[0], 9), min(case.image[1], 21)))
    args, weight = operands(5, case, 4)
    end = ending(2, "all", conv2d_ref(*args).shape, weight.shape[0])
    end = end._replace(residual=LAYOUTS[layout](end.residual), activation=activation)
    wanted = torch.ops.qmir.conv2d(*args, *end)
    got = launch_conv2d(Variant(seed=len(layout)), *args, *end)
    assert same_values(got, wanted) and got.stride() == wanted.stride()
    plain = end._replace(residual=None, residual_scale=None)
    assert same_values(
        launch_conv2d(Variant(), *args, *plain), torch.ops.qmir.conv2d(*args, *plain)
    )


def test_kernels_with_few_registers_are_taken_where_they_suffice() -> None:
    rows, _ = linear_operands(1, (3, 10), 6, 4, True, True)
    image, _ = operands(5, CASES["body"], 4)
    planes, _ = operands(5, CASES["depthwise"], 4)
    for activation, kind in (("none", ""), ("relu", ""), ("gelu", "_kept")):
        launch = Variant()
        launch_linear(launch, *rows, None, None, activation)
        launch_conv2d(launch, *image, None, None, activation)
        launch_conv2d(launch, *planes, None, None, activation)
        assert [kernel for _, kernel in launch.launched] == [
            f"qmir_linear{kind}_w4",
            "qmir_conv2d_prepare_w4", f"qmir_conv2d{kind}_w4",
            "qmir_conv2d_prepare_w4", f"qmir_conv2d_depthwise{kind}_w4",
        ]  # fmt: skip


def test_order_of_threads_does_not_matter() -> None:
    args, _ = operands(5, CASES["body"], 8)
    end = ending(2, "all", conv2d_ref(*args).shape, 66)
    end = end._replace(residual=LAYOUTS["channels last"](end.residual))
    first = launch_conv2d(Variant(), *args, *end)
    for seed in range(1, 4):
        assert same_values(launch_conv2d(Variant(seed=seed), *args, *end), first)
    smooth = end._replace(activation="silu")
    first = launch_conv2d(Variant(), *args, *smooth)
    for seed in range(1, 4):
        assert same_values(launch_conv2d(Variant(seed=seed), *args, *smooth), first)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("return other * factor + y;", "return other + y * factor;"),
        ("return lane_max(F{}, x);", "return x;"),
        ("add_scaled(y, other, scale[channel])", "add_scaled(y, other, scale[0])"),
    ],
)
def test_a_fault_is_noticed(tmp_path: Path, right: str, wrong: str) -> None:
    folder = with_fault(tmp_path, "qlinear", right, wrong)
    args, _ = linear_operands(3, (9, 20), 11, 4, True, True)
    end = ending(1, "all", torch.Size((9, 11)), 11)
    got = launch_linear(Variant(folder=folder), *args, *end)
    assert not same_values(got, linear_ref(*args, *end))


def test_a_residual_on_another_device_is_named() -> None:
    args, _ = linear_operands(1, (2, 3, 10), 6, 4, True, True)
    with pytest.raises(DeviceError, match="its tensors are on cpu, meta"):
        launch_linear(Variant(), *args, torch.zeros(2, 3, 6, device="meta"))
    conv, _ = operands(5, CASES["pointwise"], 4)
    elsewhere = torch.zeros(conv2d_ref(*conv).shape, device="meta")
    with pytest.raises(DeviceError, match="its tensors are on cpu, meta"):
        launch_conv2d(Variant(), *conv, elsewhere)
