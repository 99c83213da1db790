"""CUDA kernels of `qmir::dls_fake_quant` and its backward (cuda/dls_fake_quant.cu)."""

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import Argument, Launcher, ceil_div, dense
from qmir_ao.backend.cuda.registration import cuda_kernel
from qmir_ao.ops._affine import check_range, group_count
from qmir_ao.ops.dls import check_scalars
from qmir_ao.ops.dls_fake_quant import dls_fake_quant_backward_ref, dls_fake_quant_ref

SOURCE = "dls_fake_quant"
# As in the source: elements of a tile, groups of a block, and up to where a warp takes a group.
TILE = 8192
ROWS_PER_BLOCK = 32
LONGEST_ROW = 1024
BLOCK = (256, 1, 1)
ROW_BLOCK = (128, 1, 1)
# Bytes of the structs Moments, Prediction, GradientSums, InputGradient and ScalarGradients.
MOMENTS, PREDICTION, SUMS, THROUGH, SCALARS = 24, 32, 56, 16, 64
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _memory(x: Tensor, count: int, size: int) -> Tensor:
    return torch.empty(count * size // 8, dtype=torch.float64, device=x.device)


def _predict(
    launch: Launcher, x: Tensor, w: Tensor, v: Tensor, groups: int, grid: tuple[int, int, bool]
) -> Tensor:
    """Step, shift and statistics of each long group."""
    count = x.numel() // groups
    tiles = ceil_div(count, TILE)
    parts = _memory(x, groups * tiles, MOMENTS)
    found = _memory(x, groups, PREDICTION)
    kernel = f"qmir_dls_moments_{NAMES[x.dtype]}"
    pivots = torch.empty(groups, dtype=torch.float32, device=x.device)
    launch(SOURCE, kernel, (groups * tiles, 1, 1), BLOCK, [x, parts, pivots, count, tiles])
    args: list[Argument] = [parts, pivots, w, v, found, count, tiles, *grid]
    launch(SOURCE, "qmir_dls_predict", (groups, 1, 1), BLOCK, args)
    return found


@cuda_kernel("dls_fake_quant", dls_fake_quant_ref)
def launch_dls_fake_quant(
    launch: Launcher,
    x: Tensor,
    scale_weights: Tensor,
    shift_weights: Tensor,
    quant_min: int,
    quant_max: int,
    per_tensor: bool,
    cap: bool,
    clamp_output: bool,
) -> Tensor:
    """`qmir::dls_fake_quant`; a group that holds NaN or infinity becomes NaN.

    Args:
        launch: starts the kernels.
        x: float32 or bfloat16; other types take a detour through float32, float64 through torch.
        scale_weights: as in the operator, like all that follow.
        shift_weights: see there.
        quant_min: see there.
        quant_max: see there.
        per_tensor: see there.
        cap: see there.
        clamp_output: see there.
    """
    scalars = (scale_weights, shift_weights)
    if x.dtype == torch.float64 or not x.numel():
        return dls_fake_quant_ref(x, *scalars, quant_min, quant_max, per_tensor, cap, clamp_output)
    check_scalars("dls_fake_quant", *scalars)
    check_range("dls_fake_quant", quant_min, quant_max)
    if x.dtype not in NAMES:
        settings = (quant_min, quant_max, per_tensor, cap, clamp_output)
        wide: Tensor = launch_dls_fake_quant(launch, x.float(), *scalars, *settings)
        return wide.to(x.dtype)
    kept = dense(x)
    w, v = (dense(s.float()) for s in scalars)
    groups = group_count(x, per_tensor)
    count = x.numel() // groups
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if count <= LONGEST_ROW:
        blocks = (ceil_div(groups, ROWS_PER_BLOCK), 1, 1)
        args: list[Argument] = [
            kept,
            w,
            v,
            y,
            groups,
            count,
            quant_min,
            quant_max,
            cap,
            clamp_output,
        ]
        launch(SOURCE, f"qmir_dls_rows_forward_{NAMES[x.dtype]}", blocks, ROW_BLOCK, args)
        return y
    found = _predict(launch, kept, w, v, groups, (quant_min, quant_max, cap))
    tiles = ceil_div(count, TILE)
    args = [kept, found, y, count, tiles, quant_min, quant_max, clamp_output]
    kernel = f"qmir_dls_forward_{NAMES[x.dtype]}"
    launch(SOURCE, kernel, (groups * tiles, 1, 1), BLOCK, args)
    return y


@cuda_kernel("dls_fake_quant_backward", dls_fake_quant_backward_ref)
def launch_dls_fake_quant_backward(
    launch: Launcher,
    grad: Tensor,
    x: Tensor,
    scale_weights: Tensor,
    shift_weights: Tensor,
    quant_min: int,
    quant_max: int,
    per_tensor: bool,
    cap: bool,
    clamp_output: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qmir::dls_fake_quant_backward`; arguments as in the operator after `launch`."""
    scalars = (scale_weights, shift_weights)
    settings = (quant_min, quant_max, per_tensor, cap, clamp_output)
    if x.dtype == torch.float64 or not x.numel():
        return dls_fake_quant_backward_ref(
            grad, x, *scalars, quant_min, quant_max, per_tensor, cap, clamp_output
        )
    check_scalars("dls_fake_quant_backward", *scalars)
    check_range("dls_fake_quant_backward", quant_min, quant_max)
    if x.dtype not in NAMES:
        dx, dw, dv = launch_dls_fake_quant_backward(
            launch, grad.float(), x.float(), *scalars, *settings
        )
        return dx.to(x.dtype), dw, dv
    up, kept = dense(grad.to(x.dtype)), dense(x)
    w, v = (dense(s.float()) for s in scalars)
    groups = group_count(x, per_tensor)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw, dv = (torch.empty(4, dtype=torch.float32, device=x.device) for _ in scalars)
    short = x.numel() // groups <= LONGEST_ROW
    run = _backward_rows if short else _backward_tiles
    parts, number = run(
        launch, up, kept, (w, v), dx, groups, (quant_min, quant_max, cap, clamp_output)
    )
    launch(SOURCE, "qmir_dls_scalars", (1, 1, 1), BLOCK, [parts, dw, dv, number])
    return dx, dw.to(scale_weights.dtype), dv.to(shift_weights.dtype)


def _backward_rows(
    launch: Launcher,
    up: Tensor,
    x: Tensor,
    scalars: tuple[Tensor, Tensor],
    dx: Tensor,
    groups: int,
    grid: tuple[int, int, bool, bool],
) -> tuple[Tensor, int]:
    """Short groups; returns the scalars' gradients by block, and the number of blocks."""
    blocks = ceil_div(groups, ROWS_PER_BLOCK)
    parts = _memory(x, blocks, SCALARS)
    args: list[Argument] = [up, x, *scalars, dx, parts, groups, x.numel() // groups, *grid]
    kernel = f"qmir_dls_rows_backward_{NAMES[x.dtype]}"
    launch(SOURCE, kernel, (blocks, 1, 1), ROW_BLOCK, args)
    return parts, blocks


def _backward_tiles(
    launch: Launcher,
    up: Tensor,
    x: Tensor,
    scalars: tuple[Tensor, Tensor],
    dx: Tensor,
    groups: int,
    grid: tuple[int, int, bool, bool],
) -> tuple[Tensor, int]:
    """Long groups; returns the scalars' gradients by group, and the number of groups."""
    quant_min, quant_max, cap, clamp = grid
    count, name = x.numel() // groups, NAMES[x.dtype]
    tiles = ceil_div(count, TILE)
    blocks = (groups * tiles, 1, 1)
    found = _predict(launch, x, *scalars, groups, (quant_min, quant_max, cap))
    parts = _memory(x, groups * tiles, SUMS)
    rest = (count, tiles, quant_min, quant_max)
    launch(SOURCE, f"qmir_dls_sums_{name}", blocks, BLOCK, [up, x, found, parts, *rest, clamp])
    through, sums = _memory(x, groups, THROUGH), _memory(x, groups, SCALARS)
    args: list[Argument] = [parts, found, *scalars, through, sums, *rest, cap]
    launch(SOURCE, "qmir_dls_gradient", (groups, 1, 1), BLOCK, args)
    args = [up, x, found, through, dx, *rest, clamp]
    launch(SOURCE, f"qmir_dls_backward_{name}", blocks, BLOCK, args)
    return sums, groups
