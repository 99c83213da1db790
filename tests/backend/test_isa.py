"""The kernels compiled for other instruction sets: the operators' own tests, in each of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qmir_ao.backend.cpu import build

OPS = Path(__file__).resolve().parents[1] / "ops"
FILES = ("selective_scan", "selective_scan_q", "dls", "static", "rfa", "linear", "pack", "epilogue")
FILES += ("conv2d", "conv2d_offset", "ss2d_scan", "ss2d_scan_q", "chain_quantize", "moments")
# Floats against the references and their float64 twins, integers and codes to the bit.
CHOSEN = "accurate or float64 or equal or exact or bytes or threads or accumulators or round"
# The library must load: its fallback, the reference operators, would pass all of these.
PROBE = "from qmir_ao.backend.cpu.build import library; assert library() is not None"

NEEDS = {"scalar": "DEFAULT", "avx2": "AVX2"}


@pytest.mark.slow
@pytest.mark.parametrize("isa", NEEDS)
def test_operators_in_another_instruction_set(isa: str) -> None:
    if build.compiler() is None:
        pytest.skip("no C++ compiler here")
    capability = torch.backends.cpu.get_cpu_capability()
    if NEEDS[isa] == "AVX2" and capability == "DEFAULT":
        pytest.skip("this processor has no AVX2")
    if NEEDS[isa] == capability:
        pytest.skip(f"all other tests run in {isa} here, this processor's best")
    environment = os.environ | {"QMIR_ISA": isa, "OMP_NUM_THREADS": "1"}
    files = [str(OPS / f"test_{name}.py") for name in FILES]
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN]
    for command in ([sys.executable, "-c", PROBE], [*tests, *files]):
        done = subprocess.run(
            command, env=environment, cwd=OPS.parents[1], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


def test_each_instruction_set_is_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    if build.compiler() is None:
        pytest.skip("no C++ compiler here")
    flags = {}
    for isa in NEEDS:
        monkeypatch.setenv("QMIR_ISA", isa)
        flags[isa] = build._isa_flags(build.compiler())
    assert flags["scalar"] != flags["avx2"]


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMIR_ISA", "mmx")
    with pytest.raises(build.BuildError, match="'mmx' is unknown; allowed: scalar, avx2"):
        build._isa_flags("g++")
