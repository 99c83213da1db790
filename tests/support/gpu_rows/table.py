"""The table of GPU times: what was measured, beside its peers and goals, ready for a document."""

import datetime
import importlib.metadata
import platform
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from support.gpu_rows.rows import OURS

HEAD = "| work | inputs | side | time | peer | its time | ratio | goal |\n|" + "---|" * 8
MEMORY_HEAD = "| work | side | peak | peer | its peak | share | goal |\n|" + "---|" * 7
NOTE = (
    "Times are minimum / median of single calls by CUDA events, ratios those of the peer's time to "
    "ours. Cold: successive calls read other tensors, of three times the second-level cache in "
    "all; warm: always the same. The rate of 4-bit tensor-core products on a Hopper says nothing "
    "about an Orin: it is emulated there. Results are equal."
)
PACKAGES = ("torch", "torchao", "triton", "cupy-cuda12x", "cupy-cuda13x", "mamba-ssm")


class Measured(NamedTuple):
    """One side of a row.

    Attributes:
        work: the row.
        inputs: "cold", "warm", or how a network was called.
        side: its name; those of this package begin with OURS.
        seconds: of each call.
        peak: bytes, or 0 where nobody asked.
    """

    work: str
    inputs: str
    side: str
    seconds: Sequence[float]
    peak: int = 0


def _time(seconds: Sequence[float]) -> str:
    low, middle = min(seconds), statistics.median(seconds)
    unit, factor = ("ms", 1e3) if middle >= 1e-3 else ("us", 1e6)
    digits = 1 if middle * factor >= 10 else 2
    return f"{low * factor:.{digits}f} / {middle * factor:.{digits}f} {unit}"


def _verdict(goal: float | None, reached: bool, bound: str) -> str:
    return "" if goal is None else f"{bound}: {'reached' if reached else 'missed'}"


def time_lines(measured: Sequence[Measured], goals: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each side of ours and each of its peers.

    Args:
        measured: in the order of the table.
        goals: work to peer to how often our time should fit into its own.
    """
    lines = []
    for ours in (m for m in measured if m.side.startswith(OURS)):
        peers = [
            m
            for m in measured
            if (m.work, m.inputs) == (ours.work, ours.inputs) and not m.side.startswith(OURS)
        ]
        first = f"| {ours.work} | {ours.inputs} | {ours.side} | {_time(ours.seconds)} |"
        for peer in peers:
            pairs = zip(*((min(m.seconds), statistics.median(m.seconds)) for m in (peer, ours)),
                        strict=True)  # fmt: skip
            low, middle = (a / b for a, b in pairs)
            goal = goals.get(ours.work, {}).get(peer.side)
            verdict = _verdict(goal, goal is not None and middle >= goal, f"{goal}x")
            lines.append(
                f"{first} {peer.side} | {_time(peer.seconds)} | {low:.2f}x / {middle:.2f}x | "
                f"{verdict} |"
            )
        if not peers:
            lines.append(f"{first} none ran | | | |")
    return lines


def memory_lines(
    measured: Sequence[Measured], goals: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """A line for each side of ours and each of its peers whose peak was asked for.

    Args:
        measured: in the order of the table.
        goals: work to peer to the share of its peak that ours may take.
    """
    lines = []
    with_peak = [m for m in measured if m.peak]
    for ours in (m for m in with_peak if m.side.startswith(OURS)):
        for peer in (m for m in with_peak if m.inputs == ours.inputs and m.work == ours.work):
            if peer.side.startswith(OURS):
                continue
            share = ours.peak / peer.peak
            goal = goals.get(ours.work, {}).get(peer.side)
            verdict = _verdict(goal, goal is not None and share <= goal, f"at most {goal}")
            lines.append(
                f"| {ours.work}, {ours.inputs} | {ours.side} | {ours.peak / 1e6:.0f} MB | "
                f"{peer.side} | {peer.peak / 1e6:.0f} MB | {share:.2f} | {verdict} |"
            )
    return lines


def _driver() -> str:
    """Version of the driver, as its own tool prints it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "driver unknown (no nvidia-smi)"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"driver {done.stdout.split()[0]}" if done.stdout.split() else "driver unknown"


def machine() -> str:
    """Date, device, driver and versions, in one sentence."""
    parts = [datetime.date.today().isoformat()]
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        parts.append(
            f"{found.name} ({found.multi_processor_count} multiprocessors, "
            f"{found.total_memory / 2**30:.0f} GiB, {found.L2_cache_size / 2**20:.0f} MiB of cache)"
        )
        parts.append(_driver())
    parts.append(f"CUDA {torch.version.cuda}, Python {platform.python_version()}")
    for package in PACKAGES:
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "Measured by `make bench-gpu` on " + ", ".join(parts) + "."


class Table:
    """What was measured so far; every addition rewrites the file, so that nothing is lost.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.measured: list[Measured] = []
        self.faster: dict[str, Mapping[str, float]] = {}
        self.smaller: dict[str, Mapping[str, float]] = {}

    def add(
        self,
        measured: Measured,
        faster: Mapping[str, float],
        smaller: Mapping[str, float] | None = None,
    ) -> None:
        """Take one side of a row, with the goals of the row; see `time_lines`, `memory_lines`."""
        self.measured.append(measured)
        self.faster[measured.work] = faster
        self.smaller[measured.work] = smaller or {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.text())

    def text(self) -> str:
        """The document."""
        parts = [f"{machine()}\n\n{NOTE}", "\n".join([HEAD, *self._times()])]
        memory = memory_lines(self.measured, self.smaller)
        if memory:
            parts.append("\n".join([MEMORY_HEAD, *memory]))
        return "\n\n".join(parts) + "\n"

    def _times(self) -> list[str]:
        return time_lines(self.measured, self.faster)
