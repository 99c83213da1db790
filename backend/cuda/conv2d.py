"""Launchers of `qmir::conv2d`, `conv2d_acc` and `conv2d_moments`.

One kernel arranges the weight and tabulates the constants (cuda/qconv2d_prepare.cu), one
multiplies: on the tensor cores (cuda/qconv2d.cu), or directly where every feature reads one channel
(cuda/qconv2d_depthwise.cu). Statistics of the result, and activations beyond none and relu, need
other kernels of these sources; cuda/moments.cu merges the statistics of tiles.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import (
    Argument,
    Launcher,
    ceil_div,
    check_count,
    check_device,
    dense,
)
from qmir_ao.backend.cuda.moments import Room, make_room, merge
from qmir_ao.backend.cuda.registration import cuda_kernel, declare_shared
from qmir_ao.errors import DeviceError
from qmir_ao.ops._activations import EXACT
from qmir_ao.ops._convolution import Geometry, check_convolution
from qmir_ao.ops._epilogue import Epilogue, image_format
from qmir_ao.ops._moments import split_offset
from qmir_ao.ops.conv2d import (
    PARAMETERS,
    check_conv2d,
    conv2d_acc_ref,
    conv2d_moments_ref,
    conv2d_ref,
)

TILE = 64
STEP = 64
FRAGMENT_ROWS = 16
BLOCK = (128, 1, 1)
MAX_WINDOW = 44 * 1024
"""Bytes of shared memory that a tile's part of the image may take; four blocks then fit an SM."""
POSITION_BYTES = STEP + 4
DEPTHWISE_PIXELS = 4
RESULT_BYTES = 4 * TILE * (TILE + 1)
"""Of a tile of results in shared memory, which takes the place of a window."""

# Of a 3x3 kernel.
for _kind in ("", "_acc", "_kept"):
    _window = 100 * POSITION_BYTES
    declare_shared(
        f"qmir_conv2d{_kind}_w", {}, max(_window, RESULT_BYTES) if _kind == "_kept" else _window
    )
    declare_shared(f"qmir_conv2d_depthwise{_kind}_w", {}, 9)


class Plan(NamedTuple):
    """Tile of output pixels of a block; `shared` where all taps read one window of the image."""

    tile_h: int
    tile_w: int
    shared: bool
    positions: int


