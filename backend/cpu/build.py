"""Compile the C++ kernels on first use and load them through ctypes.

The library has a plain C interface and links to nothing of torch, so one build serves every torch
release. It is cached under a key of sources, compiler and instruction set; without a compiler the
reference operators run and one warning says so.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch
from filelock import FileLock

log = logging.getLogger(__name__)

FLAGS = ["-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-Wall"]
# One multiply-add rounded twice, as torch does it: the reference operators and the kernels agree
# to the byte only without contraction. -fno-trapping-math lets loops with selects vectorize.
FLAGS += ["-ffp-contract=off", "-fno-trapping-math"]
# Vectors of lanes are passed between inlined functions only, so their calling convention is moot.
FLAGS += ["-Wno-psabi"]
ISA = {
    "scalar": ["-mno-avx", "-fno-tree-vectorize"],
    "avx2": ["-mavx2", "-mfma", "-mprefer-vector-width=256"],
    "avx512": ["-march=native", "-mprefer-vector-width=512"],
    "native": ["-march=native", "-mprefer-vector-width=512"],
}


class BuildError(RuntimeError):
    """The kernels could not be compiled here; the caller falls back to the reference operators."""


def cache_dir() -> Path:
    """Folder of compiled kernels: `$QMIR_CACHE_DIR`, else the user's cache folder."""
    root = os.environ.get("QMIR_CACHE_DIR")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmir_ao"


def compiler() -> str | None:
    """Path of the user's C++ compiler (`$CXX`, g++, clang++), or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def sources() -> dict[str, bytes]:
    """Everything that is compiled: `.cpp` files, their headers, and those shared with CUDA."""
    here = Path(__file__).resolve().parent / "csrc"
    shared = Path(str(resources.files("qmir_ao.cuda") / "include"))
    files = [*sorted(here.glob("*.cpp")), *sorted(here.glob("*.h")), *sorted(shared.glob("*.cuh"))]
    return {file.name: file.read_bytes() for file in files}


def _isa_flags(cxx: str) -> list[str]:
    isa = os.environ.get("QMIR_ISA", "native")
    if isa not in ISA:
        raise BuildError(f"QMIR_ISA={isa!r} is unknown; allowed: {', '.join(ISA)}")
    flags = ISA[isa]
    probe = subprocess.run(
        [cxx, *flags, "-x", "c++", "-fsyntax-only", "-"], input="", capture_output=True, text=True
    )
    # Some compilers know neither -march=native nor these flags on their architecture.
    return flags if probe.returncode == 0 else []


def _key(files: dict[str, bytes], command: list[str], cxx: str) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    # -march=native means another machine code on another CPU: a home folder may be shared.
    macros = subprocess.run(
        [cxx, *command, "-x", "c++", "-dM", "-E", "-"], input="", capture_output=True, text=True
    ).stdout
    for text in (version, macros, " ".join(command)):
        digest.update(text.encode())
    for name, content in files.items():
        digest.update(name.encode() + content)
    return digest.hexdigest()[:24]


def build() -> Path:
    """Compile the kernels if the cache lacks them; return the path of the shared library.

    Raises:
        BuildError: no compiler, or the compiler failed (its output is in the message).
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler found (looked for $CXX, g++, clang++)")
    files = sources()
    flags = [*FLAGS, *_isa_flags(cxx)]
    target = cache_dir() / f"qmir_cpu_{_key(files, flags, cxx)}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Processes of one job start together: one of them compiles, the others wait.
        with FileLock(target.parent / ".lock"):
            if not target.is_file():
                with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                    os.replace(_compile(cxx, flags, files, Path(scratch)), target)
    return target


def _compile(cxx: str, flags: list[str], files: dict[str, bytes], scratch: Path) -> Path:
    """Compile the files in a scratch folder; return the path of the library in it.

    They are written there first: the sources may be edited meanwhile, and the cache's key is that
    of what was read.
    """
    for name, content in files.items():
        (scratch / name).write_bytes(content)
    units = [name for name in files if name.endswith(".cpp")]
    compile_only = [flag for flag in flags if flag != "-shared"]
    jobs = [
        subprocess.Popen(
            [cxx, *compile_only, "-c", unit, "-o", f"{unit}.o"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=scratch,
        )
        for unit in units
    ]
    failures = [err for job in jobs if (err := job.communicate()[1]) and job.returncode]
    if failures:
        raise BuildError(f"{cxx} failed:\n" + "\n".join(failures)[:4000])
    built = "kernels.so"
    objects = [f"{unit}.o" for unit in units]
    link = subprocess.run(
        [cxx, *flags, *objects, "-o", built], capture_output=True, text=True, cwd=scratch
    )
    if link.returncode:
        raise BuildError(f"{cxx} failed to link:\n{link.stderr[:4000]}")
    return scratch / built


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernel library, or None where it cannot be built (one warning says why)."""
    if os.environ.get("QMIR_DISABLE_NATIVE") == "1":
        return None
    try:
        return ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        log.warning(
            "qmir_ao runs its reference operators, which are slow: %s. "
            "Install g++ (Debian/Ubuntu: apt install g++) for the CPU kernels.",
            error,
        )
        return None


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Address of a contiguous tensor's data for a C call; NULL for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
