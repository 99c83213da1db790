"""What the two integer scans share: kernel variants, tables and chunks (scan_q_chunks.cuh)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import Launcher, ceil_div, dense
from qmir_ao.backend.cuda.registration import declare_shared, declare_variants
from qmir_ao.backend.cuda.scan_chunks import TILE, WARP, ScanSize
from qmir_ao.ops.selective_scan_q import ScanArgs

MAX_STATES = 64
THREADS = 256

TABLE_BYTES = 48 * 1024
"""Largest table of decays in shared memory: 4-bit delta with 23 states, 5-bit with 11."""

REGISTER_STATES = 32
"""States whose rates stay in registers (kRegisterStates)."""

PAIRED_STATES = 16
"""States up to which the kernels' registers let two blocks share a multiprocessor."""

SHARED_BYTES = {True: (164 * 1024 - 2 * 1024) // 2, False: 99 * 1024}
"""Shared memory of a block where two are to share an Orin's, and where one is to fit any GPU."""


class Variant(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        states: states of a channel.
        codes: codes that delta may take.
        table: whether decays are a table, or computed.
        warps: warps of a block.
    """

    states: int
    codes: int
    table: bool
    warps: int

    @property
    def row(self) -> int:
        """Values of one channel and code in the table."""
        return self.states + 1 if self.table else 1

    @property
    def defines(self) -> dict[str, int]:
        """Preprocessor constants of the sources."""
        return {
            "QMIR_STATES": self.states,
            "QMIR_TABLE": int(self.table),
            "QMIR_WARPS": self.warps,
        }

    def shared(self, apply: bool) -> int:
        """Bytes of shared memory of a block, as ScanQStage lays them out."""
        pitch = ceil_div(self.states, 4) | 1
        projection = (TILE * pitch + 1) * 16
        codes = 2 * WARP * (TILE + 4) + 4
        outputs = (WARP * TILE + WARP // self.warps) * 4
        per_warp = (2 * projection + outputs if apply else projection) + codes
        rates = 0 if self.table or self.states <= REGISTER_STATES else self.states * WARP * 4
        return self.codes * self.row * WARP * 4 + rates + self.warps * per_warp


def variant(states: int, codes: int) -> Variant:
    """The kernels for a number of states and of codes of delta."""
    table = codes * (states + 1) * WARP * 4 <= TABLE_BYTES
    limit = SHARED_BYTES[states <= PAIRED_STATES]
    sizes = (Variant(states, codes, table, warps) for warps in (8, 4, 2))
    return next(v for v in sizes if v.shared(apply=True) <= limit)


DECLARED = [variant(*kind) for kind in ((10, 16), (16, 16), (16, 256))]
"""MambaIR's variants, which the tests compile; others compile on their first run."""


def declare(op: str, kinds: Sequence[Variant]) -> None:
    """Name the variants of an operator's source for the tests and the table of kernels."""
    declare_variants(op, [kind.defines for kind in kinds])
    for kind in kinds:
        for part in ("local", "apply"):
            declare_shared(f"qmir_{op}_{part}", kind.defines, kind.shared(part == "apply"))


def variant_of(scan: ScanArgs) -> Variant:
    """The kernels for these operands."""
    return variant(scan.A.shape[1], scan.delta_quant_max - scan.delta_quant_min + 1)


def make_table(launch: Launcher, op: str, scan: ScanArgs, size: ScanSize, kind: Variant) -> Tensor:
    """Delta and decays of every code, float32 (G, K, blocks, codes, row * 32).

    A block is 32 channels of a group, its last dimension as `row_slot` of scan_q_chunks.cuh says.
    Shape letters: ops/selective_scan_q.py.
    """
    groups, blocks = scan.delta_step.numel(), ceil_div(size.per_group, WARP)
    shape = (groups, size.groups, blocks, kind.codes, kind.row * WARP)
    # Lanes without a channel go through the motions; zeros keep them from work on garbage.
    full = size.per_group % WARP == 0
    table = (torch.empty if full else torch.zeros)(shape, dtype=torch.float32, device=scan.A.device)
    bias = None if scan.delta_bias is None else dense(scan.delta_bias)
    threads = groups * size.groups * blocks * kind.codes * WARP
    launch(
        op, f"qmir_{op}_table", (ceil_div(threads, THREADS), 1, 1), (THREADS, 1, 1),
        [
            *(dense(scan.delta_step), dense(scan.delta_shift), dense(scan.A), bias),
            *(size.groups, size.per_group, groups, scan.delta_quant_min, kind.codes),
            *(int(scan.delta_softplus), table),
        ],
        defines=kind.defines,
    )  # fmt: skip
    return table


def run_chunks(
    launch: Launcher,
    op: str,
    scan: ScanArgs,
    size: ScanSize,
    kind: Variant,
    table: Tensor,
    outside: Tensor | int,
) -> Tensor:
    """Outputs of all groups, float32 (B, K, E / K, L); images keep the order of their pixels.

    Args:
        launch: starts the kernels.
        op: operator name, that of its source as well.
        scan: operands, checked.
        size: how they are cut.
        kind: kernels to take.
        table: from `make_table`.
        outside: int32 or its address, set to 1 where a code of delta lies outside of its range.
    """
    device = scan.A.device
    y = torch.empty(
        size.batch, size.groups, size.per_group, size.length, dtype=torch.float32, device=device
    )
    carries: tuple[Tensor | None, Tensor | None] = (None, None)
    if size.slots > 1:
        shape = (size.batch, size.groups, size.slots, kind.states, size.per_group)
        carries = (torch.empty(shape, device=device), torch.empty(shape, device=device))
    operands = (scan.u, scan.delta, scan.B, scan.C)
    arguments = [
        *map(dense, (scan.u, scan.u_step, scan.u_shift, scan.delta)),
        *map(dense, (scan.B, scan.B_step, scan.B_shift, scan.C, scan.C_step, scan.C_shift, scan.A)),
        None if scan.D is None else dense(scan.D),
        table,
        *size,
        *(x.numel() for x in (scan.u_step, scan.delta_step, scan.B_step, scan.C_step)),
        *(int(x.dtype == torch.uint8) for x in operands),
        *(scan.delta_quant_min, kind.codes),
        *(*carries, y, outside),
    ]
    block = (kind.warps * WARP, 1, 1)

    def start(part: str) -> None:
        shared = kind.shared(part == "apply")
        launch(op, f"qmir_{op}_{part}", size.grid, block, arguments,
               shared=shared, defines=kind.defines)  # fmt: skip

    if size.slots > 1:
        start("local")
        end, decay = carries
        states = size.batch * size.groups * size.per_group * kind.states
        launch(
            op, f"qmir_{op}_carry", (ceil_div(states, THREADS), 1, 1), (THREADS, 1, 1),
            [decay, end, *size], defines=kind.defines,
        )  # fmt: skip
    start("apply")
    return y
