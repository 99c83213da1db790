"""CUDA kernels beside their peers in the same run, by CUDA events: `make bench-gpu` runs these.

Cold: successive calls read other tensors, of three times the second-level cache in all. Warm:
always the same ones. Peers: mamba-ssm where it can be imported, the published Python forms of the
quantizers, and a copy of the same bytes, which bounds what moves them. Goals: docs/performance.md.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.cases import DLS_V, DLS_W, rfa_case
from support.gpu import EventClock, needs_gpu, rotating
from support.tolerances import CODE_MISMATCH
from torch import Tensor

import qmir_ao.backend.kernels  # noqa: F401  (registers the kernels)

pytestmark = [pytest.mark.bench, needs_gpu]
QMIR = torch.ops.qmir

# Channels of all four directions and states of MambaIR light and MambaIR, and steps of time.
SCANS = [(288, 10, 4096), (288, 10, 65536), (1440, 16, 4096), (1440, 16, 16384), (288, 16, 230400)]
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
GRID = (-8, 7, False, False, False)
memory = pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])


def measure(
    benchmark: Any, run: Callable[..., Any], make: Callable[[], tuple[Any, ...]], cold: bool
) -> None:
    """Time of one call, in 100 rounds."""
    following = rotating(make, cold)
    benchmark._timer = EventClock()
    benchmark.pedantic(lambda: run(*following()), rounds=100, warmup_rounds=10)


def scan_case(channels: int, states: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """u, delta, A, B, C, D, bias of one image."""

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=of)

    wide = torch.float32
    A = -torch.rand(channels, states, device="cuda") - 0.1
    sequences = (normal(1, channels, length), normal(1, channels, length))
    projections = (normal(1, 4, states, length), normal(1, 4, states, length))
    return (*sequences, A, *projections, normal(channels, of=wide), normal(channels, of=wide))


def mamba(*tensors: Tensor) -> Tensor:
    """mamba-ssm's own kernel."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, A, B, C, D, bias = tensors
    result: Tensor = selective_scan_fn(u, delta, A, B, C, D, None, bias, True)
    return result


def ours(*tensors: Tensor) -> Tensor:
    """The operator of this package."""
    result: Tensor = QMIR.selective_scan(*tensors, True)
    return result


SIDES = {"qmir": ours, "mamba-ssm": mamba}


def side(name: str) -> Callable[..., Tensor]:
    if name == "mamba-ssm":
        pytest.importorskip("mamba_ssm", reason="mamba-ssm is not installed")
    return SIDES[name]


@memory
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("case", SCANS, ids=str)
@pytest.mark.parametrize("name", SIDES)
def test_scan_forward(benchmark: Any, case: Any, dtype: torch.dtype, name: str, cold: bool) -> None:
    run = side(name)
    args = scan_case(*case, dtype)
    torch.testing.assert_close(run(*args).float(), ours(*args).float(), rtol=2e-2, atol=2e-1)
    benchmark.group = f"scan forward {case} {dtype} {'cold' if cold else 'warm'}"
    measure(benchmark, run, lambda: scan_case(*case, dtype), cold)


@memory
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("case", SCANS[:4], ids=str)
@pytest.mark.parametrize("name", SIDES)
def test_scan_both(benchmark: Any, case: Any, dtype: torch.dtype, name: str, cold: bool) -> None:
    run = side(name)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        y = run(*tensors)
        return torch.autograd.grad(y, tensors, torch.ones_like(y))

    def make() -> tuple[Tensor, ...]:
        return tuple(t.requires_grad_() for t in scan_case(*case, dtype))

    assert all(t.isfinite().all() for t in step(*make()))
    benchmark.group = f"scan forward + backward {case} {dtype} {'cold' if cold else 'warm'}"
    measure(benchmark, step, make, cold)


def trained(function: Callable[..., Tensor], count: int, settings: tuple[Any, ...]) -> Any:
    """Forward and backward in the first `count` arguments, by the last one."""

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = tensors[:count]
        return torch.autograd.grad(function(*inputs, *settings), inputs, tensors[count])

    return run


