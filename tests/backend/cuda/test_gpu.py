"""CUDA kernels on a real GPU: the same cases as on the CPU, through the registered operators."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import oracles, scans_q, tolerances
from support.cases import (
    DLS_FLAGS,
    DLS_RANGES,
    DLS_SHAPES,
    DLS_V,
    DLS_W,
    RFA_CASES,
    SCAN_OPTIONAL,
    SCAN_SIZES,
    dls_case,
    rfa_case,
    scan_operands,
)
from support.gpu import missing, moved, needs_gpu
from support.image_scans import OPTIONAL, with_gradient
from support.image_scans import cases as image_cases
from support.scans import NAMES, assert_as_accurate
from support.scans_q import IMAGES, SEQUENCES
from torch import Tensor

import qmir_ao.backend.kernels  # noqa: F401  (registers the kernels)
from qmir_ao.backend.cuda.registration import KERNELS
from qmir_ao.errors import DeviceError
from qmir_ao.ops.dls_fake_quant import dls_fake_quant_backward_ref, dls_fake_quant_ref
from qmir_ao.ops.rfa_fake_quant import rfa_fake_quant_backward_ref, rfa_fake_quant_ref
from qmir_ao.ops.selective_scan import selective_scan_backward_ref, selective_scan_ref
from qmir_ao.ops.ss2d_scan import ss2d_scan_backward_ref, ss2d_scan_ref

pytestmark = [pytest.mark.gpu, needs_gpu]
QMIR = torch.ops.qmir
ROOT = Path(__file__).resolve().parents[3]


def samples() -> ModuleType:
    """The table of arguments that `opcheck` runs on the CPU with."""
    path = ROOT / "tests" / "ops" / "test_opcheck.py"
    spec = importlib.util.spec_from_file_location("opcheck_samples", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_gpu(operator: Any) -> Any:
    """The operator with CPU arguments in and out, run on the GPU in between."""

    def run(*args: Any) -> Any:
        results = operator(*moved(args, "cuda"))
        assert all(r.device.type == "cuda" for r in _all(results))
        return moved(results, "cpu")

    return run


def _all(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


@pytest.mark.parametrize("flags", DLS_FLAGS, ids=str)
@pytest.mark.parametrize("grid", DLS_RANGES, ids=str)
@pytest.mark.parametrize("shape", [*DLS_SHAPES, (33, 60), (2, 3 * 8192 + 4)], ids=str)
def test_dls_fake_quant(shape: Any, grid: Any, flags: Any) -> None:
    x, grad = dls_case(shape)
    settings = (*grid, *flags)
    got = on_gpu(QMIR.dls_fake_quant)(x, DLS_W, DLS_V, *settings)
    assert torch.equal(got, dls_fake_quant_ref(x, DLS_W, DLS_V, *settings))
    back = on_gpu(QMIR.dls_fake_quant_backward)(grad, x, DLS_W, DLS_V, *settings)
    wanted = dls_fake_quant_backward_ref(grad, x, DLS_W, DLS_V, *settings)
    for mine, theirs in zip(back, wanted, strict=True):
        assert oracles.relative(mine, theirs) <= 2 * tolerances.FLOAT32_EPS


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("shape", "groups", "shifts"), RFA_CASES, ids=str)
def test_rfa_fake_quant(shape: Any, groups: int, shifts: int, bits: int) -> None:
    inputs, quant_min = rfa_case(shape, groups, bits, "moved", shifts)
    grad = torch.randn(shape)
    got = on_gpu(QMIR.rfa_fake_quant)(*inputs, quant_min)
    assert torch.equal(got, rfa_fake_quant_ref(*inputs, quant_min))
    back = on_gpu(QMIR.rfa_fake_quant_backward)(grad, *inputs, quant_min)
    wanted = rfa_fake_quant_backward_ref(grad, *inputs, quant_min)
    for mine, theirs in zip(back[:3], wanted[:3], strict=True):
        assert oracles.relative(mine, theirs) <= 2 * tolerances.FLOAT32_EPS
    assert oracles.relative(back[3], wanted[3]) <= 16 * tolerances.FLOAT32_EPS


@pytest.mark.parametrize("size", [*SCAN_SIZES.values(), (1, 4, 18, 10, 2100)], ids=str)
@pytest.mark.parametrize("optional", SCAN_OPTIONAL.values(), ids=SCAN_OPTIONAL)
def test_selective_scan(size: Any, optional: Any) -> None:
    drawn = [(*scan_operands(size, *optional, seed=seed), True) for seed in range(4)]
    assert_as_accurate(on_gpu(QMIR.selective_scan), selective_scan_ref, drawn, ("y",))
    drawn = [(torch.randn_like(case[0]), *case) for case in drawn]
    backward = on_gpu(QMIR.selective_scan_backward)
    assert_as_accurate(backward, selective_scan_backward_ref, drawn, NAMES)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [*SEQUENCES.values(), (1, 4, 72, 10, 5000)], ids=str)
def test_selective_scan_q(size: Any, bits: int) -> None:
    args = scans_q.operands(5, size, bits)
    exact, allowed = scans_q.scan_bound(args, computed=True)
    assert ((on_gpu(QMIR.selective_scan_q)(*args) - exact).abs() <= allowed).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [*IMAGES.values(), (2, 72, 10, 37, 70)], ids=str)
def test_ss2d_scan_q(size: Any, bits: int) -> None:
    args = scans_q.image_operands(5, size, bits)
    exact, allowed = scans_q.image_bound(args, computed=True)
    assert ((on_gpu(QMIR.ss2d_scan_q)(*args) - exact).abs() <= allowed).all()


def test_codes_out_of_range_are_reported_by_the_next_call() -> None:
    args = scans_q.operands(1, (1, 1, 4, 3, 40), 4)
    args.delta[0, 3, 20] = 100
    there = moved(tuple(args), "cuda")
    bad = QMIR.selective_scan_q(*there).isnan()  # waits for the result
    assert bad[0, 3, 20:].all() and int(bad.sum()) == 20
    with pytest.raises(RuntimeError, match=r"delta holds codes outside .* in an earlier call"):
        QMIR.selective_scan_q(*there)


@pytest.mark.parametrize("optional", OPTIONAL.values(), ids=OPTIONAL)
@pytest.mark.parametrize("size", [(2, 18, 10, 17, 33), (1, 33, 16, 40, 37), (1, 5, 20, 9, 50)])
def test_ss2d_scan(size: Any, optional: Any) -> None:
    drawn = image_cases(size, optional)
    assert_as_accurate(on_gpu(QMIR.ss2d_scan), ss2d_scan_ref, drawn, ("y",))
    backward = on_gpu(QMIR.ss2d_scan_backward)
    assert_as_accurate(backward, ss2d_scan_backward_ref, with_gradient(drawn), NAMES)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_opcheck_and_equality_with_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    operator = getattr(QMIR, name).default
    for arguments in samples().CASES[name]():
        there = moved(arguments, "cuda")
        results = torch.library.opcheck(operator, there)
        assert set(results.values()) == {"SUCCESS"}, results
        with torch.no_grad():
            pairs = zip(_all(operator(*there)), _all(operator(*arguments)), strict=True)
        for mine, theirs in pairs:
            if theirs.is_floating_point():
                torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(mine.cpu(), theirs)


def test_repeats_and_streams_give_the_same_bytes() -> None:
    x, grad = (t.cuda() for t in dls_case((3, 50001)))
    scalars, settings = (DLS_W.cuda(), DLS_V.cuda()), (-8, 7, False, False, True)
    results = []
    for _ in range(20):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = QMIR.dls_fake_quant(x, *scalars, *settings)
            results.append((y, *QMIR.dls_fake_quant_backward(grad, x, *scalars, *settings)))
        torch.cuda.current_stream().wait_stream(stream)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_graph_captures_the_kernels() -> None:
    tensors = [t if t is None else t.cuda() for t in scan_operands((1, 4, 18, 10, 2100))]
    before = QMIR.selective_scan(*tensors, True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = QMIR.selective_scan(*tensors, True)
    other = torch.randn_like(tensors[0])
    tensors[0].copy_(other)
    graph.replay()
    assert torch.equal(y, QMIR.selective_scan(*tensors, True)) and not torch.equal(y, before)


def test_autocast_runs_the_scan_in_bf16() -> None:
    tensors = [t if t is None else t.cuda() for t in scan_operands((1, 4, 18, 10, 70))]
    half = [t.bfloat16() if i in (0, 1, 3, 4) else t for i, t in enumerate(tensors)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = QMIR.selective_scan(*half, True)
    want = QMIR.selective_scan(*(t.float() for t in half), True)
    assert y.dtype == torch.bfloat16 and torch.equal(y, want.bfloat16())


def test_tensors_on_two_devices_are_refused() -> None:
    x, _ = dls_case((3, 50))
    with pytest.raises(DeviceError, match="are on cpu, cuda:0; move them to one device"):
        QMIR.dls_fake_quant(x.cuda(), DLS_W, DLS_V, -8, 7, False, False, False)


def test_views_are_copied() -> None:
    whole = torch.randn(2, 8, 6, 500, device="cuda")
    for x in (whole.permute(0, 2, 3, 1), whole.flatten()[1:]):
        settings = (DLS_W.cuda(), DLS_V.cuda(), -8, 7, True, False, False)
        want = QMIR.dls_fake_quant(x.contiguous().clone(), *settings)
        assert torch.equal(QMIR.dls_fake_quant(x, *settings), want)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    x = torch.zeros(2**31 + 4096, device="cuda", dtype=torch.bfloat16).reshape(-1, 4096)
    x[-1] = torch.randn(4096, device="cuda")
    settings = (DLS_W.cuda(), DLS_V.cuda(), -8, 7, False, False, False)
    y = QMIR.dls_fake_quant(x, *settings)
    assert torch.equal(y[-1:], QMIR.dls_fake_quant(x[-1:].clone(), *settings))


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    path = shutil.which("compute-sanitizer")
    if path is None:
        pytest.skip("compute-sanitizer is not on PATH")
    chosen = "test_opcheck_and_equality_with_the_cpu"
    command = [path, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    command += ["-q", "-p", "no:cacheprovider", "-k", chosen, str(Path(__file__))]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_the_reason_for_skipping_is_none_here() -> None:
    assert missing() is None
