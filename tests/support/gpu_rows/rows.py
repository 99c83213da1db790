"""What a row of the table of GPU times is: one piece of work, its sides, and what is to be reached.

Rows are functions of a device, so that a test runs every one of them on the CPU at a small size
(tests/backend/cuda/test_gpu_rows.py): on the first GPU nothing fails for a slip of the pen.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from support import oracles
from support.tolerances import SAME_WORK
from torch import Tensor

OURS = "qmir"
MAMBA = "mamba-ssm"


def is_missing(module: str | None) -> bool:
    """Whether a module is needed that is not installed."""
    return module is not None and importlib.util.find_spec(module) is None


class Side(NamedTuple):
    """One way to do the work.

    Attributes:
        run: one call.
        make: draws its arguments.
        needs: module without which the side is left out.
        compared: whether its result must agree with that of the other sides.
    """

    run: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    needs: str | None = None
    compared: bool = True

    def missing(self) -> bool:
        """Whether the module that it needs is not installed."""
        return is_missing(self.needs)


class Row(NamedTuple):
    """A piece of work.

    Attributes:
        work: its name with sizes.
        sides: name to side; that of this package is called OURS.
        goals: name of a side to how often its time ours should fit into it.
    """

    work: str
    sides: Mapping[str, Side]
    goals: Mapping[str, float]


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result."""
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]


def differing(mine: Any, theirs: Any) -> str | None:
    """Why two results are not those of the same work, or None."""
    pairs = list(zip(tensors(mine), tensors(theirs), strict=True))
    for at, (a, b) in enumerate(pairs):
        if a.shape != b.shape:
            return f"result {at}: {tuple(a.shape)} beside {tuple(b.shape)}"
        if not oracles.relative(a, b) <= SAME_WORK:
            return f"result {at}: differs by {oracles.relative(a, b):.3g} of its norm"
    return None


def disagreement(row: Row) -> str | None:
    """Which side does other work than that of this package, and by how much; or None."""

    def result(side: Side) -> Any:
        # Sides draw arguments of their own, of the same values.
        torch.manual_seed(0)
        return side.run(*side.make())

    mine = result(row.sides[OURS])
    for name, side in row.sides.items():
        if side.compared and name != OURS and not side.missing():
            why = differing(mine, result(side))
            if why is not None:
                return f"{row.work}: {name} does other work: {why}"
    return None


def copy_of(moved: int, device: torch.device) -> Side:
    """A copy that reads and writes `moved` bytes in all: what memory allows."""

    def make() -> tuple[Tensor, ...]:
        whole = torch.zeros(moved, dtype=torch.uint8, device=device)
        return whole[: moved // 2], whole[moved // 2 :][: moved // 2]

    return Side(lambda source, to: to.copy_(source), make, compared=False)


def trained(function: Callable[..., Tensor], count: int, *settings: Any) -> Callable[..., Any]:
    """Forward and backward in the first `count` arguments, by the last one.

    Args:
        function: what is differentiated.
        count: number of its tensors.
        settings: what it takes behind them.
    """

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        inputs = args[:count]
        return torch.autograd.grad(function(*inputs, *settings), inputs, args[count])

    return run
