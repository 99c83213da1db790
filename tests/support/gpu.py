"""What the tests and benchmarks on a real GPU share: whether there is one, and its clock."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch


def missing() -> str | None:
    """Why nothing can run on a GPU here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device, or a CPU build of torch"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install -e '.[cuda12]' or '.[cuda13]')"
    return None


needs_gpu = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def moved(value: Any, device: str) -> Any:
    """Arguments with their tensors on a device; leaves stay leaves."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(moved(x, device) for x in value)
    return value


class EventClock:
    """Seconds of the GPU's own time line, by CUDA events; a timer for pytest-benchmark."""

    def __init__(self) -> None:
        self.start = torch.cuda.Event(enable_timing=True)
        self.start.record()

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return float(self.start.elapsed_time(now)) * 1e-3


def rotating(make: Callable[[], tuple[Any, ...]], cold: bool) -> Callable[[], tuple[Any, ...]]:
    """Arguments for successive calls: of one set (warm), or of so many that no cache holds them."""
    first = make()
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, torch.Tensor))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = (
        [first, *(make() for _ in range(min(3 * cache // max(size, 1), 64)))] if cold else [first]
    )
    calls = 0

    def following() -> tuple[Any, ...]:
        nonlocal calls
        calls += 1
        return sets[calls % len(sets)]

    return following
