"""CUDA kernels of `qmir::rfa_fake_quant` and its backward (cuda/rfa_fake_quant.cu)."""

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import Launcher, ceil_div, check_count, dense
from qmir_ao.backend.cuda.registration import cuda_kernel
from qmir_ao.ops.rfa import check_weight
from qmir_ao.ops.rfa_fake_quant import rfa_fake_quant_backward_ref, rfa_fake_quant_ref

SOURCE = "rfa_fake_quant"
# As in the source: elements of a tile, and of a tile of one row.
TILE, ROW_TILE = 2048, 8192
BLOCK = (256, 1, 1)
COMPILED = (4, 8, 16, 32, 64, 128, 256)
"""Numbers of thresholds that have kernels; others run in plain torch on the device."""
HISTOGRAM_VALUES = 2**32 - 1
"""Entries of all histograms together: kernels count them without a sign in 32 bits."""


def _fits(w: Tensor, thresholds: Tensor) -> bool:
    compiled = thresholds.dim() == 1 and thresholds.shape[0] in COMPILED
    return compiled and w.dtype != torch.float64 and w.numel() > 0


def _operands(
    w: Tensor, step: Tensor, shift: Tensor, thresholds: Tensor, quant_min: int
) -> list[Tensor | int]:
    tensors = [dense(t.float()) for t in (w, step, shift, thresholds)]
    rows = step.numel()
    return [*tensors, rows, w.numel() // rows, shift.numel(), quant_min]


@cuda_kernel("rfa_fake_quant", rfa_fake_quant_ref)
def launch_rfa_fake_quant(
    launch: Launcher,
    w: Tensor,
    step: Tensor,
    shift: Tensor,
    thresholds: Tensor,
    quant_min: int,
) -> Tensor:
    """`qmir::rfa_fake_quant`; elements that are NaN or infinite become NaN.

    Args:
        launch: starts the kernels.
        w: weight; other types than float32 take a detour through it, float64 through torch.
        step: as in the operator, like all that follow.
        shift: see there.
        thresholds: see there.
        quant_min: see there.
    """
    if not _fits(w, thresholds):
        return rfa_fake_quant_ref(w, step, shift, thresholds, quant_min)
    check_weight("rfa_fake_quant", w, step, shift, thresholds, quant_min)
    y = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    args = [*_operands(w, step, shift, thresholds, quant_min), y]
    kernel = f"qmir_rfa_forward_{thresholds.shape[0]}"
    launch(SOURCE, kernel, (ceil_div(w.numel(), TILE), 1, 1), BLOCK, args)
    return y.to(w.dtype)


@cuda_kernel("rfa_fake_quant_backward", rfa_fake_quant_backward_ref)
def launch_rfa_fake_quant_backward(
    launch: Launcher,
    grad: Tensor,
    w: Tensor,
    step: Tensor,
    shift: Tensor,
    thresholds: Tensor,
    quant_min: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`qmir::rfa_fake_quant_backward`; arguments as in the operator after `launch`."""
    if not _fits(w, thresholds):
        return rfa_fake_quant_backward_ref(grad, w, step, shift, thresholds, quant_min)
    check_weight("rfa_fake_quant_backward", w, step, shift, thresholds, quant_min)
    operands = _operands(w, step, shift, thresholds, quant_min)
    up, size, rows = dense(grad.float()), thresholds.shape[0], step.numel()
    blocks, tiles = ceil_div(w.numel(), TILE), ceil_div(w.numel() // rows, ROW_TILE)
    check_count("a number of histogram entries", 2 * (size + 1) * blocks, HISTOGRAM_VALUES)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=w.device)

    dw, dthresholds = empty(*w.shape), empty(size)
    dstep, dshift = empty(*step.shape), empty(*shift.shape)
    histograms = empty(blocks, 2, size + 1, dtype=torch.float64)
    sums = empty(rows * tiles, 3, dtype=torch.float64)
    args = [*operands, up, dw, histograms]
    launch(SOURCE, f"qmir_rfa_backward_{size}", (blocks, 1, 1), BLOCK, args)
    args = [*operands, up, dw, sums, tiles]
    launch(SOURCE, f"qmir_rfa_rows_{size}", (rows * tiles, 1, 1), BLOCK, args)
    args = [*operands, histograms, blocks, sums, tiles, dstep, dshift, dthresholds]
    launch(SOURCE, f"qmir_rfa_finish_{size}", (1, 1, 1), BLOCK, args)
    like = ((dw, w), (dstep, step), (dshift, shift), (dthresholds, thresholds))
    kept = [gradient.to(x.dtype) for gradient, x in like]
    return kept[0], kept[1], kept[2], kept[3]
