"""Two-dimensional convolution on integer codes with a packed weight.

    acc[o, p] = sum over taps inside the image of q_x * q_w[o]       int32, exact
    y[o, p]   = (alpha*step[o] * acc - alpha*shift[o] * sx[p])
                + (n[p]*beta*shift[o] - beta*step[o]*sw[o, p] + bias[o]
                   - (unit*step[o] * qo[o, p] - unit*shift[o] * so[o, p]))

with x_hat = alpha * q_x - beta - unit * q_o[c] and w_hat = step * q_w - shift; unit * q_o[c] is the
offset of channel c in fixed point, and the last line is 0 without one. Zero padding pads x_hat = 0,
which is not q_x = 0, so the sums sx of q_x, sw of q_w, qo of q_w * q_o and so of q_o, and the
number n of taps count only the taps that lie inside the image; near a border they depend on the
position. A residual and an activation may follow (`qmir_ao.ops._epilogue`); `conv2d_moments` also
gives the statistics of the result (`qmir_ao.ops._moments`).

Source: affine integer arithmetic on the grids of Q-MambaIR (arXiv 2503.21970), equations 5 to 7.

Shape letters: B = samples, C and O = input and output channels, H, W = input size, P, Q = output
size, kh, kw = kernel size, G = B or 1 activation groups.
Inference only: there is no backward.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qmir_ao.ops._convolution import Geometry, check_convolution, windows
from qmir_ao.ops._epilogue import (
    ARGUMENTS,
    Epilogue,
    apply_epilogue,
    check_epilogue,
    image_format,
)
from qmir_ao.ops._integer import (
    check_bias,
    check_grid,
    check_offset,
    check_weight_grid,
    epilogue,
    fixed_point,
)
from qmir_ao.ops._library import define
from qmir_ao.ops._moments import ARGUMENT as MOMENTS_ARGUMENT
from qmir_ao.ops._moments import with_empty_moments, with_moments
from qmir_ao.ops.pack import unpack_ref

_GEOMETRY = (
    "int bits, int[] weight_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, int groups"
)
ACC_SCHEMA = f"conv2d_acc(Tensor x, Tensor weight, {_GEOMETRY}) -> Tensor"
_PARAMETERS = (
    "Tensor x, Tensor x_step, Tensor x_shift, Tensor weight, Tensor w_step, "
    f"Tensor w_shift, Tensor? bias, Tensor? x_offset, {_GEOMETRY}, {ARGUMENTS}"
)
SCHEMA = f"conv2d({_PARAMETERS}) -> Tensor"
MOMENTS_SCHEMA = f"conv2d_moments({_PARAMETERS}, {MOMENTS_ARGUMENT}) -> (Tensor, Tensor)"
PARAMETERS = 17
"""How many parameters `conv2d` has; `conv2d_moments` has one more."""


def check_conv2d(
    x: Tensor,
    x_step: Tensor,
    x_shift: Tensor,
    weight: Tensor,
    w_step: Tensor,
    w_shift: Tensor,
    bias: Tensor | None,
    x_offset: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue,
) -> tuple[int, int]:
    """Refuse operands that do not fit `qmir::conv2d`; return the output's height and width."""
    size = check_convolution("conv2d", x, weight, geometry)
    check_grid("conv2d", "x", x_step, x_shift, x.shape[0])
    check_weight_grid("conv2d", w_step, w_shift, geometry.weight_size[0])
    check_bias("conv2d", bias, geometry.weight_size[0])
    check_offset("conv2d", x_offset, x.shape[1])
    features = geometry.weight_size[0]
    check_epilogue("conv2d", epilogue, (x.shape[0], features, *size), features)
    return size


def _weight_codes(weight: Tensor, geometry: Geometry) -> Tensor:
    size = list(geometry.weight_size)
    codes = unpack_ref(weight, geometry.bits, math.prod(size))
    return codes.reshape(size).to(torch.int32)


