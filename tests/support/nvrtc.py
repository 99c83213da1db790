"""NVRTC and nvdisasm without a GPU: what the compiler makes of a kernel, and what it costs."""

import ctypes
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmir_ao.backend.cpu.build import cache_dir
from qmir_ao.backend.cuda import sources
from qmir_ao.backend.cuda.launch import NO_DEFINES
from qmir_ao.backend.cuda.module import options

FOLDER = Path(os.environ.get("QMIR_NVRTC_DIR", Path(sys.prefix) / "nvrtc"))
LIBRARIES = {
    "12.6": FOLDER / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
    "13.5": FOLDER / "nvidia/cu13/lib/libnvrtc.so.13",
}
NVDISASM = FOLDER / "nvidia/cu13/bin/nvdisasm"
ARCHITECTURES = ("sm_87", "sm_90")

needs_nvrtc = pytest.mark.skipif(
    not all(path.is_file() for path in (*LIBRARIES.values(), NVDISASM)),
    reason=f"NVRTC is not in {FOLDER}: pip install --target {FOLDER} --no-deps "
    "-r tests/support/nvrtc.txt (make test does it)",
)

_USAGE = re.compile(
    r"Compiling entry function '(\w+)' for '\w+'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:[^\n]*?, (\d+) bytes smem)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    """What one kernel takes, from the assembler's report."""

    registers: int
    shared: int
    stack: int
    spilled: int


@dataclass(frozen=True)
class Compiled:
    """One source for one architecture."""

    ptx: str
    cubin: bytes
    usage: dict[str, Usage]

    @property
    def isa(self) -> tuple[int, int]:
        """Version of the PTX instruction set."""
        found = re.search(r"^\.version (\d+)\.(\d+)", self.ptx, re.MULTILINE)
        assert found is not None
        return int(found[1]), int(found[2])

    def sass(self) -> dict[str, str]:
        """Machine code of each kernel."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            os.chmod(NVDISASM, 0o755)  # wheels unpacked by pip may lack the bit
            done = subprocess.run(
                [str(NVDISASM), "-c", file.name], capture_output=True, text=True, check=True
            )
        parts = re.split(r"^\s*\.section\s+\.text\.(\w+),.*$", done.stdout, flags=re.MULTILINE)
        return dict(zip(parts[1::2], parts[2::2], strict=True))


class CompileError(AssertionError):
    """NVRTC refused a source."""


@functools.cache
def _library(version: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(LIBRARIES[version]))


def _output(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    assert library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)) == 0, what
    buffer = ctypes.create_string_buffer(size.value)
    assert library[f"nvrtcGet{what}"](program, buffer) == 0, what
    return buffer.raw


def _usage(log: str) -> dict[str, Usage]:
    return {
        m[1]: Usage(
            registers=int(m[5]),
            shared=int(m[6] or 0),
            stack=int(m[2]),
            spilled=int(m[3]) + int(m[4]),
        )
        for m in _USAGE.finditer(log)
    }


@functools.cache
def _compile(version: str, text: str, flags: tuple[str, ...]) -> Compiled:
    path = cache_dir() / "nvrtc" / f"{sources.digest(version, text, *flags)}.json"
    if not path.is_file():
        found = _compile_now(version, text, flags)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as scratch:
            json.dump(found, scratch)
        os.replace(scratch.name, path)
    ptx, cubin, log = json.loads(path.read_text())
    return Compiled(ptx, bytes.fromhex(cubin), _usage(log))


def _compile_now(version: str, text: str, flags: tuple[str, ...]) -> tuple[str, str, str]:
    """PTX, binary in hexadecimal digits, and the messages."""
    library = _library(version)
    program = ctypes.c_void_p()
    assert not library.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None
    )
    encoded = [flag.encode() for flag in (*flags, "--ptxas-options=-v")]
    status = library.nvrtcCompileProgram(
        program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)
    )
    log = _output(library, program, "ProgramLog").rstrip(b"\0").decode()
    if status:
        raise CompileError(f"NVRTC {version} {' '.join(flags)}:\n{log[:4000]}")
    ptx = _output(library, program, "PTX").rstrip(b"\0").decode()
    return ptx, _output(library, program, "CUBIN").hex(), log


def compile_text(
    version: str, text: str, architecture: str, defines: Mapping[str, int] = NO_DEFINES
) -> Compiled:
    """Compile one text with the options of production.

    Raises:
        CompileError: with NVRTC's messages.
    """
    return _compile(version, text, tuple(options(architecture, defines)))


# Of one multiprocessor: threads, blocks, registers, bytes of shared memory (1 KB of each block is
# the system's). Source: CUDA C++ Programming Guide, compute capabilities 8.7 and 9.0.
_LIMITS = {"sm_87": (1536, 16, 65536, 164 * 1024), "sm_90": (2048, 32, 65536, 228 * 1024)}


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's threads that blocks of this kind can fill.

    Registers are given out by warp in units of 256, shared memory in units of 128 bytes.
    """
    most_threads, most_blocks, most_registers, most_shared = _LIMITS[architecture]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = most_registers // per_warp // warps
    by_shared = most_shared // (-(-(shared + 1024) // 128) * 128)
    blocks = min(most_threads // threads, most_blocks, by_registers, by_shared)
    return blocks * warps * 32 / most_threads
