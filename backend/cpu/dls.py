"""CPU kernels of the activation quantizers `qmir::dls_*` and `qmir::static_fake_quant`."""

import ctypes

import torch
from torch import Tensor

from qmir_ao.backend.cpu.binding import all_float32, bind, dense
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.ops._affine import check_range, code_dtype, group_count, non_finite
from qmir_ao.ops.dls import (
    check_groups,
    check_scalars,
    dls_dequantize_ref,
    dls_qparams_ref,
    dls_quantize_ref,
)
from qmir_ao.ops.dls_fake_quant import dls_fake_quant_backward_ref, dls_fake_quant_ref
from qmir_ao.ops.static import (
    check_single,
    static_fake_quant_backward_ref,
    static_fake_quant_ref,
)


def _forward(
    lib: ctypes.CDLL,
    op: str,
    x: Tensor,
    scalars: tuple[Tensor, Tensor],
    grid: tuple[int, int, bool],
    groups: int,
    y: Tensor | None,
    clamp_output: bool,
) -> tuple[Tensor, Tensor]:
    check_scalars(op, *scalars)
    check_range(op, grid[0], grid[1])
    x, w, v = dense(x, *scalars)
    step, shift = torch.empty(2, groups, dtype=torch.float32).unbind()
    run = bind(lib, "qmir_dls_forward", "ppppppiiiiii", True)
    bad = run(
        x.data_ptr(), w.data_ptr(), v.data_ptr(), step.data_ptr(), shift.data_ptr(),
        None if y is None else y.data_ptr(), groups, x.numel() // groups, *grid, clamp_output,
    )  # fmt: skip
    if bad >= 0:
        raise non_finite(op, f"sample {bad} of x")
    return step, shift


@cpu_kernel("dls_qparams", dls_qparams_ref)
def _dls_qparams(
    lib: ctypes.CDLL,
    x: Tensor,
    scale_weights: Tensor,
    shift_weights: Tensor,
    quant_min: int,
    quant_max: int,
    per_tensor: bool,
    cap: bool,
) -> tuple[Tensor, Tensor]:
    if not (all_float32(x, scale_weights, shift_weights) and x.numel()):
        return dls_qparams_ref(
            x, scale_weights, shift_weights, quant_min, quant_max, per_tensor, cap
        )
    step, shift = _forward(
        lib,
        "dls_qparams",
        x,
        (scale_weights, shift_weights),
        (quant_min, quant_max, cap),
        group_count(x, per_tensor),
        None,
        False,
    )
    return step.clone(), shift.clone()


@cpu_kernel("dls_fake_quant", dls_fake_quant_ref)
def _dls_fake_quant(
    lib: ctypes.CDLL,
    x: Tensor,
    scale_weights: Tensor,
    shift_weights: Tensor,
    quant_min: int,
    quant_max: int,
    per_tensor: bool,
    cap: bool,
    clamp_output: bool,
) -> Tensor:
    if not (all_float32(x, scale_weights, shift_weights) and x.numel()):
        return dls_fake_quant_ref(
            x, scale_weights, shift_weights, quant_min, quant_max, per_tensor, cap, clamp_output
        )
    y = torch.empty(x.shape, dtype=torch.float32)
    _forward(
        lib,
        "dls_fake_quant",
        x,
        (scale_weights, shift_weights),
        (quant_min, quant_max, cap),
        group_count(x, per_tensor),
        y,
        clamp_output,
    )
    return y


