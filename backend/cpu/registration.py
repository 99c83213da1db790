"""Register a C++ kernel for the CPU key of an operator, with the reference as its fallback."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from qmir_ao.backend.cpu.build import library

LIBRARY = torch.library.Library("qmir", "IMPL", "CPU")
KERNELS: dict[str, Callable[..., Any]] = {}
"""Operator name to its CPU launcher; `doctor` and the tests list what has a kernel from here."""


def cpu_kernel(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `launch(lib, *operator_args)` as the CPU kernel of `qmir::<name>`.

    Args:
        name: operator name without namespace.
        reference: implementation that runs where the library cannot be built.
    """

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(launch)
        def kernel(*args: Any) -> Any:
            lib = library()
            return reference(*args) if lib is None else launch(lib, *args)

        LIBRARY.impl(name, kernel)
        KERNELS[name] = kernel
        return launch

    return register
