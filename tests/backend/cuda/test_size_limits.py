"""Operands of more than 2**31 elements: every launch fits its kernel, or a clear error comes first.

Tensors are on the meta device, which has shapes and no memory, and launches are only looked at.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.host_launcher import HostLauncher, _module, needs_compiler
from torch import Tensor

import qmir_ao.backend.cuda  # noqa: F401  (registers the launchers)
from qmir_ao.backend.cuda import sources
from qmir_ao.backend.cuda.launch import (
    INT_SIZES,
    MAX_INT,
    NO_DEFINES,
    Argument,
    Size3,
    check_arguments,
    check_sizes,
)
from qmir_ao.backend.cuda.registration import KERNELS
from qmir_ao.errors import DeviceSizeError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "cuda_sizes.md"
BIG = 2**31 + 4096


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def codes(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int8)


def one() -> tuple[Tensor, Tensor]:
    return empty(1), empty(1)


class Looker:
    """A launcher that checks what it is asked to start, and starts nothing."""

    def __init__(self) -> None:
        self.started: list[tuple[str, Mapping[str, int], list[Argument]]] = []

    def __call__(
        self, source: str, kernel: str, grid: Size3, block: Size3, args: Sequence[Argument],
        *, shared: int = 0, defines: Mapping[str, int] = NO_DEFINES,
    ) -> None:  # fmt: skip
        check_sizes(kernel, grid, block)
        check_arguments(kernel, args)
        self.started.append((f"{source} {kernel}", defines, list(args)))


def fake(shape: tuple[int, ...]) -> tuple[Any, ...]:
    return (empty(*shape), empty(4), empty(4), -8, 7, False, False, False)


def chain(shape: tuple[int, ...], statistics: str) -> tuple[Any, ...]:
    nothing = (None, None, None, "none", None, "none", None)
    return (empty(*shape), *nothing, empty(4), empty(4), -1, -8, 7, statistics, False)


def linear(rows: int, inputs: int, features: int) -> tuple[Any, ...]:
    weight = empty(features * inputs // 2, dtype=torch.uint8)
    return (codes(1, rows, inputs), *one(), weight, *one(), None, 4, features)


def conv(
    x: tuple[int, ...], features: int, groups: int = 1, side: int = 3,
    stride: tuple[int, int] = (1, 1),
) -> tuple[Any, ...]:  # fmt: skip
    inputs = x[1] // groups
    size = [features, inputs, side, side]
    weight = empty(-(-features * inputs * side * side // 2), dtype=torch.uint8)
    geometry = (4, size, list(stride), [side // 2] * 2, [1, 1], groups)
    return (codes(*x), *one(), weight, *one(), None, None, *geometry)


def scan(batch: int, channels: int, states: int, length: int) -> tuple[Any, ...]:
    sequence, projection = (batch, channels, length), (batch, 4, states, length)
    sequences = (empty(*sequence), empty(*sequence), empty(channels, states))
    return (*sequences, empty(*projection), empty(*projection), None, None, True)


def image(channels: int, states: int, height: int, width: int) -> tuple[Any, ...]:
    sequences = (empty(1, channels, height, width), empty(1, 4 * channels, height, width))
    projections = (empty(1, 4, states, height, width) for _ in range(2))
    return (*sequences, empty(4 * channels, states), *projections, None, None, True)


def coded(args: tuple[Any, ...]) -> tuple[Any, ...]:
    u, delta, A, B, C, D, bias, softplus = args
    u, delta, B, C = (codes(*x.shape) for x in (u, delta, B, C))
    return (u, *one(), delta, *one(), A, B, *one(), C, *one(), D, bias, softplus, -8, 7)


def with_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (empty(*args[0].shape), *args)


WEIGHT = (empty(BIG // 4096, 4096), *one(), empty(16), -8)
# Operator: arguments of more than 2**31 elements that it takes.
FIT: dict[str, list[tuple[Any, ...]]] = {
    "chain_quantize": [chain((1, BIG // 64, 64), "token"), chain((2, BIG // 64, 64), "sample")],
    "conv2d": [conv((9, 60, 2048, 2048), 60), conv((1, 1, 32768, 65535), 1),
               conv((1, 72, 8192, 8192), 72, groups=72), conv((1, 1, 2**31 - 67, 1), 1),
               conv((1, 1, 1, 2**31 - 65), 1, side=1)],
    "conv2d_acc": [(lambda a: (a[0], a[3], *a[8:]))(conv((9, 60, 2048, 2048), 60))],
    "dls_dequantize": [(codes(1, BIG), *one())],
    "dls_fake_quant": [fake((1, BIG)), fake((BIG // 64, 64))],
    "dls_fake_quant_backward": [with_gradient(fake((1, BIG)))],
    "dls_qparams": [(empty(1, BIG), empty(4), empty(4), -8, 7, False, False),
                    (empty(BIG // 64, 64), empty(4), empty(4), -8, 7, False, False)],
    "dls_quantize": [(empty(1, BIG + 1), *one(), -8, 7)],
    "linear": [linear(BIG // 64, 64, 64), linear(64, 64, BIG // 64)],
    "linear_acc": [(codes(1, BIG // 64, 64), empty(64 * 32, dtype=torch.uint8), 4, 64)],
    "pack": [(codes(BIG), 4)],
    "rfa_fake_quant": [WEIGHT],
    "rfa_fake_quant_backward": [with_gradient(WEIGHT)],
    "selective_scan": [scan(1, 288, 10, BIG // 256), scan(9, 1440, 16, BIG // 4096)],
    "selective_scan_backward": [with_gradient(scan(1, 288, 10, BIG // 256))],
    "selective_scan_q": [coded(scan(1, 288, 10, BIG // 256))],
    "ss2d_scan": [image(72, 10, 8192, 8192)],
    "ss2d_scan_backward": [with_gradient(image(72, 10, 8192, 8192))],
    "ss2d_scan_q": [coded(image(72, 10, 8192, 8192))],
    "ss2d_scan_q_moments": [(*coded(image(72, 10, 8192, 8192)), empty(72))],
    "unpack": [(empty(BIG // 2, dtype=torch.uint8), 4, BIG)],
}  # fmt: skip
# Operator: arguments that are too large, and what is said about them.
BEYOND: list[tuple[str, tuple[Any, ...], str]] = [
    ("chain_quantize", chain((1, 2**38, 1), "token"), r"qmir_chain_tokens: grid"),
    ("conv2d", conv((1, BIG, 1, 1), BIG, groups=BIG, side=1), "qmir_conv2d_prepare_w4: grid"),
    ("conv2d", conv((1, 16385 * 131071, 1, 1), 16385, groups=16385, side=1), "size of 2147598335"),
    ("conv2d", conv((1, 2, 65536, 32768), 2), r"(?s)2147483648 pixels.*tiles"),
    ("conv2d", conv((1, 1, 2**31 - 66, 1), 1), "height with its padding .* of 2147483648 is"),
    ("conv2d", conv((1, 1, 1, 2**31 - 66), 1), "width with its padding .* of 2147483648"),
    ("conv2d", conv((1, 1, 1, 2**31 - 64), 1, side=1), "width with its padding .* of 2147483648"),
    ("conv2d", conv((1, 2, 9, 5), 2, stride=(1, 2**25)), "64 strides of 2147483655 is beyond"),
    ("conv2d_acc", (lambda a: (a[0], a[3], *a[8:]))(conv((BIG, 1, 1, 2), 1)), "grid|a size of"),
    ("dls_dequantize", (codes(1, 2**43), *one()), "qmir_dls_dequantize_v16: grid"),
    ("dls_fake_quant", fake((2**44, 1024)), "qmir_dls_rows_forward_f32: grid"),
    ("dls_fake_quant_backward", with_gradient(fake((1, 2**45))), "qmir_dls_moments_f32: grid"),
    ("dls_qparams", (empty(1, 2**44), empty(4), empty(4), -8, 7, False, False), "qmir_dls_chunks"),
    ("dls_quantize", (empty(1, 2**43 + 1), *one(), -8, 7), "qmir_dls_quantize_v1: grid"),
    ("linear", linear(2**44, 64, 64), "qmir_linear_w4: grid"),
    ("pack", (codes(2**43), 4), "qmir_pack_b4: grid"),
    ("rfa_fake_quant", (empty(2**42), *one(), empty(16), -8), "qmir_rfa_forward_16: grid"),
    (
        "rfa_fake_quant_backward",
        with_gradient((empty(2**35), *one(), empty(256), -128)),
        "a number of histogram entries of 8623489024 is beyond 4294967295",
    ),
    ("selective_scan", scan(2**20, 288, 10, 2**20), "qmir_scan_chunks_f32: grid"),
    ("selective_scan_backward", with_gradient(scan(600, 8, 1, 230400)), "qmir_scan_columns: grid"),
    ("selective_scan_q", coded(scan(2**32, 288, 10, 2**10)), "grid"),
    ("ss2d_scan", image(1, 1, 1, 2**31 - 8), "width of 2147483640 is beyond 2147483631"),
    ("ss2d_scan_backward", with_gradient(image(1, 1, 2**31, 1)), "height of 2147483648"),
    ("ss2d_scan_q", coded(image(1, 1, 2**31, 1)), "height of 2147483648 is beyond 2147483631"),
    ("ss2d_scan_q_moments", coded(image(2**31, 1, 1, 1)), "qmir_ss2d_scan_q_merge_kept: grid"),
]


# These call the launchers of `linear` and `conv2d`, with their operands.
WITH_MOMENTS = {"linear_moments", "conv2d_moments"}


def test_every_operator_has_large_operands() -> None:
    assert set(KERNELS) - WITH_MOMENTS == set(FIT)
    assert {name for name, *_ in BEYOND} | {"linear_acc", "unpack"} == set(FIT)


@pytest.mark.parametrize("name", FIT)
def test_large_operands_are_launched(name: str) -> None:
    for args in FIT[name]:
        assert max(x.numel() for x in args if isinstance(x, Tensor)) >= BIG // 2
        look = Looker()
        KERNELS[name](look, *args)
        assert look.started


@needs_compiler
@pytest.mark.parametrize("name", FIT)
def test_no_argument_is_cut_off(name: str) -> None:
    """Against the kernels' own parameters, as the compiler sees them."""
    for args in FIT[name]:
        look = Looker()
        KERNELS[name](look, *args)
        for where, defines, given in look.started:
            source, kernel = where.split()
            signature = signature_of(source, kernel, defines)
            for value, letter in zip(given, signature, strict=True):
                if letter == "i":
                    assert isinstance(value, int) and abs(value) <= MAX_INT
                    small = -256 <= value <= 256  # a setting, no size
                    assert small or kernel.startswith(INT_SIZES), (kernel, value)


