"""Integer operators at the sizes of MambaIR-light, beside their float32 and int8 peers in torch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import qmir_ao.backend.cpu.conv2d
import qmir_ao.backend.cpu.linear
import qmir_ao.backend.cpu.selective_scan_q  # noqa: F401  (all three register kernels)
from qmir_ao.ops.pack import pack

BITS = [2, 4, 8]
ROWS, INPUTS, FEATURES = 4096, 60, 144
SIDE = 64
ONE, SHIFT = torch.full((1,), 0.1), torch.full((1,), 0.05)


def codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)


@pytest.mark.benchmark(group="linear 4096x60x144")
@pytest.mark.parametrize("bits", BITS)
def test_linear(benchmark: Any, bits: int) -> None:
    weight = pack(codes(bits, FEATURES, INPUTS), bits)
    scale = torch.rand(FEATURES)
    args = (codes(bits, 1, ROWS, INPUTS), ONE, SHIFT, weight, scale, scale, None, bits, FEATURES)
    assert benchmark(torch.ops.qmir.linear, *args).shape == (1, ROWS, FEATURES)


@pytest.mark.benchmark(group="linear 4096x60x144")
def test_peer_linear_float32(benchmark: Any) -> None:
    args = (torch.randn(ROWS, INPUTS), torch.randn(FEATURES, INPUTS))
    assert benchmark(F.linear, *args).shape == (ROWS, FEATURES)


@pytest.mark.benchmark(group="linear 4096x60x144")
def test_peer_int_mm_without_scales(benchmark: Any) -> None:
    args = (codes(8, ROWS, INPUTS), codes(8, INPUTS, FEATURES))
    assert benchmark(torch._int_mm, *args).dtype == torch.int32


CONVOLUTIONS = {
    "3x3 60-60": (60, 60, 3, 1),
    "depthwise 3x3 72": (72, 72, 3, 72),
    "1x1 60-30": (60, 30, 1, 1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bits", BITS)
def test_conv2d(benchmark: Any, name: str, bits: int) -> None:
    benchmark.group = f"conv2d {name} at 64x64"
    inputs, features, kernel, groups = CONVOLUTIONS[name]
    size = [features, inputs // groups, kernel, kernel]
    scale, pad = torch.rand(features), [kernel // 2] * 2
    x, weight = codes(bits, 1, inputs, SIDE, SIDE), pack(codes(bits, *size), bits)
    geometry = (bits, size, [1, 1], pad, [1, 1], groups)
    args = (x, ONE, SHIFT, weight, scale, scale, None, None, *geometry)
    assert benchmark(torch.ops.qmir.conv2d, *args).shape == (1, features, SIDE, SIDE)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_peer_conv2d_float32(benchmark: Any, name: str) -> None:
    benchmark.group = f"conv2d {name} at 64x64"
    inputs, features, kernel, groups = CONVOLUTIONS[name]
    x, weight = (
        torch.randn(1, inputs, SIDE, SIDE),
        torch.randn(features, inputs // groups, kernel, kernel),
    )
    result = benchmark(F.conv2d, x, weight, None, 1, kernel // 2, 1, groups)
    assert result.shape == (1, features, SIDE, SIDE)


@pytest.mark.benchmark(group="selective_scan_q E=288 K=4 N=10 L=4096")
@pytest.mark.parametrize("bits", BITS)
def test_selective_scan_q(benchmark: Any, bits: int) -> None:
    channels, groups, states, steps = 288, 4, 10, 4096
    u, delta = codes(bits, 1, channels, steps), codes(bits, 1, channels, steps)
    B, C = codes(bits, 1, groups, states, steps), codes(bits, 1, groups, states, steps)
    A, D = -torch.rand(channels, states), torch.rand(channels)
    grid = (ONE, SHIFT)
    limits = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    args = (u, *grid, delta, *grid, A, B, *grid, C, *grid, D, D, True, *limits)
    assert torch.isfinite(benchmark(torch.ops.qmir.selective_scan_q, *args)).all()


@pytest.mark.benchmark(group="selective_scan_q E=288 K=4 N=10 L=4096")
def test_peer_plain_recurrence_float32(benchmark: Any) -> None:
    channels, groups, states, steps = 288, 4, 10, 4096
    u, delta = torch.randn(channels, steps), torch.rand(channels, steps)
    B, C = torch.randn(groups, states, steps), torch.randn(groups, states, steps)
    A = -torch.rand(channels, states)

    def recurrence() -> torch.Tensor:
        b, c = (x.repeat_interleave(channels // groups, 0) for x in (B, C))
        decay, drive = torch.exp(delta[:, None] * A[..., None]), (delta * u)[:, None] * b
        h, y = torch.zeros(channels, states), []
        for t in range(steps):
            h = decay[..., t] * h + drive[..., t]
            y.append((h * c[..., t]).sum(-1))
        return torch.stack(y, -1)

    result = benchmark.pedantic(recurrence, rounds=3, warmup_rounds=1)
    assert result.shape == (channels, steps)
