"""Compile kernels with NVRTC and start them with CuPy, on torch's current stream.

Binaries are kept on disk under a key of source, options, architecture and NVRTC version. A launch
allocates nothing and waits for nothing, so that it can be captured in a CUDA graph; only the first
one of a kernel, which compiles and loads it, must come before the capture.
"""

import functools
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qmir_ao.backend.cpu.build import cache_dir
from qmir_ao.backend.cuda import sources
from qmir_ao.backend.cuda.launch import (
    NO_DEFINES,
    Argument,
    Size3,
    check_arguments,
    check_device,
    check_sizes,
)
from qmir_ao.errors import DeviceError

log = logging.getLogger(__name__)

# Tensor-core products of 4 and 8 bits, asynchronous copies and bf16 begin with Ampere.
OLDEST = (8, 0)
# One multiply-add rounded twice, as the reference operators and the CPU kernels do it.
FIXED_OPTIONS = ("-std=c++17", "--fmad=false")
# What a block may use of shared memory without asking for more.
PLAIN_SHARED = 48 * 1024


def options(architecture: str, defines: Mapping[str, int] = NO_DEFINES) -> list[str]:
    """NVRTC's options for one variant of a source.

    Args:
        architecture: `sm_87` for a binary, `compute_87` for PTX.
        defines: preprocessor constants.
    """
    constants = (f"-D{key}={value}" for key, value in sorted(defines.items()))
    return [*FIXED_OPTIONS, f"--gpu-architecture={architecture}", *constants]


def install_hint() -> str:
    """Which CuPy goes with this torch."""
    major = (torch.version.cuda or "13").split(".")[0]
    return f"pip install 'qmir-ao[cuda{major}]' (CuPy and NVRTC for CUDA {major})"


@functools.cache
def _cupy() -> tuple[ModuleType, ModuleType]:
    """CuPy, and its binding of NVRTC.

    Raises:
        DeviceError: one of them is missing.
    """
    try:
        import cupy
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()  # the library is looked for here
    except (ImportError, RuntimeError) as error:
        raise DeviceError(
            f"the CUDA kernels need CuPy with NVRTC, which cannot be loaded: {error}. "
            f"{install_hint()}; or set QMIR_DISABLE_NATIVE=1 to run the plain torch operators"
        ) from error
    return cupy, nvrtc


def choose_architecture(capability: tuple[int, int], supported: Sequence[int]) -> str:
    """What NVRTC should compile for: the device itself, or PTX of the newest that it knows.

    Args:
        capability: of the device, such as (8, 7).
        supported: architectures of the installed NVRTC, such as 87.

    Raises:
        DeviceError: the device, or NVRTC, is too old.
    """
    number = capability[0] * 10 + capability[1]
    if capability < OLDEST:
        raise DeviceError(
            f"the CUDA kernels need compute capability {OLDEST[0]}.{OLDEST[1]} (Ampere) or newer, "
            f"this device has {capability[0]}.{capability[1]}; use device='cpu', or set "
            "QMIR_DISABLE_NATIVE=1 to run the plain torch operators on it"
        )
    if number in supported:
        return f"sm_{number}"
    older = [a for a in supported if OLDEST[0] * 10 + OLDEST[1] <= a < number]
    if not older:
        raise DeviceError(
            f"NVRTC compiles for {sorted(supported)}, this device is {number}; {install_hint()}"
        )
    return f"compute_{max(older)}"


def require_kernels(device: torch.device) -> None:
    """Refuse a device that no kernel can be compiled for, or the lack of what compiles them.

    Raises:
        DeviceError: no CuPy with NVRTC, or an architecture that is too old.
    """
    _, nvrtc = _cupy()
    choose_architecture(torch.cuda.get_device_capability(device), nvrtc.getSupportedArchs())


def _compile(nvrtc: Any, text: str, name: str, flags: Sequence[str], binary: bool) -> bytes:
    program = nvrtc.createProgram(text, f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, tuple(flags))
        code = nvrtc.getCUBIN(program) if binary else nvrtc.getPTX(program)
    except nvrtc.NVRTCError as error:
        messages = nvrtc.getProgramLog(program)
        raise DeviceError(
            f"NVRTC cannot compile {name}.cu with {' '.join(flags)}:\n{messages[:4000]}\n"
            "Please report this with your CUDA version"
        ) from error
    finally:
        nvrtc.destroyProgram(program)
    return code.encode() if isinstance(code, str) else bytes(code)


