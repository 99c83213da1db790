"""Kernels as another architecture runs them, and kernels with a fault, in the simulator."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from support.host_launcher import HostLauncher

from qmir_ao.backend.cuda import sources
from qmir_ao.backend.cuda.launch import NO_DEFINES, Argument, Size3

NATIVE_S4 = MappingProxyType({"QMIR_NATIVE_S4": 1})
FLOAT_PAIRS = MappingProxyType({"QMIR_FLOAT_PAIRS": 1})
PRODUCTS = (NO_DEFINES, NATIVE_S4)
"""Products as compute capability 9.0 and as 8.x makes them."""
SUMS = (NO_DEFINES, FLOAT_PAIRS)
"""Sums as where double arithmetic is fast and as where it is slow."""


class Variant(HostLauncher):
    """A simulator that adds preprocessor constants to every launch.

    Args:
        defines: the constants.
        seed: as HostLauncher.
        folder: as HostLauncher.
    """

    def __init__(
        self, defines: Mapping[str, int] = NO_DEFINES, seed: int = 0, folder: Path | None = None
    ) -> None:
        super().__init__(seed, folder)
        self.defines = defines

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
        both = {**defines, **self.defines}
        super().__call__(source, kernel, grid, block, args, shared=shared, defines=both)


def with_fault(folder: Path, source: str, right: str, wrong: str, *others: str) -> Path:
    """A folder whose `source` has `wrong` in the place of `right`, which must occur once.

    Args:
        folder: where to write it, and `others` as they are.
        source: name of the source, without `.cu`.
        right: text in the source or one of its headers.
        wrong: what to put there.
        others: names of further sources that the test starts.
    """
    text = sources.read(source)
    assert text.count(right) == 1, f"{right!r} occurs {text.count(right)} times in {source}.cu"
    (folder / f"{source}.cu").write_text(text.replace(right, wrong))
    for name in others:
        (folder / f"{name}.cu").write_text(sources.read(name))
    return folder