def _axis_classes(size: int, out: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    """How many sets of taps may lie inside the image along one axis: conv_taps.cuh counts alike."""

    def taps_before(distance: int) -> int:
        return min(kernel, max(0, ceil_div(distance, dilation)))

    def ends(position: int) -> int:
        origin = position * stride - pad
        last = taps_before(size - origin)
        return last + min(last, taps_before(-origin))

    return ends(0) - ends(out - 1) + 1


class Sizes(NamedTuple):
    """A convolution as the kernels see it, in the order of QMIR_CONV_SIZES."""

    batch: int
    channels: int
    height: int
    width: int
    features: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    groups: int
    out_h: int
    out_w: int

    @classmethod
    def of(cls, x: Tensor, geometry: Geometry, out: tuple[int, int]) -> "Sizes":
        """Sizes of a call; a pointwise convolution becomes one of a single row."""
        batch, channels, height, width = x.shape
        features, _, kernel_h, kernel_w = geometry.weight_size
        stride_h, stride_w = geometry.stride
        pad_h, pad_w = geometry.padding
        dilation_h, dilation_w = geometry.dilation
        if (kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w) == (1, 1, 1, 1, 0, 0):
            height, width = out = (1, height * width)
        sizes = cls(
            batch, channels, height, width, features, kernel_h, kernel_w, stride_h, stride_w,
            pad_h, pad_w, dilation_h, dilation_w, geometry.groups, *out,
        )  # fmt: skip
        plane = max(height * width, out[0] * out[1])
        if plane >= 2**31:
            raise DeviceError(
                f"qmir::conv2d: an image of {plane} pixels; at most 2**31 - 1 fit the kernels. "
                "Split the image into tiles"
            )
        for side, size, stride, pad in (
            ("height", height, stride_h, pad_h),
            ("width", width, stride_w, pad_w),
        ):
            # Positions of a tile's pixels in the padded image, those beyond the last one included.
            what = f"an image's {side} with its padding on both ends and {TILE} strides"
            check_count(what, size + 2 * pad + TILE * stride)
        return sizes

    @property
    def depthwise(self) -> bool:
        """Whether every feature reads one channel."""
        return self.groups == self.channels

    @property
    def tiles(self) -> int:
        """Of each output plane."""
        if self.depthwise:
            return ceil_div(self.out_h * ceil_div(self.out_w, DEPTHWISE_PIXELS), BLOCK[0])
        plan = self.plan()
        return ceil_div(self.out_h, plan.tile_h) * ceil_div(self.out_w, plan.tile_w)

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return self.kernel_h * self.kernel_w

    def classes(self) -> tuple[int, int]:
        """Row and column classes of the output positions."""
        row = (self.height, self.out_h, self.kernel_h, self.stride_h, self.pad_h, self.dilation_h)
        column = (self.width, self.out_w, self.kernel_w, self.stride_w, self.pad_w, self.dilation_w)
        return _axis_classes(*row), _axis_classes(*column)

    def plan(self) -> Plan:
        """The tile that reads least of the image, with one window for all taps if that fits."""

        def window(tile_h: int, tile_w: int) -> int:
            rows = (tile_h - 1) * self.stride_h + (self.kernel_h - 1) * self.dilation_h + 1
            columns = (tile_w - 1) * self.stride_w + (self.kernel_w - 1) * self.dilation_w + 1
            return rows * columns

        shapes = [(TILE // width, width) for width in (8, 16, 32, 64)]
        fitting = [s for s in shapes if window(*s) * POSITION_BYTES <= MAX_WINDOW]
        tiles = {s: ceil_div(self.out_h, s[0]) * ceil_div(self.out_w, s[1]) for s in shapes}
        if fitting:
            best = min(fitting, key=lambda s: tiles[s] * (window(*s) + TILE))
            return Plan(*best, True, window(*best))
        return Plan(*min(shapes, key=tiles.__getitem__), False, TILE)


def _prepare(
    launch: Launcher,
    sizes: Sizes,
    bits: int,
    operands: tuple[Tensor | None, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """The weight as `_multiply` takes it, and the table of constants where the grids are given.

    Args:
        launch: starts the kernel.
        sizes: of the convolution.
        bits: container of one weight code.
        operands: weight, x_shift, w_step, w_shift, bias, x_offset.
        device: where the results go.
    """
    weight, x_shift, w_step, w_shift, _, x_offset = operands
    assert weight is not None
    if sizes.depthwise and x_shift is None:
        return weight, None
    inputs, features = sizes.channels // sizes.groups, sizes.features // sizes.groups
    padded = ceil_div(features, FRAGMENT_ROWS) * FRAGMENT_ROWS
    classes = sizes.classes()
    fragments = sums = constant = None
    if not sizes.depthwise:
        octets = sizes.groups * padded * sizes.taps * ceil_div(inputs, STEP) * (STEP // 8)
        words = 2 if bits == 8 else 1
        fragments = torch.empty(octets * words, dtype=torch.int32, device=device)
    if x_shift is not None:
        sums = torch.empty(sizes.features * sizes.taps * 2, dtype=torch.int64, device=device)
        table = x_shift.numel() * classes[0] * classes[1] * sizes.features
        constant = torch.empty(table, dtype=torch.float32, device=device)
    counts = [1 if t is None else t.numel() for t in (x_shift, w_step, w_shift, x_offset)]
    launch(
        "qconv2d_prepare",
        f"qmir_conv2d_prepare_w{bits}",
        (sizes.groups * padded, 1, 1),
        BLOCK,
        (*operands, *counts, *classes, *sizes, fragments, sums, constant),
    )
    return weight if fragments is None else fragments, constant


def _multiply(
    launch: Launcher,
    sizes: Sizes,
    bits: int,
    x: Tensor,
    weight: Tensor,
    affine: tuple[Argument, ...],
    room: Room | None,
    y: Tensor,
) -> None:
    """Start the kernel that makes `y`.

    Args:
        launch: starts the kernel.
        sizes: of the convolution.
        bits: container of one weight code.
        x: codes.
        weight: what `_prepare` made of it.
        affine: operands of the float result and its epilogue; empty for accumulators.
        room: for statistics, or None where a kernel that knows none will do.
        y: where the result goes.
    """
    kind = "_acc" if not affine else "" if room is None else "_kept"
    more = () if room is None else room.arguments
    tiles = sizes.tiles
    if sizes.depthwise:
        launch(
            "qconv2d_depthwise",
            f"qmir_conv2d_depthwise{kind}_w{bits}",
            (sizes.batch * sizes.features * tiles, 1, 1),
            BLOCK,
            (x, weight, *affine, *sizes, tiles, *more, y),
            shared=sizes.taps,
        )
        return
    plan = sizes.plan()
    features = ceil_div(sizes.features // sizes.groups, TILE)
    window = plan.positions * POSITION_BYTES
    launch(
        "qconv2d",
        f"qmir_conv2d{kind}_w{max(bits, 4)}",
        (sizes.batch * sizes.groups * tiles * features, 1, 1),
        BLOCK,
        (x, weight, *affine, *sizes, plan.tile_h, plan.tile_w, plan.shared, *more, y),
        shared=window if room is None else max(window, RESULT_BYTES),
    )


@cuda_kernel("conv2d_acc", conv2d_acc_ref)
def launch_conv2d_acc(
    launch: Launcher,
    x: Tensor,
    weight: Tensor,
    bits: int,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Start the kernels of `qmir::conv2d_acc`; arguments and result are those of the operator."""
    geometry = Geometry(bits, weight_size, stride, padding, dilation, groups)
    out = check_convolution("conv2d_acc", x, weight, geometry)
    device = check_device("conv2d_acc", x, weight)
    y = torch.empty((x.shape[0], weight_size[0], *out), dtype=torch.int32, device=device)
    if y.numel():
        sizes = Sizes.of(x, geometry, out)
        operands = (dense(weight), None, None, None, None, None)
        prepared, _ = _prepare(launch, sizes, bits, operands, device)
        _multiply(launch, sizes, bits, dense(x), prepared, (), None, y)
    return y


def _run(
    launch: Launcher,
    wants_moments: bool,
    moments_offset: Tensor | None,
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
) -> tuple[Tensor, Tensor | None]:
    geometry = Geometry(bits, weight_size, stride, padding, dilation, groups)
    end = Epilogue(residual, residual_scale, activation)
    out = check_conv2d(x, x_step, x_shift, weight, w_step, w_shift, bias, x_offset, geometry, end)
    tensors = (x, x_step, x_shift, weight, w_step, w_shift, bias, x_offset)
    device = check_device("conv2d", *tensors, residual, residual_scale, moments_offset)
    size, layout = (x.shape[0], weight_size[0], *out), image_format(residual)
    y = torch.empty(size, dtype=torch.float32, device=device, memory_format=layout)
    sizes = Sizes.of(x, geometry, out)
    features, tiles = weight_size[0], sizes.tiles if y.numel() else 0
    room = make_room("conv2d_moments", wants_moments, moments_offset, y, features, tiles)
    if y.numel():
        x_step, w_step, w_shift = dense(x_step), dense(w_step), dense(w_shift)
        bias, x_offset = (None if t is None else dense(t) for t in (bias, x_offset))
        operands = (dense(weight), dense(x_shift), w_step, w_shift, bias, x_offset)
        prepared, constant = _prepare(launch, sizes, bits, operands, device)
        counts = (x_step.numel(), w_step.numel(), w_shift.numel())
        if residual is not None:
            residual = residual.contiguous(memory_format=layout)
        scale = None if residual_scale is None else dense(residual_scale)
        written = (residual, scale, end.kind, layout is torch.channels_last)
        affine = (x_step, w_step, w_shift, constant, *counts, *sizes.classes(), *written)
        needed = room if wants_moments or activation not in EXACT else None
        _multiply(launch, sizes, bits, dense(x), prepared, affine, needed, y)
    merge(launch, room)
    return y, room.moments


@cuda_kernel("conv2d", conv2d_ref)
def launch_conv2d(launch: Launcher, *args: Any) -> Tensor:
    """Start the kernels of `qmir::conv2d`; arguments and result are those of the operator."""
    return _run(launch, False, None, *args)[0]


@cuda_kernel("conv2d_moments", conv2d_moments_ref)
def launch_conv2d_moments(launch: Launcher, *args: Any) -> tuple[Tensor, Tensor | None]:
    """Start the kernels of `qmir::conv2d_moments`; arguments and results are the operator's."""
    own, offset = split_offset(args, PARAMETERS)
    return _run(launch, True, offset, *own)
