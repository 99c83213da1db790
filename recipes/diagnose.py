"""What `qmir doctor` looks at: versions, compiler, kernels, GPU, optional packages."""

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import qmir_ao.backend.cpu
import qmir_ao.ops  # noqa: F401  (the self-tests call its operators)
from qmir_ao.backend.cpu import build
from qmir_ao.backend.cpu.registration import KERNELS

ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "asimd", "asimddp")
PACKAGES = {
    "recipes": ("lightning", "torchmetrics", "opencv-python-headless", "pillow", "scikit-image"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "cuda12": ("cupy-cuda12x",),
    "cuda13": ("cupy-cuda13x",),
    "orin": ("torch-tensorrt",),
    "mamba": ("mamba-ssm",),
}


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: "ok", "missing" (optional, works without) or "broken".
        detail: what was found, and for the other states what to do.
    """

    name: str
    state: str
    detail: str


def cpu_name() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Instruction sets of the processor that the kernels have use for."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.is_file() else set()
    return [flag for flag in ISA_FLAGS if flag in words]


def kernels() -> str:
    """One line on whether the C++ kernels run here."""
    if build.library() is not None:
        return f"C++, compiled here ({os.environ.get('QMIR_ISA', 'native')})"
    return "reference operators in torch (no C++ compiler)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _core() -> list[Check]:
    checks = [
        Check("python", "ok", platform.python_version()),
        Check("processor", "ok", f"{cpu_name()}, {os.cpu_count()} cores, {' '.join(cpu_flags())}"),
        Check("threads", "ok", str(torch.get_num_threads())),
    ]
    for package in ("torch", "torchao", "numpy", "safetensors"):
        version = _version(package)
        checks.append(
            Check(package, "ok", version)
            if version
            else Check(package, "broken", f"not installed: pip install {package}")
        )
    return checks


def _compiler() -> list[Check]:
    path = build.compiler()
    if path is None:
        hint = "none found; the slow reference operators run. Debian/Ubuntu: apt install g++"
        return [Check("compiler", "missing", hint)]
    told = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    checks = [Check("compiler", "ok", f"{path}: {told.splitlines()[0] if told else 'unknown'}")]
    try:
        checks.append(Check("kernel library", "ok", str(build.build())))
    except build.BuildError as error:
        checks.append(Check("kernel library", "broken", str(error)))
    return checks


def _integers(*shape: int, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)


def _test_pack() -> bool:
    ops = torch.ops.qmir
    codes = [_integers(7, 33, bits=bits) for bits in (2, 4, 8)]
    return all(
        torch.equal(ops.unpack(ops.pack(q, bits), bits, q.numel()).view_as(q), q)
        for q, bits in zip(codes, (2, 4, 8), strict=True)
    )


def _test_linear() -> bool:
    x, w = _integers(5, 37, bits=8), _integers(11, 37, bits=4)
    acc = torch.ops.qmir.linear_acc(x, torch.ops.qmir.pack(w, 4), 4, 11)
    return torch.equal(acc.long(), x.long() @ w.long().T)


def _test_conv2d() -> bool:
    x, w = _integers(2, 6, 9, 7, bits=8), _integers(4, 3, 3, 3, bits=2)
    acc = torch.ops.qmir.conv2d_acc(
        x, torch.ops.qmir.pack(w, 2), 2, [4, 3, 3, 3], [1, 1], [1, 1], [1, 1], 2
    )
    # Exact: the sums are far below 2**53.
    want = torch.nn.functional.conv2d(x.double(), w.double(), padding=1, groups=2)
    return torch.equal(acc.double(), want)


def _test_selective_scan() -> bool:
    from qmir_ao.ops.selective_scan import selective_scan_ref

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    args = (draw(2, 6, 19), draw(2, 6, 19), -draw(6, 4).exp(), draw(2, 2, 4, 19))
    rest = (draw(2, 2, 4, 19), draw(6), draw(6), True)
    got = torch.ops.qmir.selective_scan(*args, *rest)
    return torch.allclose(got, selective_scan_ref(*args, *rest), rtol=1e-4, atol=1e-5)


SELF_TESTS = {
    "pack, unpack": _test_pack,
    "integer linear": _test_linear,
    "integer convolution": _test_conv2d,
    "selective scan": _test_selective_scan,
}


def _self_tests() -> list[Check]:
    checks = []
    for name, test in SELF_TESTS.items():
        try:
            good = test()
        except Exception as error:  # whatever goes wrong in there is the finding
            checks.append(Check(f"self-test: {name}", "broken", f"{type(error).__name__}: {error}"))
            continue
        detail = "agrees with the plain computation" if good else "WRONG RESULT; do not use it"
        checks.append(Check(f"self-test: {name}", "ok" if good else "broken", detail))
    native = "C++" if build.library() is not None else "reference"
    checks.append(Check("operators with a CPU kernel", "ok", f"{len(KERNELS)} ({native} in use)"))
    return checks


def _gpu() -> list[Check]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return [Check("GPU", "ok", ", ".join(names))]
    return [Check("GPU", "missing", "none that torch can use; everything runs on the CPU")]


def _optional() -> list[Check]:
    checks = []
    for extra, packages in PACKAGES.items():
        found = {package: _version(package) for package in packages}
        absent = [package for package, version in found.items() if version is None]
        detail = ", ".join(f"{package} {version}" for package, version in found.items() if version)
        if absent:
            detail = f"without {', '.join(absent)}: pip install 'qmir-ao[{extra}]'"
        checks.append(Check(f"extra: {extra}", "missing" if absent else "ok", detail))
    return checks


def diagnose() -> list[Check]:
    """Look at everything; compiles the kernels if they are not compiled yet."""
    return [*_core(), *_compiler(), *_self_tests(), *_gpu(), *_optional()]
