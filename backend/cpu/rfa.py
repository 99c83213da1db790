"""CPU kernels of the weight quantizer `qmir::rfa_*` (csrc/rfa.cpp)."""

import ctypes

import torch
from torch import Tensor

from qmir_ao.backend.cpu.binding import all_float32, bind, dense
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.ops._affine import non_finite
from qmir_ao.ops.rfa import check_weight, rfa_quantize_ref
from qmir_ao.ops.rfa_fake_quant import rfa_fake_quant_backward_ref, rfa_fake_quant_ref

_COMPILED = (4, 8, 16, 32, 64, 128, 256)


def _fits(*tensors: Tensor) -> bool:
    compiled = tensors[-1].dim() == 1 and tensors[-1].shape[0] in _COMPILED
    return compiled and all_float32(*tensors) and tensors[0].numel() > 0


def _round(
    lib: ctypes.CDLL, op: str, out: Tensor, tensors: tuple[Tensor, ...], quant_min: int
) -> Tensor:
    w, step, shift, thresholds = dense(*tensors)
    check_weight(op, w, step, shift, thresholds, quant_min)
    rows = step.numel()
    bad = bind(lib, "qmir_rfa_forward", "pppppiiiiii", True)(
        *(t.data_ptr() for t in (w, step, shift, thresholds, out)),
        rows, w.numel() // rows, shift.numel(), thresholds.shape[0], quant_min,
        out.dtype == torch.int8,
    )  # fmt: skip
    if bad:
        raise non_finite(op, "the weight")
    return out


@cpu_kernel("rfa_fake_quant", rfa_fake_quant_ref)
def _rfa_fake_quant(
    lib: ctypes.CDLL, w: Tensor, step: Tensor, shift: Tensor, thresholds: Tensor, quant_min: int
) -> Tensor:
    if not _fits(w, step, shift, thresholds):
        return rfa_fake_quant_ref(w, step, shift, thresholds, quant_min)
    tensors = (w, step, shift, thresholds)
    return _round(
        lib, "rfa_fake_quant", torch.empty(w.shape, dtype=torch.float32), tensors, quant_min
    )


@cpu_kernel("rfa_quantize", rfa_quantize_ref)
def _rfa_quantize(
    lib: ctypes.CDLL, w: Tensor, step: Tensor, shift: Tensor, thresholds: Tensor, quant_min: int
) -> Tensor:
    if not _fits(w, step, shift, thresholds):
        return rfa_quantize_ref(w, step, shift, thresholds, quant_min)
    codes = torch.empty(w.shape, dtype=torch.int8)
    return _round(lib, "rfa_quantize", codes, (w, step, shift, thresholds), quant_min)


@cpu_kernel("rfa_fake_quant_backward", rfa_fake_quant_backward_ref)
def _rfa_fake_quant_backward(
    lib: ctypes.CDLL,
    grad: Tensor,
    w: Tensor,
    step: Tensor,
    shift: Tensor,
    thresholds: Tensor,
    quant_min: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _fits(grad, w, step, shift, thresholds):
        return rfa_fake_quant_backward_ref(grad, w, step, shift, thresholds, quant_min)
    check_weight("rfa_fake_quant_backward", w, step, shift, thresholds, quant_min)
    kept = dense(grad, w, step, shift, thresholds)
    gradients = tuple(torch.empty_like(t) for t in kept[1:])
    rows = step.numel()
    bind(lib, "qmir_rfa_backward", "pppppppppiiiii")(
        *(t.data_ptr() for t in (*kept, *gradients)),
        rows, w.numel() // rows, shift.numel(), thresholds.shape[0], quant_min,
    )  # fmt: skip
    return gradients[0], gradients[1], gradients[2], gradients[3]