def signature_of(source: str, kernel: str, defines: Mapping[str, int]) -> str:
    module = _module(sources.read(source), source, tuple(sorted(defines.items())))
    return module.signature(kernel)


@pytest.mark.parametrize(
    ("name", "args", "message"), BEYOND, ids=[f"{b[0]}-{b[2]}" for b in BEYOND]
)
def test_larger_ones_are_refused(name: str, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        KERNELS[name](Looker(), *args)
    text = str(caught.value)
    assert f"qmir::{name}" in text.replace("conv2d:", "conv2d_acc:" if "acc" in name else "conv2d:")
    assert "Split" in text


def test_the_refusal_names_operator_sizes_limit_and_fix() -> None:
    x = codes(2**43)
    with pytest.raises(DeviceSizeError) as caught:
        KERNELS["pack"](Looker(), x, 4)
    assert str(caught.value) == (
        "qmir::pack on tensors of (8796093022208,): qmir_pack_b4: grid (2147483648, 1, 1) is "
        "beyond (2147483647, 65535, 65535). Split the work into smaller batches, images or tiles"
    )


@needs_compiler
def test_the_simulator_refuses_as_the_gpu_does() -> None:
    with pytest.raises(DeviceSizeError, match="a size of 4294967296 is beyond 2147483647"):
        HostLauncher()("qconv2d", "qmir_conv2d_w4", (1, 1, 1), (128, 1, 1), [2**32])


def test_the_page_names_every_operator() -> None:
    text = PAGE.read_text()
    assert all(f"`{name}`" in text for name in KERNELS if name not in WITH_MOMENTS)