def compiled(
    nvrtc: Any, source: str, architecture: str, defines: Mapping[str, int] = NO_DEFINES
) -> Path:
    """The compiled kernels of one source, from the cache or put into it.

    Args:
        nvrtc: CuPy's binding, or what looks like it.
        source: name of the source, without `.cu`.
        architecture: `sm_..` or `compute_..`.
        defines: preprocessor constants.

    Raises:
        DeviceError: NVRTC refuses the source (its messages are in the text).
    """
    text, flags = sources.read(source), options(architecture, defines)
    binary = architecture.startswith("sm_")
    version = ".".join(map(str, nvrtc.getVersion()))
    key = sources.digest(text, version, *flags)
    path = cache_dir() / "cuda" / f"{source}_{key}.{'cubin' if binary else 'ptx'}"
    if not path.is_file():
        code = _compile(nvrtc, text, source, flags, binary)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may compile the same: whoever is last leaves the same bytes.
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
            scratch.write(code)
        os.replace(scratch.name, path)
        log.info("qmir: compiled %s.cu for %s", source, architecture)
    return path


class _Stream(NamedTuple):
    """What CuPy reads of a stream that is not its own."""

    ptr: int


def _word(argument: Argument) -> Any:
    """A launch argument as the bytes of its parameter."""
    if argument is None:
        return np.uint64(0)
    if isinstance(argument, Tensor):
        return np.uint64(argument.data_ptr())
    return np.int64(argument) if isinstance(argument, int) else np.float32(argument)


class CudaLauncher:
    """Starts kernels on the device of their tensors; implements `launch.Launcher`."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[Any, ...], Any] = {}

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
        """Start a kernel, see `launch.Launcher`.

        Raises:
            DeviceError: no CuPy, no driver, a device that is too old, or a launch it refuses.
        """
        check_sizes(kernel, grid, block)
        check_arguments(kernel, args)
        device = check_device(kernel, *(a for a in args if isinstance(a, Tensor)))
        if device.type != "cuda":
            raise DeviceError(f"{kernel}: tensors are on {device}, a CUDA device is needed")
        with torch.cuda.device(device):
            run = self._kernel(device, source, kernel, shared, defines)
            stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
            try:
                words = tuple(_word(a) for a in args)
                run(grid, block, words, shared_mem=shared, stream=stream)
            except RuntimeError as error:
                raise DeviceError(
                    f"{kernel} with grid {grid}, block {block} and {shared} bytes of shared memory "
                    f"was refused by {torch.cuda.get_device_name(device)}: {error}"
                ) from error

    def _kernel(
        self,
        device: torch.device,
        source: str,
        kernel: str,
        shared: int,
        defines: Mapping[str, int],
    ) -> Any:
        key = (device.index, source, kernel, shared, *sorted(defines.items()))
        if key not in self._kernels:
            if torch.cuda.is_current_stream_capturing():
                raise DeviceError(
                    f"{kernel} is compiled on its first run, which a CUDA graph cannot capture; "
                    "run the model once before the capture"
                )
            self._kernels[key] = self._load(device, source, kernel, shared, defines)
        return self._kernels[key]

    def _load(
        self,
        device: torch.device,
        source: str,
        kernel: str,
        shared: int,
        defines: Mapping[str, int],
    ) -> Any:
        cupy, nvrtc = _cupy()
        capability = torch.cuda.get_device_capability(device)
        architecture = choose_architecture(capability, nvrtc.getSupportedArchs())
        path = compiled(nvrtc, source, architecture, defines)
        properties = torch.cuda.get_device_properties(device)
        plain = properties.shared_memory_per_block
        most = getattr(properties, "shared_memory_per_block_optin", plain)
        if shared > most:
            raise DeviceError(
                f"{kernel} needs {shared} bytes of shared memory, {device} has {most}"
            )
        try:
            function = cupy.RawModule(path=str(path)).get_function(kernel)
            if shared > PLAIN_SHARED:
                function.max_dynamic_shared_size_bytes = shared
        except RuntimeError as error:
            raise DeviceError(
                f"the driver cannot load {path.name}: {error}. Update the driver, or "
                f"{install_hint()}"
            ) from error
        return function


@functools.cache
def launcher() -> CudaLauncher:
    """The launcher of this process."""
    return CudaLauncher()
