"""Launchers of `qmir::dls_qparams`, `dls_quantize` and `dls_dequantize` (cuda/dls.cu).

The kernels know float32; other types, and empty tensors, run the reference on the device.

A sample that holds NaN or infinity cannot raise here as it does on the CPU: that would have to wait
for the device, which a captured CUDA graph forbids. Its step and shift are NaN instead, and so is
every value computed from them.
"""

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import Launcher, ceil_div, check_device, dense
from qmir_ao.backend.cuda.registration import cuda_kernel
from qmir_ao.ops._affine import check_range, code_dtype, group_count
from qmir_ao.ops.dls import (
    check_groups,
    check_scalars,
    dls_dequantize_ref,
    dls_qparams_ref,
    dls_quantize_ref,
)
from qmir_ao.ops.pack import check_container, packed_bytes

CHUNK = 4096
SHORT = 1024
"""Longest group that half a warp adds up by itself."""
ROW_GROUPS = 32
SUM_THREADS = 128
THREADS = 256
VECTORS = (16, 4, 1)


def _all_float32(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.float32 for t in tensors)


@cuda_kernel("dls_qparams", dls_qparams_ref)
def launch_dls_qparams(
    launch: Launcher,
    x: Tensor,
    scale_weights: Tensor,
    shift_weights: Tensor,
    quant_min: int,
    quant_max: int,
    per_tensor: bool,
    cap: bool,
) -> tuple[Tensor, Tensor]:
    """Start the kernels of `qmir::dls_qparams`; NaN for a group that is not finite."""
    device = check_device("dls_qparams", x, scale_weights, shift_weights)
    if not (_all_float32(x, scale_weights, shift_weights) and x.numel()):
        return dls_qparams_ref(
            x, scale_weights, shift_weights, quant_min, quant_max, per_tensor, cap
        )
    check_scalars("dls_qparams", scale_weights, shift_weights)
    check_range("dls_qparams", quant_min, quant_max)
    groups = group_count(x, per_tensor)
    count = x.numel() // groups
    x, weights = dense(x), (dense(scale_weights), dense(shift_weights))
    step, shift = (torch.empty(groups, dtype=torch.float32, device=device) for _ in range(2))
    levels = float(quant_max - quant_min + 1) if cap else 0.0
    block = (SUM_THREADS, 1, 1)
    if count <= SHORT:
        launch(
            "dls",
            "qmir_dls_rows",
            (ceil_div(groups, ROW_GROUPS), 1, 1),
            block,
            (x, *weights, step, shift, groups, count, levels),
        )
        return step, shift
    chunks = ceil_div(count, CHUNK)
    sums = torch.empty(groups * chunks * 2, dtype=torch.float64, device=device)
    ranges = torch.empty(groups * chunks * 2, dtype=torch.float32, device=device)
    chunk_args = (x, sums, ranges, count, chunks)
    launch("dls", "qmir_dls_chunks", (groups * chunks, 1, 1), block, chunk_args)
    launch_finish(launch, x, (sums, ranges), weights, (step, shift), (count, count), levels)
    return step, shift


def launch_finish(
    launch: Launcher,
    firsts: Tensor,
    chunks: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    found: tuple[Tensor, Tensor],
    sizes: tuple[int, int],
    levels: float,
) -> None:
    """Start the kernel that makes steps and shifts of the sums of chunks.

    Args:
        launch: starts the kernel.
        firsts: the first value of each group.
        chunks: sums and ranges of every chunk.
        weights: (4,) of the step and of the shift.
        found: step and shift of each group, which are written.
        sizes: elements between two first values, and those of a group.
        levels: divisor of the cap, or 0 without one.
    """
    groups = found[0].numel()
    count = chunks[0].numel() // (2 * groups)
    args = (firsts, *chunks, *weights, *found, *sizes, count, levels)
    launch("dls", "qmir_dls_finish", (groups, 1, 1), (SUM_THREADS, 1, 1), args)


def _elementwise(
    launch: Launcher, kernel: str, args: tuple[Tensor, ...], sizes: tuple[int | float, ...]
) -> None:
    """Start a kernel whose threads take several neighbouring elements of one group."""
    total, count = args[0].numel(), args[0].numel() // args[1].numel()
    vector = next(n for n in VECTORS if count % n == 0)
    blocks = ceil_div(total // vector, THREADS)
    launch(
        "dls",
        f"{kernel}_v{vector}",
        (blocks, 1, 1),
        (THREADS, 1, 1),
        (*args, total, count, *sizes),
    )


@cuda_kernel("dls_quantize", dls_quantize_ref)
def launch_dls_quantize(
    launch: Launcher, x: Tensor, step: Tensor, shift: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """Start the kernel of `qmir::dls_quantize`; arguments and result are those of the operator."""
    device = check_device("dls_quantize", x, step, shift)
    if not (_all_float32(x, step, shift) and x.numel()):
        return dls_quantize_ref(x, step, shift, quant_min, quant_max)
    check_range("dls_quantize", quant_min, quant_max)
    check_groups("dls_quantize", x, step, shift)
    q = torch.empty(x.shape, dtype=code_dtype(quant_max), device=device)
    args = (dense(x), dense(step), dense(shift), q)
    _elementwise(launch, "qmir_dls_quantize", args, (float(quant_min), float(quant_max)))
    return q


def launch_dls_quantize_pack(
    launch: Launcher,
    x: Tensor,
    step: Tensor,
    shift: Tensor,
    quant_min: int,
    quant_max: int,
    bits: int,
) -> Tensor:
    """Start one kernel that does `qmir::dls_quantize` and then `qmir::pack`.

    No operator calls it: between operators codes are int8, see docs/performance.md.

    Args:
        launch: starts the kernel.
        x: float32 activations, not empty.
        step: as `qmir::dls_quantize`.
        shift: like `step`.
        quant_min: smallest code.
        quant_max: largest code.
        bits: container, 2 or 4; codes that it cannot hold are cut off, as `qmir::pack` does.

    Returns:
        uint8, flat.
    """
    device = check_device("dls_quantize", x, step, shift)
    check_range("dls_quantize", quant_min, quant_max)
    check_groups("dls_quantize", x, step, shift)
    check_container("pack", bits)
    packed = torch.empty(packed_bytes(x.numel(), bits), dtype=torch.uint8, device=device)
    total, count = x.numel(), x.numel() // step.numel()
    vector = 16 if count % 16 == 0 else 8 // bits
    blocks = ceil_div(ceil_div(total, vector), THREADS)
    launch(
        "dls",
        f"qmir_dls_quantize_pack{bits}_v{vector}",
        (blocks, 1, 1),
        (THREADS, 1, 1),
        (dense(x), dense(step), dense(shift), packed, total, count,
         float(quant_min), float(quant_max)),
    )  # fmt: skip
    return packed


@cuda_kernel("dls_dequantize", dls_dequantize_ref)
def launch_dls_dequantize(launch: Launcher, q: Tensor, step: Tensor, shift: Tensor) -> Tensor:
    """Start the kernel of `qmir::dls_dequantize`; arguments and result are the operator's."""
    device = check_device("dls_dequantize", q, step, shift)
    known = q.dtype in (torch.int8, torch.uint8)
    if not (known and _all_float32(step, shift) and q.numel()):
        return dls_dequantize_ref(q, step, shift)
    check_groups("dls_dequantize", q, step, shift)
    y = torch.empty(q.shape, dtype=torch.float32, device=device)
    kind = "_unsigned" if q.dtype == torch.uint8 else ""
    _elementwise(launch, f"qmir_dls_dequantize{kind}", (dense(q), dense(step), dense(shift), y), ())
    return y
