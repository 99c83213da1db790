"""What the tests and benchmarks on a real GPU share: whether there is one, and its clock."""

import gc
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

LEAD_CYCLES = 4_000_000
"""Some 2 ms of the device, in which the host starts what is timed."""
MOST_SETS = 2048
"""Sets of arguments of a cold measurement at most."""
WARMUP, ROUNDS, FEWEST, BUDGET = 10, 100, 10, 1.0
"""Calls before timing, timed calls at most and at least, and seconds that they should take."""


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


class Gpu:
    """The current CUDA device as benchmarks see it: its clock, cache, memory and graphs.

    Attributes:
        device: where tensors are made.
        target: name of the lowering target.
    """

    device = torch.device("cuda")
    target = "cuda"

    def cache(self) -> int:
        """Bytes of the second-level cache."""
        return int(torch.cuda.get_device_properties(0).L2_cache_size)

    def lead(self) -> None:
        """Keep the device busy for a while, so that what follows waits in its queue already.

        Without it the time of a short kernel is that of starting it.
        """
        torch.cuda._sleep(LEAD_CYCLES)

    def mark(self) -> Any:
        """A point on the device's own time line."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two points, of which the second is reached."""
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function through Inductor, which is asked on the first call."""
        made: list[Callable[..., Any]] = []

        def run(*args: Any) -> Any:
            if not made:
                made.append(torch.compile(function, dynamic=False))
            return made[0](*args)

        return run

    def captured(self, function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        """A replay of the call as a CUDA graph; its first runs come before the capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function(*args)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(*args)

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def peak(self, function: Callable[[], Any]) -> int:
        """Largest number of bytes that tensors took during a call, those there before included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())

    def free(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        torch.cuda.empty_cache()


def rotating(
    make: Callable[[], tuple[Any, ...]], cold: bool, cache: int
) -> Callable[[], tuple[Any, ...]]:
    """Arguments for successive calls: of one set (warm), or of so many that no cache holds them.

    Args:
        make: draws one set.
        cold: whether to draw several, of more than three times `cache` bytes in all.
        cache: bytes of the cache.
    """
    sets = [make()]
    size = sum(x.numel() * x.element_size() for x in sets[0] if isinstance(x, torch.Tensor))
    more = min(3 * cache // max(size, 1), MOST_SETS) if cold else 0
    sets += [make() for _ in range(more)]
    calls = itertools.count()
    return lambda: sets[next(calls) % len(sets)]


def call_times(
    gpu: Any, run: Callable[..., Any], following: Callable[[], tuple[Any, ...]], lead: bool = True
) -> list[float]:
    """Seconds of single calls, ROUNDS of them or fewer where they take long.

    Args:
        gpu: the device, see `Gpu`.
        run: what is timed.
        following: arguments of the next call.
        lead: whether to leave out what starting the kernels costs the host.
    """

    def timed() -> float:
        args = following()
        if lead:
            gpu.lead()
        start = gpu.mark()
        run(*args)
        return gpu.seconds(start, gpu.mark())

    # The first calls compile.
    shortest = min(timed() for _ in range(WARMUP))
    rounds = min(ROUNDS, max(FEWEST, int(BUDGET / max(shortest, 1e-9))))
    return [timed() for _ in range(rounds)]


class Replay:
    """A timer for pytest-benchmark that gives out durations which were measured before."""

    def __init__(self, durations: Sequence[float]) -> None:
        self.ends = itertools.chain.from_iterable((0.0, d) for d in durations)

    def __call__(self) -> float:
        return next(self.ends)
