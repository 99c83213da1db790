"""Run CUDA kernels on the CPU: a Launcher that compiles `cuda/*.cu` with g++ (cuda_host/*.h).

Every launch works on copies of its tensors, each between pages that nobody may touch: accesses
outside of a tensor, undefined behaviour, divergent barriers and deadlocks raise HostKernelError.
"""

import ctypes
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from qmir_ao.backend.cpu.build import cache_dir, compiler
from qmir_ao.backend.cuda import sources
from qmir_ao.backend.cuda.launch import (
    NO_DEFINES,
    Argument,
    Size3,
    check_arguments,
    check_sizes,
)

HERE = Path(__file__).resolve().parent / "cuda_host"
# As NVRTC is told in backend/cuda/module.py: no contraction. Undefined behaviour is reported by
# handlers in cuda_host/memory.h; variables that nobody wrote hold garbage.
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
]
# The checks of integer overflow, division and shifts are left out: with them GCC 12 evaluates the
# index of (condition ? a : b)[i % n] in one branch only.
CHECKS = "bounds,alignment,null,object-size,pointer-overflow,unreachable,return,bool,enum,builtin"
FLAGS += [f"-fsanitize={CHECKS}", "-fno-sanitize-recover"]
FLAGS += ["-ftrivial-auto-var-init=pattern", "-Wall", "-Wno-attributes", "-Wno-unused"]
FLAGS += ["-fvisibility=hidden", "-fno-gnu-unique"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-array-bounds", "-U_FORTIFY_SOURCE", "-fno-math-errno"]
if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
    # CUDA always has a fused multiply-add; math.cuh takes it where the host has it as well.
    FLAGS += ["-mavx2", "-mfma"]

# The smallest of what a block may ask for on the supported architectures (sm_87).
MAX_SHARED = 163 * 1024
KERNEL = re.compile(
    r'extern\s+"C"\s+void\s+(?:__attribute__\(\(qmir_launch_bounds\(([^)]*)\)\)\)\s*)?(qmir_\w+)\s*\('
    r'|extern\s+"C"\s+__attribute__\(\(qmir_launch_bounds\(([^)]*)\)\)\)\s*void\s+(qmir_\w+)\s*\('
)

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")


class HostKernelError(AssertionError):
    """A kernel did on the CPU what it must not do on a GPU."""


class _Module:
    """A compiled source: the library, and the names of its kernels."""

    def __init__(self, path: Path, kernels: list[str]) -> None:
        self.library = ctypes.CDLL(str(path))
        self.kernels = kernels
        self.library.qmir_host_signature.restype = ctypes.c_char_p
        self.library.qmir_host_launch.restype = ctypes.c_char_p
        self.library.qmir_host_buffer.restype = ctypes.c_void_p
        self.library.qmir_host_stacks.restype = ctypes.c_void_p
        self.library.qmir_host_touched.restype = ctypes.c_longlong

    def signature(self, kernel: str) -> str:
        found = self.library.qmir_host_signature(kernel.encode())
        if found is None:
            raise HostKernelError(f"no kernel {kernel}; there are: {', '.join(self.kernels)}")
        return found.decode()


def _run(command: list[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise HostKernelError(f"{command[0]} failed:\n{done.stderr[:6000]}")
    return done.stdout


_STACKS: list[int] = []


def _stacks(module: _Module) -> ctypes.c_void_p:
    """Memory that the threads of all launches of this process run on."""
    if not _STACKS:
        _STACKS.append(module.library.qmir_host_stacks())
    return ctypes.c_void_p(_STACKS[0])


@functools.cache
def _module(text: str, name: str, defines: tuple[tuple[str, int], ...]) -> _Module:
    cxx = compiler()
    assert cxx is not None, "g++ is needed; tests that come here are marked needs_compiler"
    headers = "".join(path.read_text() for path in sorted(HERE.glob("*.h")))
    flags = [*FLAGS, *(f"-D{key}={value}" for key, value in defines)]
    # In a namespace without a name nothing is shared with another library in this process.
    opening = '#include "launch.h"\nnamespace {\nnamespace qmir { using namespace ::qmir; }\n'
    body = f"{opening}{text}}}\n"
    whole = _run([cxx, *flags, f"-I{HERE}", "-x", "c++", "-E", "-P", "-"], body)
    bounds = {m[2] or m[4]: m[1] or m[3] or "1024" for m in KERNEL.finditer(whole)}
    if not bounds:
        raise HostKernelError(f'{name}.cu has no `extern "C" __global__ void qmir_...`')
    path = cache_dir() / "host" / f"{name}_{sources.digest(body, headers, *flags)}.so"
    if not path.is_file():
        rows = "".join(
            f'{{"{k}", qmir_host::Entry<&{k}>::signature, qmir_host::Entry<&{k}>::call, '
            f"qmir_host::first_of({bound})}},\n"
            for k, bound in bounds.items()
        )
        table = f"static const qmir_host::Listed qmir_listed[] = {{\n{rows}}};\n"
        unit = f"{body}\n{table}QMIR_HOST_EXPORT(qmir_listed)\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            built = str(Path(scratch) / path.name)
            _run([cxx, *flags, f"-I{HERE}", "-x", "c++", "-", "-o", built], unit)
            os.replace(built, path)
    return _Module(path, list(bounds))


class HostLauncher:
    """Starts kernels on the CPU; implements `qmir_ao.backend.cuda.launch.Launcher`.

    Args:
        seed: draws the order of threads and blocks, the garbage in shared memory, and on which side
            of a tensor the forbidden page lies.
        folder: where to read `<source>.cu` instead of the package's kernels.

    Attributes:
        launched: (source, kernel) of every launch so far.
    """

    def __init__(self, seed: int = 0, folder: Path | None = None) -> None:
        self.seed = seed
        self.folder = folder
        self.launched: list[tuple[str, str]] = []

    def _text(self, source: str) -> str:
        if self.folder is None:
            return sources.read(source)
        text = (self.folder / f"{source}.cu").read_text()
        return sources.flatten(text, f"{source}.cu", sources.folder() / "include")

    def __call__(
        self,
        source: str,
        kernel: str,
        grid: Size3,
        block: Size3,
        args: Sequence[Argument],
        *,
        shared: int = 0,
        defines: Mapping[str, int] = NO_DEFINES,
    ) -> None:
        check_sizes(kernel, grid, block)
        check_arguments(kernel, args)
        module = _module(self._text(source), source, tuple(sorted(defines.items())))
        signature = module.signature(kernel)
        self._check(module, kernel, block, args, shared, signature)
        self.launched.append((source, kernel))
        buffers = _Buffers(module.library, args, at_end=self.seed % 2 == 0)
        try:
            slots = [buffers.slot(a, t) for a, t in zip(args, signature, strict=True)]
            pointers = (ctypes.c_void_p * len(slots))(*(ctypes.addressof(s) for s in slots))
            error = module.library.qmir_host_launch(
                kernel.encode(), (ctypes.c_uint * 6)(*grid, *block),
                ctypes.c_size_t(shared), ctypes.c_uint64(self.seed), pointers,
                _stacks(module),
            )  # fmt: skip
            if error is not None:
                raise HostKernelError(f"{kernel} (seed {self.seed}): {error.decode()}")
            by = ctypes.c_longlong()
            touched = module.library.qmir_host_touched(ctypes.byref(by))
            if touched >= 0:
                raise HostKernelError(
                    f"{kernel} (seed {self.seed}): wrote {abs(by.value)} bytes "
                    f"{'behind the end of' if by.value > 0 else 'before'} buffer {touched}"
                )
            buffers.copy_back()
        finally:
            module.library.qmir_host_reset()

    def _check(
        self,
        module: _Module,
        kernel: str,
        block: Size3,
        args: Sequence[Argument],
        shared: int,
        signature: str,
    ) -> None:
        given = "".join(
            "p" if a is None or isinstance(a, torch.Tensor) else "l" if isinstance(a, int) else "f"
            for a in args
        )
        if given != signature.replace("i", "l"):
            raise HostKernelError(f"{kernel} takes arguments {signature}, got {given}")
        threads = block[0] * block[1] * block[2]
        bound = module.library.qmir_host_bound(kernel.encode())
        if threads > bound:
            raise HostKernelError(f"{kernel}: {threads} threads, its __launch_bounds__ are {bound}")
        if shared > MAX_SHARED:
            raise HostKernelError(f"{kernel}: {shared} bytes of shared memory of {MAX_SHARED}")
        for a, letter in zip(args, signature, strict=True):
            if letter == "i" and not -(2**31) <= int(a) < 2**31:
                raise HostKernelError(f"{kernel}: {a} does not fit its `int` parameter")


class _Buffers:
    """Guarded copies of the tensors of a launch; those that share memory share a copy."""

    def __init__(self, library: ctypes.CDLL, args: Sequence[Argument], at_end: bool) -> None:
        spans = []
        for a in args:
            if isinstance(a, torch.Tensor):
                assert a.device.type == "cpu", f"the simulator takes CPU tensors, got {a.device}"
                reach = sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True))
                size = (reach + 1) * a.element_size() if a.numel() else 0
                spans.append((a.data_ptr(), a.data_ptr() + size))
        self.copies: list[tuple[int, int, int]] = []  # begin, end, address of the copy
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(spans):
            if merged and begin < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        for begin, end in merged:
            copy = library.qmir_host_buffer(
                ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), int(at_end)
            )
            self.copies.append((begin, end, copy))

    def slot(
        self, a: Argument, letter: str
    ) -> "ctypes._SimpleCData[int] | ctypes._SimpleCData[float]":
        if a is None:
            return ctypes.c_uint64(0)
        if isinstance(a, torch.Tensor):
            at = a.data_ptr()
            begin, _, copy = next(c for c in self.copies if c[0] <= at < max(c[1], c[0] + 1))
            return ctypes.c_uint64(copy + at - begin)
        return ctypes.c_float(a) if letter == "f" else ctypes.c_int64(a)

    def copy_back(self) -> None:
        for begin, end, copy in self.copies:
            ctypes.memmove(begin, copy, end - begin)
