"""Loader of the CUDA kernels: sources, cache, architectures, and errors that say what to do."""

import builtins
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.nvrtc import compile_text, needs_nvrtc

import qmir_ao.backend.cuda
from qmir_ao.backend.cuda import module, registration, sources
from qmir_ao.backend.cuda.launch import check_device, check_sizes, dense
from qmir_ao.errors import ConfigError, DeviceError, DeviceMemoryError, DeviceSizeError, QmirError

ROOT = Path(__file__).resolve().parents[3]


class Binding:
    """What module.py uses of CuPy's NVRTC, over the compiler that the tests install."""

    class NVRTCError(RuntimeError):
        """As CuPy raises it."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.compiled = 0
        self.text = self.log = ""

    def getVersion(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")))

    def createProgram(self, text: str, name: str, headers: object, names: object) -> int:
        self.text = text
        return 1

    def compileProgram(self, program: int, flags: Sequence[str]) -> None:
        self.compiled += 1
        architecture = next(f for f in flags if "architecture" in f).split("=")[1]
        try:
            self.found = compile_text(
                self.version, self.text, architecture.replace("compute", "sm")
            )
        except AssertionError as error:
            self.log = str(error)
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION (6)") from error

    def getCUBIN(self, program: int) -> bytes:
        return self.found.cubin

    def getPTX(self, program: int) -> str:
        return self.found.ptx

    def getProgramLog(self, program: int) -> str:
        return self.log

    def destroyProgram(self, program: int) -> None:
        self.text = ""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and one small source."""
    monkeypatch.setenv("QMIR_CACHE_DIR", str(tmp_path))
    text = 'extern "C" __global__ void qmir_small(float* y) { *y = 1.0f; }'
    monkeypatch.setattr(sources, "read", lambda name: text)
    return tmp_path


def test_sources_hold_their_headers_once() -> None:
    assert {"dls_fake_quant", "rfa_fake_quant", "selective_scan"} <= set(sources.names())
    text = sources.read("dls_fake_quant")
    assert '#include "' not in text and text.count("constexpr int kWarp = 32") == 1
    with pytest.raises(
        ConfigError, match=r"no kernel source 'nothing'; there are: .*selective_scan"
    ):
        sources.read("nothing")


def test_every_declared_variant_has_a_source() -> None:
    assert qmir_ao.backend.cuda is not None
    assert set(registration._VARIANTS) <= set(sources.names())
    assert registration.variants("dls_fake_quant") == [{}]
    assert {"QMIR_STATES": 4} in registration.variants("selective_scan")


@needs_nvrtc
def test_binaries_are_cached_by_source_options_and_compiler(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binding = Binding("12.6")
    first = module.compiled(binding, "small", "sm_87")
    assert first.suffix == ".cubin" and first.read_bytes()[:4] == b"\x7fELF"
    assert module.compiled(binding, "small", "sm_87") == first and binding.compiled == 1
    others = {
        module.compiled(binding, "small", "sm_90"),
        module.compiled(binding, "small", "sm_87", {"QMIR_X": 1}),
        module.compiled(Binding("13.5"), "small", "sm_87"),
        module.compiled(binding, "small", "compute_87"),
    }
    assert len(others | {first}) == 5
    ptx = next(path for path in others if path.suffix == ".ptx")
    assert "qmir_small" in ptx.read_text()
    monkeypatch.setattr(
        sources, "read", lambda name: 'extern "C" __global__ void qmir_small(int* y) { *y = 2; }'
    )
    assert module.compiled(binding, "small", "sm_87") not in others | {first}


@needs_nvrtc
def test_a_source_that_does_not_compile_shows_the_messages(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "read", lambda name: "this is no CUDA")
    with pytest.raises(DeviceError, match=r"NVRTC cannot compile small\.cu[\s\S]*error: "):
        module.compiled(Binding("13.5"), "small", "sm_90")
    assert not list((small / "cuda").glob("*")) if (small / "cuda").exists() else True


def test_architectures() -> None:
    supported = [75, 80, 86, 87, 90]
    assert module.choose_architecture((8, 7), supported) == "sm_87"
    assert module.choose_architecture((12, 0), supported) == "compute_90"
    with pytest.raises(DeviceError, match=r"need compute capability 8\.0 .*this device has 7\.5"):
        module.choose_architecture((7, 5), supported)
    with pytest.raises(DeviceError, match=r"NVRTC compiles for \[75\], this device is 90"):
        module.choose_architecture((9, 0), [75])


def test_a_missing_cupy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.split(".")[0] in ("cupy", "cupy_backends"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args)

    module._cupy.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DeviceError, match=r"need CuPy.*pip install 'qmir-ao\[cuda1[23]\]'"):
        module._cupy()


def test_the_launcher_refuses_other_devices() -> None:
    x = torch.zeros(4)
    with pytest.raises(DeviceError, match="tensors are on cpu, a CUDA device is needed"):
        module.launcher()("selective_scan", "qmir_scan_carry", (1, 1, 1), (1, 1, 1), [x])
    with pytest.raises(DeviceError, match=r"are on cpu, meta; move them to one device"):
        check_device("selective_scan", x, x.to("meta"))
    assert issubclass(DeviceError, QmirError) and issubclass(DeviceSizeError, QmirError)
    assert issubclass(DeviceMemoryError, MemoryError)


@pytest.mark.parametrize(
    ("grid", "block"), [((2**31, 1, 1), (1, 1, 1)), ((1, 65536, 1), (1, 1, 1)),
                        ((1, 1, 1), (2048, 1, 1)), ((0, 1, 1), (1, 1, 1))]
)  # fmt: skip
def test_sizes_beyond_the_limits_are_refused(
    grid: tuple[int, int, int], block: tuple[int, int, int]
) -> None:
    with pytest.raises(DeviceSizeError, match="Split the work into smaller batches"):
        check_sizes("qmir_x", grid, block)


def test_memory_of_kernels_is_contiguous_and_aligned() -> None:
    x = torch.arange(64.0)
    assert dense(x).data_ptr() == x.data_ptr()
    for view in (x[1:], x.reshape(8, 8).T):
        copy = dense(view)
        assert copy.is_contiguous() and copy.data_ptr() % 16 == 0 and torch.equal(copy, view)


def test_operators_are_registered_for_cuda() -> None:
    names = {"selective_scan", "selective_scan_backward", "dls_fake_quant"}
    names |= {"dls_fake_quant_backward", "rfa_fake_quant", "rfa_fake_quant_backward"}
    assert names <= set(registration.KERNELS)
    for name in registration.KERNELS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qmir::{name}", "CUDA")


def test_importing_needs_neither_cupy_nor_a_device() -> None:
    code = "import sys, qmir_ao.backend.cuda; assert 'cupy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