@cpu_kernel("dls_fake_quant_backward", dls_fake_quant_backward_ref)
def _dls_fake_quant_backward(
    lib: ctypes.CDLL,
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
    op = "dls_fake_quant_backward"
    if not (all_float32(grad, x, scale_weights, shift_weights) and x.numel()):
        return dls_fake_quant_backward_ref(
            grad, x, scale_weights, shift_weights, quant_min, quant_max, per_tensor, cap,
            clamp_output,
        )  # fmt: skip
    check_scalars(op, scale_weights, shift_weights)
    check_range(op, quant_min, quant_max)
    groups = group_count(x, per_tensor)
    grad, x, w, v = dense(grad, x, scale_weights, shift_weights)
    dx, dw, dv = (torch.empty_like(t) for t in (x, w, v))
    run = bind(lib, "qmir_dls_backward", "pppppppiiiiii", True)
    bad = run(
        *(t.data_ptr() for t in (grad, x, w, v, dx, dw, dv)),
        groups, x.numel() // groups, quant_min, quant_max, cap, clamp_output,
    )  # fmt: skip
    if bad >= 0:
        raise non_finite(op, f"sample {bad} of x")
    return dx, dw, dv


@cpu_kernel("dls_quantize", dls_quantize_ref)
def _dls_quantize(
    lib: ctypes.CDLL, x: Tensor, step: Tensor, shift: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    if not (all_float32(x, step, shift) and x.numel()):
        return dls_quantize_ref(x, step, shift, quant_min, quant_max)
    check_range("dls_quantize", quant_min, quant_max)
    check_groups("dls_quantize", x, step, shift)
    x, step, shift = dense(x, step, shift)
    q = torch.empty(x.shape, dtype=code_dtype(quant_max))
    groups = step.numel()
    bind(lib, "qmir_dls_quantize", "ppppiiii")(
        *(t.data_ptr() for t in (x, step, shift, q)),
        groups, x.numel() // groups, quant_min, quant_max,
    )  # fmt: skip
    return q


@cpu_kernel("dls_dequantize", dls_dequantize_ref)
def _dls_dequantize(lib: ctypes.CDLL, q: Tensor, step: Tensor, shift: Tensor) -> Tensor:
    known = q.dtype in (torch.int8, torch.uint8)
    if not (known and all_float32(step, shift) and q.numel()):
        return dls_dequantize_ref(q, step, shift)
    check_groups("dls_dequantize", q, step, shift)
    q, step, shift = dense(q, step, shift)
    y = torch.empty(q.shape, dtype=torch.float32)
    groups = step.numel()
    bind(lib, "qmir_dls_dequantize", "ppppiii")(
        *(t.data_ptr() for t in (q, step, shift, y)),
        groups, q.numel() // groups, q.dtype == torch.uint8,
    )  # fmt: skip
    return y


@cpu_kernel("static_fake_quant", static_fake_quant_ref)
def _static_fake_quant(
    lib: ctypes.CDLL, x: Tensor, step: Tensor, shift: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    if not (all_float32(x, step, shift) and x.numel()):
        return static_fake_quant_ref(x, step, shift, quant_min, quant_max)
    check_range("static_fake_quant", quant_min, quant_max)
    check_single("static_fake_quant", step, shift)
    x = x.contiguous()
    y = torch.empty_like(x)
    finite = bind(lib, "qmir_static_forward", "ppppiii", True)(
        *(t.data_ptr() for t in (x, step, shift, y)), x.numel(), quant_min, quant_max
    )
    if not finite:
        raise non_finite("static_fake_quant", "x")
    return y


@cpu_kernel("static_fake_quant_backward", static_fake_quant_backward_ref)
def _static_fake_quant_backward(
    lib: ctypes.CDLL,
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    shift: Tensor,
    quant_min: int,
    quant_max: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if not (all_float32(grad, x, step, shift) and x.numel()):
        return static_fake_quant_backward_ref(grad, x, step, shift, quant_min, quant_max)
    check_range("static_fake_quant_backward", quant_min, quant_max)
    check_single("static_fake_quant_backward", step, shift)
    grad, x = dense(grad, x)
    dx, dstep, dshift = (torch.empty_like(t) for t in (x, step, shift))
    bind(lib, "qmir_static_backward", "pppppppiii")(
        *(t.data_ptr() for t in (grad, x, step, shift, dx, dstep, dshift)),
        x.numel(), quant_min, quant_max,
    )  # fmt: skip
    return dx, dstep, dshift
