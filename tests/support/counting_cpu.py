"""What stands in for a GPU, and for mamba-ssm, where the rows of `make bench-gpu` are tested."""

import itertools
import types
from typing import Any

import torch

import qmir_ao.backend.kernels  # noqa: F401  (registers the kernels)


class CountingCpu:
    """The CPU in place of `support.gpu.Gpu`; between two marks lies a millisecond for each mark."""

    device = torch.device("cpu")
    target = "cpu"

    def __init__(self) -> None:
        self.marks = itertools.count()
        self.leads = 0

    def cache(self) -> int:
        return 4096

    def lead(self) -> None:
        self.leads += 1

    def mark(self) -> Any:
        return next(self.marks)

    def seconds(self, start: Any, end: Any) -> float:
        return 1e-3 * (end - start)

    def compiled(self, function: Any) -> Any:
        return function

    def captured(self, function: Any, *args: Any) -> Any:
        return lambda: function(*args)

    def peak(self, function: Any) -> int:
        function()
        return 10**6

    def free(self) -> None:
        pass


def mamba_module() -> types.ModuleType:
    """mamba-ssm's function by our operator, with the checks of the package's own C++ code."""
    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
        return_last_state=False,
    ):  # fmt: skip
        assert z is None and not return_last_state
        assert {x.dtype for x in (delta, B, C)} == {u.dtype}
        assert {x.dtype for x in (A, D, delta_bias)} == {torch.float32}
        assert all(x.stride(-1) == 1 for x in (u, delta, B, C, D, delta_bias))
        assert u.shape[1] % B.shape[1] == 0
        args = (u, delta, A, B, C, D, delta_bias, delta_softplus)
        return torch.ops.qmir.selective_scan(*args)

    module.selective_scan_fn = selective_scan_fn
    return module