def _accumulate(x: Tensor, codes: Tensor, geometry: Geometry, out: tuple[int, int]) -> Tensor:
    groups = geometry.groups
    kernel = codes.reshape(groups, codes.shape[0] // groups, *codes.shape[1:])
    acc = x.new_zeros(x.shape[0], groups, kernel.shape[1], out[0] * out[1], dtype=torch.int32)
    for i, j, window in windows(x.to(torch.int32), geometry, out):
        values = window.reshape(x.shape[0], groups, codes.shape[1], out[0] * out[1])
        acc = acc + torch.matmul(kernel[..., i, j], values)
    return acc.reshape(x.shape[0], codes.shape[0], *out)


def conv2d_acc_ref(
    x: Tensor,
    weight: Tensor,
    bits: int,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Plain-torch form of `qmir::conv2d_acc`."""
    geometry = Geometry(bits, weight_size, stride, padding, dilation, groups)
    out = check_convolution("conv2d_acc", x, weight, geometry)
    return _accumulate(x, _weight_codes(weight, geometry), geometry, out)


def _offset_sums(
    x: Tensor, x_offset: Tensor, codes: Tensor, geometry: Geometry, out: tuple[int, int]
) -> tuple[Tensor, Tensor, float]:
    """Sums of q_w * q_o and of q_o over the taps inside the image (O, P, Q), and the unit."""
    fixed, unit = fixed_point(x_offset.reshape(-1))
    groups, inputs = geometry.groups, codes.shape[1]
    spread = fixed.expand(groups * inputs).reshape(groups, 1, inputs, 1, 1)
    products = (codes.reshape(groups, -1, *codes.shape[1:]) * spread).sum(2)
    products = products.reshape(codes.shape[0], *codes.shape[2:], 1, 1)
    each = spread.sum(2).expand(-1, codes.shape[0] // groups, 1, 1).reshape(-1, 1, 1)
    qo = fixed.new_zeros(codes.shape[0], *out)
    so = fixed.new_zeros(codes.shape[0], *out)
    inside = x.new_ones(x.shape[2:], dtype=torch.int64)
    for i, j, window in windows(inside, geometry, out):
        qo = qo + window * products[:, i, j]
        so = so + window * each
    return qo, so, unit


def conv2d_ref(
    x: Tensor,
    x_step: Tensor,
    x_shift: Tensor,
    weight: Tensor,
    w_step: Tensor,
    w_shift: Tensor,
    bias: Tensor | None,
    x_offset: Tensor | None,
    bits: int,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Plain-torch form of `qmir::conv2d`."""
    geometry = Geometry(bits, weight_size, stride, padding, dilation, groups)
    end = Epilogue(residual, residual_scale, activation)
    out = check_conv2d(x, x_step, x_shift, weight, w_step, w_shift, bias, x_offset, geometry, end)
    codes = _weight_codes(weight, geometry)
    features = codes.shape[0]
    offset = None if x_offset is None else _offset_sums(x, x_offset, codes, geometry, out)
    sums = x.reshape(x.shape[0], groups, -1, *x.shape[2:]).sum(2, dtype=torch.int32)
    sx = torch.stack([window for _, _, window in windows(sums, geometry, out)]).sum(0)
    sx = sx.repeat_interleave(features // groups, dim=1)
    inside = x.new_ones(x.shape[2:], dtype=torch.int64)
    row_sums = codes.sum(1)
    taps = inside.new_zeros(out)
    sw = inside.new_zeros(features, *out)
    for i, j, window in windows(inside, geometry, out):
        taps = taps + window
        sw = sw + window * row_sums[:, i, j].reshape(-1, 1, 1)
    y = epilogue(
        _accumulate(x, codes, geometry, out),
        sx,
        sw,
        taps * codes.shape[1],
        (x_step.reshape(-1, 1, 1, 1), x_shift.reshape(-1, 1, 1, 1)),
        (w_step.reshape(-1, 1, 1), w_shift.reshape(-1, 1, 1)),
        None if bias is None else bias.reshape(-1, 1, 1),
        offset,
    )
    y = apply_epilogue(y, end, (-1, 1, 1))
    return y.contiguous(memory_format=image_format(residual))


def _conv2d_acc_fake(
    x: Tensor,
    weight: Tensor,
    bits: int,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = Geometry(bits, weight_size, stride, padding, dilation, groups)
    out = check_convolution("conv2d_acc", x, weight, geometry)
    return x.new_empty((x.shape[0], weight_size[0], *out), dtype=torch.int32)


def _conv2d_fake(
    x: Tensor,
    x_step: Tensor,
    x_shift: Tensor,
    weight: Tensor,
    w_step: Tensor,
    w_shift: Tensor,
    bias: Tensor | None,
    x_offset: Tensor | None,
    bits: int,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    geometry = Geometry(bits, weight_size, stride, padding, dilation, groups)
    end = Epilogue(residual, residual_scale, activation)
    out = check_conv2d(x, x_step, x_shift, weight, w_step, w_shift, bias, x_offset, geometry, end)
    size = (x.shape[0], weight_size[0], *out)
    return torch.empty(
        size, dtype=torch.float32, device=x.device, memory_format=image_format(residual)
    )


_conv2d_acc = define(ACC_SCHEMA, reference=conv2d_acc_ref, fake=_conv2d_acc_fake)
_conv2d = define(SCHEMA, reference=conv2d_ref, fake=_conv2d_fake)
conv2d_moments_ref = with_moments(conv2d_ref, "conv2d_moments", 1, PARAMETERS)
conv2d_moments = define(
    MOMENTS_SCHEMA,
    reference=conv2d_moments_ref,
    fake=with_empty_moments(_conv2d_fake, "conv2d_moments", 1, PARAMETERS),
)
"""`conv2d` and the statistics of its output channels for each sample (`qmir_ao.ops._moments`)."""


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def conv2d_acc(
    x: Tensor,
    weight: Tensor,
    *,
    bits: int,
    weight_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Integer accumulators of a convolution; taps outside the image count as nothing.

    Args:
        x: int8 codes (B, C, H, W).
        weight: `pack(codes of shape weight_size, bits)`, uint8.
        bits: container of one weight code: 2, 4 or 8.
        weight_size: [O, C/groups, kh, kw].
        stride: one integer, or (rows, columns); so are padding and dilation.
        padding: zeros (of the dequantized image) on each side.
        dilation: distance of neighbouring taps.
        groups: channel groups; C for a depthwise convolution.

    Returns:
        int32 sums of products (B, O, P, Q), exact.

    Shape: x (B, C, H, W); weight (ceil(numel*bits/8),); result (B, O, P, Q).

    Raises:
        RuntimeError: an operand of another type, shape or length.

    Source: module docstring.
    """
    pairs = (_pair(stride), _pair(padding), _pair(dilation))
    acc: Tensor = _conv2d_acc(x, weight, bits, list(weight_size), *pairs, groups)
    return acc


def conv2d(
    x: Tensor,
    x_step: Tensor,
    x_shift: Tensor,
    weight: Tensor,
    w_step: Tensor,
    w_shift: Tensor,
    bias: Tensor | None = None,
    x_offset: Tensor | None = None,
    *,
    bits: int,
    weight_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Convolution of quantized operands in integer arithmetic: conv(x_hat, w_hat) + bias.

    Args:
        x: int8 codes (B, C, H, W).
        x_step: alpha, float32, one per sample (B,) or (1,).
        x_shift: beta, as x_step.
        weight: `pack(codes of shape weight_size, bits)`, uint8.
        w_step: float32, one per output channel (O,) or (1,).
        w_shift: float32, (1,) or as w_step.
        bias: float32 (O,), or None.
        x_offset: float32, subtracted from the channels of x_hat: (C,) or (1,) in any shape, or
            None. Rounded to 2**-38 of its largest value; one that is not finite gives NaN.
        bits: container of one weight code: 2, 4 or 8.
        weight_size: [O, C/groups, kh, kw].
        stride: one integer, or (rows, columns); so are padding and dilation.
        padding: zeros (of the dequantized image) on each side.
        dilation: distance of neighbouring taps.
        groups: channel groups; C for a depthwise convolution.
        residual: float32 (B, O, P, Q), added to the result, or None.
        residual_scale: float32, O factors of the residual's channels, or None.
        activation: of the sum, "none", "relu", "sigmoid", "silu", "gelu" or "gelu_tanh".

    Returns:
        float32 (B, O, P, Q); channels last in memory where the residual is, else contiguous.

    Shape: x (B, C, H, W); weight (ceil(numel*bits/8),); result (B, O, P, Q).

    Raises:
        RuntimeError: an operand of another type, shape or length.

    Source: module docstring.
    """
    tensors = (x_step, x_shift, weight, w_step, w_shift, bias, x_offset)
    pairs = (_pair(stride), _pair(padding), _pair(dilation))
    end = (residual, residual_scale, activation)
    y: Tensor = _conv2d(x, *tensors, bits, list(weight_size), *pairs, groups, *end)
    return y
