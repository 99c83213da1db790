"""What a zero-padded convolution makes of an image that is constant in each channel.

    y[o, p] = sum over channels c and taps k inside the image at p of w_hat[o, c, k] * offset[c]

A quantizer with a channel shift gives x_hat = value - offset. Taps outside the image contribute
nothing to either part, so the convolution of x_hat is the integer convolution of the value minus
this: a constant inside the image that changes only where padding takes taps away.

Source: linearity of the convolution; the border follows `qmir::conv2d`, which pads the value 0.

Shape letters: C = input channels, O = output channels. Inference only: there is no backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d as float_conv2d

from qmir_ao.ops._library import define
from qmir_ao.ops.rfa import rfa_dequantize


def _check(codes: Tensor, offset: Tensor, weight_size: Sequence[int], groups: int) -> None:
    channels = weight_size[1] * groups if len(weight_size) == 4 else -1
    torch._check(
        codes.dim() == 4 and codes.shape[1] == channels and offset.numel() in (1, channels),
        lambda: (
            f"qmir::conv2d_offset: codes must be (B, C, H, W) and offset hold 1 or C values with "
            f"C = {channels} of a weight {list(weight_size)} in {groups} groups, got "
            f"{tuple(codes.shape)} and {tuple(offset.shape)}"
        ),
    )


def conv2d_offset_ref(
    codes: Tensor,
    offset: Tensor,
    weight: Tensor,
    w_step: Tensor,
    w_shift: Tensor,
    bits: int,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Plain-torch form of `qmir::conv2d_offset`: one channel of ones meets the taps' sums."""
    _check(codes, offset, weight_size, groups)
    out, inner, height, width = weight_size
    values = rfa_dequantize(weight, w_step, w_shift, list(weight_size), bits).double()
    spread = offset.reshape(-1).double().expand(groups * inner).reshape(groups, 1, inner, 1, 1)
    taps = (values.reshape(groups, out // groups, inner, height, width) * spread).sum(2)
    ones = taps.new_ones((1, 1, *codes.shape[2:]))
    taps = taps.reshape(out, 1, height, width)
    return float_conv2d(ones, taps, None, stride, padding, dilation).float()


def _fake(
    codes: Tensor,
    offset: Tensor,
    weight: Tensor,
    w_step: Tensor,
    w_shift: Tensor,
    bits: int,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    _check(codes, offset, weight_size, groups)
    sides = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            codes.shape[2:], weight_size[2:], stride, padding, dilation, strict=True
        )
    ]
    return offset.new_empty((1, weight_size[0], *sides), dtype=torch.float32)


_conv2d_offset = define(
    "conv2d_offset(Tensor codes, Tensor offset, Tensor weight, Tensor w_step, Tensor w_shift, "
    "int bits, int[] weight_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "int groups) -> Tensor",
    reference=conv2d_offset_ref,
    fake=_fake,
)


def conv2d_offset(
    codes: Tensor,
    offset: Tensor,
    weight: Tensor,
    w_step: Tensor,
    w_shift: Tensor,
    *,
    bits: int,
    weight_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Zero-padded convolution of an image that holds `offset` in each channel.

    Args:
        codes: int8 codes (B, C, H, W) of the image; only the size counts.
        offset: float32, one value per channel (C,) in any shape, or one for all.
        weight: `pack(codes of shape weight_size, bits)`, uint8.
        w_step: float32, one per output channel (O,) or (1,).
        w_shift: float32, (1,) or as w_step.
        bits: container of one weight code: 2, 4 or 8.
        weight_size: (O, C / groups, kh, kw).
        stride: as for `torch.nn.functional.conv2d`.
        padding: rows and columns of zeros on each side.
        dilation: distance of the taps.
        groups: number of channel groups.

    Returns:
        float32 (1, O, H', W'), summed in float64.

    Shape: codes (B, C, H, W); offset (C,); result (1, O, H', W').

    Raises:
        RuntimeError: sizes that do not fit.

    Source: module docstring.
    """
    y: Tensor = _conv2d_offset(
        codes, offset, weight, w_step, w_shift, bits, list(weight_size), list(stride),
        list(padding), list(dilation), groups,
    )  # fmt: skip
    return y
