"""What goes into the selective scans of a network and what comes out, float or lowered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qmir_ao.backend.kernels  # noqa: F401  (without its kernels a forward takes minutes)
from qmir_ao.recipes.pixels import to_float, to_tensor
from qmir_ao.recipes.tasks import Task

PROBE_SIDE = 96
"""Largest side of the input that the scans are looked at on."""
FAR = 6.0
"""Standard deviations beyond which a value counts as an outlier."""


@dataclass(frozen=True)
class Scan:
    """One call of the operator: its input (None where it is codes) and output, (B, D, L)."""

    given: Tensor | None
    made: Tensor


class _Listener(TorchDispatchMode):
    """Notes every selective scan that runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        qmir = torch.ops.qmir
        self.float_ops = (qmir.selective_scan.default, qmir.ss2d_scan.default)
        self.integer_ops = (qmir.selective_scan_q.default, qmir.ss2d_scan_q.default)
        self.scans: list[Scan] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and keep what a scan gives."""
        out = func(*args, **(kwargs or {}))
        if func in self.float_ops:
            # Images and sequences alike.
            self.scans.append(Scan(args[0].detach().flatten(2), out.detach().flatten(2)))
        elif func in self.integer_ops:
            self.scans.append(Scan(None, out.detach().flatten(2)))
        return out


def listen(model: nn.Module, x: Tensor) -> list[Scan]:
    """The scans of one forward pass, in the order of the network's blocks."""
    with torch.no_grad(), _Listener() as listener:
        model(x)
    found: list[Scan] = listener.scans
    return found


def probe_input(task: Task, folder: Any, inputs: Any = None) -> Tensor:
    """Middle of the first test image's input, (1, C, h, w)."""
    low, _ = task.sources(folder, inputs)[0].load()
    top, left = (max(0, (side - PROBE_SIDE) // 2) for side in low.shape[:2])
    return to_tensor(to_float(low[top : top + PROBE_SIDE, left : left + PROBE_SIDE]))[None]


def spread(values: Tensor) -> dict[str, float]:
    """How far values reach: `peak` in standard deviations, share beyond `FAR`, kurtosis."""
    flat = values.double().flatten()
    units = (flat - flat.mean()) / flat.std().clamp(min=1e-12)
    return {
        "peak": float(units.abs().max()),
        "far": float((units.abs() > FAR).double().mean()),
        "kurtosis": float(units.pow(4).mean()),
    }


def shown_scans(count: int) -> Sequence[int]:
    """Scans that the paper's figure 5 shows: 2 and 3, or the last two of a shorter network."""
    end = min(4, count)
    return range(max(0, end - 2), end)