def copied(*tensors: Tensor) -> list[Tensor]:
    """A copy of the two large tensors of a step: what its reads and writes must cost at least."""
    return [tensors[0].detach().clone(), tensors[-1].clone()]


@memory
@pytest.mark.parametrize("shape", [(8, 180, 64, 64), (1, 60, 320, 320), (32768, 60)], ids=str)
@pytest.mark.parametrize("name", ["qmir", "published-form", "copy"])
def test_dls(benchmark: Any, shape: Any, name: str, cold: bool) -> None:
    def make() -> tuple[Tensor, ...]:
        leaves = (torch.randn(shape, device="cuda"), DLS_W.cuda(), DLS_V.cuda())
        return (*(t.requires_grad_() for t in leaves), torch.randn(shape, device="cuda"))

    if name == "published-form" and shape[0] > 1000:
        pytest.skip("the published form runs one group after the other")
    runs = {
        "qmir": trained(QMIR.dls_fake_quant, 3, GRID),
        "published-form": trained(oracles.dls, 3, GRID),
        "copy": copied,
    }
    assert all(t.isfinite().all() for t in runs[name](*make()))
    benchmark.group = f"dls_fake_quant forward + backward {shape} {'cold' if cold else 'warm'}"
    measure(benchmark, runs[name], make, cold)


@memory
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(60, 60, 3, 3), (360, 180), (4096, 4096)], ids=str)
@pytest.mark.parametrize("name", ["qmir", "published-form", "copy"])
def test_rfa(benchmark: Any, shape: Any, bits: int, name: str, cold: bool) -> None:
    def make() -> tuple[Tensor, ...]:
        inputs, _ = rfa_case(shape, shape[0], bits, shifts=1)
        leaves = [t.cuda().requires_grad_() for t in inputs]
        return (*leaves, torch.randn(shape, device="cuda"))

    quant_min = -(2 ** (bits - 1))
    runs = {
        "qmir": trained(QMIR.rfa_fake_quant, 4, (quant_min,)),
        "published-form": trained(oracles.rfa_loop, 4, (quant_min,)),
        "copy": copied,
    }
    assert all(t.isfinite().all() for t in runs[name](*make()))
    benchmark.group = f"rfa {bits} bit forward + backward {shape} {'cold' if cold else 'warm'}"
    measure(benchmark, runs[name], make, cold)


def fused(x: Tensor, gate: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Codes of norm(x) * silu(gate), a step for each token, by one operator."""
    chain = (None, None, 1e-5, "none", gate, "silu", None)
    codes: Tensor = QMIR.chain_quantize(x, *chain, w, v, -1, -8, 7, "token", False)[0]
    return codes


def separate(x: Tensor, gate: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The same by torch's operators and those of the quantizer."""
    y = (F.layer_norm(x, x.shape[-1:]) * F.silu(gate)).flatten(0, -2)
    codes: Tensor = QMIR.dls_quantize(y, *QMIR.dls_qparams(y, w, v, -8, 7, False, False), -8, 7)
    return codes


def as_many_bytes(x: Tensor, gate: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """A copy that moves as much as the fused operator: 9 bytes for each of its elements."""
    return x.clone(), gate.flatten()[: gate.numel() // 8].clone()


@memory
@pytest.mark.parametrize("shape", [(1, 4096, 72), (1, 102400, 72), (1, 4096, 360)], ids=str)
@pytest.mark.parametrize("name", ["qmir", "separate", "copy"])
def test_chain_quantize(benchmark: Any, shape: Any, name: str, cold: bool) -> None:
    def make() -> tuple[Tensor, ...]:
        pair = (torch.randn(shape, device="cuda") for _ in range(2))
        return (*pair, DLS_W.cuda(), DLS_V.cuda())

    run = {"qmir": fused, "separate": separate, "copy": as_many_bytes}[name]
    tensors = make()
    differ = fused(*tensors).flatten() != separate(*tensors).flatten()
    assert float(differ.double().mean()) <= CODE_MISMATCH
    benchmark.group = f"norm * silu(gate), token codes {shape} {'cold' if cold else 'warm'}"
    measure(benchmark, run, make, cold)
