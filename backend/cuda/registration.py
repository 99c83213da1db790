"""Register a CUDA kernel for the CUDA key of an operator, and list the variants of its source."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import NO_DEFINES, check_device
from qmir_ao.backend.cuda.module import launcher
from qmir_ao.errors import DeviceMemoryError, DeviceSizeError

LIBRARY = torch.library.Library("qmir", "IMPL", "CUDA")
KERNELS: dict[str, Callable[..., Any]] = {}
"""Operator name to `launch(launcher, *operator_args)`, which tests call with a simulator."""

_VARIANTS: dict[str, list[Mapping[str, int]]] = {}
_DYNAMIC: dict[tuple[str, tuple[tuple[str, int], ...]], int] = {}


def declare_variants(source: str, variants: Sequence[Mapping[str, int]]) -> None:
    """Name all preprocessor constants with which `cuda/<source>.cu` is compiled.

    Args:
        source: name of the source, without `.cu`.
        variants: every set of constants that a launch may ask for.
    """
    known = _VARIANTS.setdefault(source, [])
    known.extend(v for v in variants if v not in known)


def variants(source: str) -> Sequence[Mapping[str, int]]:
    """Constants with which a source is compiled; sources that declared none have no constants."""
    return _VARIANTS.get(source, [NO_DEFINES])


def declare_shared(kernel: str, defines: Mapping[str, int], size: int) -> None:
    """Say with how much dynamic shared memory a kernel is usually started, for its table.

    Args:
        kernel: beginning of the kernel's name.
        defines: the variant.
        size: bytes.
    """
    _DYNAMIC[kernel, tuple(sorted(defines.items()))] = size


def dynamic_shared(kernel: str, defines: Mapping[str, int]) -> int:
    """Bytes of dynamic shared memory that were declared for a kernel, or 0."""
    given = tuple(sorted(defines.items()))
    found = (n for (name, of), n in _DYNAMIC.items() if kernel.startswith(name) and of == given)
    return next(found, 0)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def cuda_kernel(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `launch(launcher, *operator_args)` as the CUDA kernel of `qmir::<name>`.

    Args:
        name: operator name without namespace.
        reference: implementation that runs, on the GPU as well, where QMIR_DISABLE_NATIVE is 1.
    """

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(launch)
        def named(*args: Any, **options: Any) -> Any:
            try:
                return launch(*args, **options)
            except DeviceSizeError as error:
                sizes = ", ".join(str(tuple(x.shape)) for x in _tensors(args))
                raise DeviceSizeError(f"qmir::{name} on tensors of {sizes}: {error}") from error

        @functools.wraps(launch)
        def kernel(*args: Any) -> Any:
            device = check_device(name, *_tensors(args))
            if os.environ.get("QMIR_DISABLE_NATIVE") == "1":
                return reference(*args)
            try:
                with torch.cuda.device(device):
                    return named(launcher(), *args)
            except torch.OutOfMemoryError as error:
                raise DeviceMemoryError(
                    f"qmir::{name} does not fit into the memory of {device}: {error}. "
                    "Use smaller images, tiles or batches"
                ) from error

        LIBRARY.impl(name, kernel)
        KERNELS[name] = named
        return named

    return register
