"""Kernel variants and launches of the float scans in chunks (cuda/include/scan_real.cuh)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import Argument, Launcher, ceil_div, dense
from qmir_ao.backend.cuda.scan_chunks import TILE, WARP, ScanSize

MAX_STATES = 64
THREADS = 256
MOST_BLOCKS = 4096
"""Enough for every GPU; a thread goes on with further elements."""

BACKWARD_TILE = 8
"""Steps whose states fit into shared memory (kSteps of the backward sources)."""

REGISTER_STATES = 16
"""States whose rates stay in registers (kRealRegisterStates)."""

SHARED_BYTES = 99 * 1024
"""Shared memory that a block finds on every supported GPU."""

DTYPES = (torch.float32, torch.bfloat16)


class RealVariant(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        states: states of a channel.
        warps: warps of a block.
        tile: steps that a warp holds at once.
        bf16: whether operands are bf16 instead of float32.
    """

    states: int
    warps: int
    tile: int
    bf16: bool

    @property
    def defines(self) -> dict[str, int]:
        """Preprocessor constants of the sources."""
        return {
            "QMIR_STATES": self.states,
            "QMIR_WARPS": self.warps,
            "QMIR_BF16": int(self.bf16),
        }

    def shared(self, channels: int, projections: int, history: bool = False) -> int:
        """Bytes of shared memory of a block, as RealStage and RealBackward lay them out.

        Args:
            channels: tiles of 32 channels that each warp holds.
            projections: tiles of B or C.
            history: whether states of each step, and sums for dB and dC, are kept as well.
        """
        pitch = ceil_div(self.states, 4) | 1
        per_warp = channels * (WARP * self.tile + WARP // self.warps)
        per_warp += projections * (self.tile * pitch + 1) * 4
        if history:
            sets = ceil_div(self.states, WARP // 2)
            per_warp += self.tile * self.states * WARP
            per_warp += self.tile * (sets * WARP + 4) + 1
        rates = 0 if self.states <= REGISTER_STATES else 3 * self.states * WARP
        return 4 * (rates + self.warps * per_warp)


def forward_variant(states: int, dtype: torch.dtype) -> RealVariant:
    """The kernels of the forward pass."""
    kinds = (RealVariant(states, w, TILE, dtype == torch.bfloat16) for w in (8, 4, 2))
    return next(k for k in kinds if k.shared(3, 2) <= SHARED_BYTES)


def backward_variant(states: int, dtype: torch.dtype) -> RealVariant:
    """The kernels of the backward pass: as many warps as fit, of 63 states and more one."""
    kinds = [RealVariant(states, w, BACKWARD_TILE, dtype == torch.bfloat16) for w in (8, 4, 2, 1)]
    fits = (k for k in kinds if k.shared(4, 2, history=True) <= SHARED_BYTES)
    return next(fits, kinds[-1])


def runs(tensors: Sequence[Tensor | None], grad: Tensor | None = None) -> bool:
    """Whether the kernels take these operands; the reference, on the same device, takes others.

    Sequences must be of one type; beside bf16, as under autocast, A, D and the bias may be float32.
    """
    u, delta, A, B, C, D, bias = tensors
    sequences = {x.dtype for x in (u, delta, B, C, grad) if x is not None}
    parameters = {x.dtype for x in (A, D, bias) if x is not None}
    known = len(sequences) == 1 and sequences <= set(DTYPES)
    assert A is not None
    return known and parameters <= sequences | {torch.float32} and A.shape[1] <= MAX_STATES


def carries(size: ScanSize, kind: RealVariant, count: int, device: torch.device) -> list[Tensor]:
    """`count` tensors (B, K, slots, N, channels of a group), float32."""
    shape = (size.batch, size.groups, size.slots, kind.states, size.per_group)
    return [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(count)]


def operands(tensors: Sequence[Tensor | None], softplus: bool, size: ScanSize) -> list[Argument]:
    """Arguments that the kernels of all passes begin with; the parameters as float32."""
    u, delta, A, B, C, D, bias = tensors
    wide = (x if x is None else x.float() for x in (A, D, bias))
    A, D, bias = wide
    kept = (None if x is None else dense(x) for x in (u, delta, A, B, C, D, bias))
    return [*kept, int(softplus), *size]


def start_chunks(
    launch: Launcher,
    source: str,
    part: str,
    size: ScanSize,
    kind: RealVariant,
    args: Sequence[Argument],
    shared: int,
) -> None:
    """Start a kernel that goes through the chunks."""
    launch(
        source, f"qmir_{source}_{part}", size.grid, (kind.warps * WARP, 1, 1), args,
        shared=shared, defines=kind.defines,
    )  # fmt: skip


def start_threads(
    launch: Launcher,
    source: str,
    part: str,
    threads: int,
    kind: RealVariant,
    args: Sequence[Argument],
    most_blocks: int | None = None,
) -> None:
    """Start a kernel that has a thread for each of so many elements, or fewer that go on."""
    blocks = ceil_div(threads, THREADS)
    launch(
        source, f"qmir_{source}_{part}", (min(blocks, most_blocks or blocks), 1, 1),
        (THREADS, 1, 1), args, defines=kind.defines,
    )  # fmt: skip
