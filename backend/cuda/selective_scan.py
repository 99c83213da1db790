"""CUDA kernels of `qmir::selective_scan` and its backward (cuda/selective_scan*.cu)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qmir_ao.backend.cuda.launch import Argument, Launcher, ceil_div, dense
from qmir_ao.backend.cuda.registration import cuda_kernel, declare_shared, declare_variants
from qmir_ao.ops.selective_scan import (
    check_operands,
    selective_scan_backward_ref,
    selective_scan_ref,
)

FORWARD, BACKWARD = "selective_scan", "selective_scan_backward"
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
STATES = (2, 3, 4, 8, 16)
"""States of a lane that have kernels; a channel has four times as many at most."""
MAX_STATES = 4 * STATES[-1]
LANE_CHANNELS = 8
SPAN = 64
"""Rows of parameter gradients that are added at a time."""
STEPS = 32
"""Time steps of a tile; chunks are multiples of it."""

declare_variants(FORWARD, [{"QMIR_STATES": n} for n in STATES])
declare_variants(BACKWARD, [{"QMIR_STATES": n} for n in STATES])


class _Scan(NamedTuple):
    """Operands as the kernels read them, and how their work is cut."""

    tensors: list[Tensor | None]  # u, delta, A, B, C, D, delta_bias
    softplus: bool
    chunk: int
    warps: int

    @property
    def u(self) -> Tensor:
        found = self.tensors[0]
        assert found is not None
        return found

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Batch, channels, groups, states, length."""
        A, B = self.tensors[2], self.tensors[3]
        assert A is not None and B is not None
        return self.u.shape[0], self.u.shape[1], B.shape[1], A.shape[1], self.u.shape[2]

    @property
    def chunks(self) -> int:
        return ceil_div(self.u.shape[2], self.chunk)

    @property
    def channel_blocks(self) -> int:
        """Blocks that share the channels of a group."""
        _, channels, groups, *_ = self.sizes
        return ceil_div(channels // groups, self.warps * LANE_CHANNELS)

    def args(self) -> list[Any]:
        """What every kernel of this source takes first."""
        return [*self.tensors, *self.sizes, self.softplus, self.chunk]

    def start(self, launch: Launcher, source: str, kernel: str, args: list[Any]) -> None:
        """Start a kernel whose blocks are (sample, group, channels, chunk)."""
        batch, _, groups, states, _ = self.sizes
        blocks = batch * groups * self.channel_blocks * self.chunks
        name = f"qmir_scan_{kernel}_{NAMES[self.u.dtype]}"
        lane_states = next(n for n in STATES if 4 * n >= states)
        block = (32 * self.warps, 1, 1)
        defines = {"QMIR_STATES": lane_states}
        shared = _shared(self.warps, lane_states) if source == BACKWARD else 0
        every = [*self.args(), *args]
        launch(source, name, (blocks, 1, 1), block, every, shared=shared, defines=defines)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)


def _warps(per_group: int, most: int) -> int:
    """Warps of a block: as few idle ones as `most` allows."""
    needed = ceil_div(per_group, LANE_CHANNELS)
    return ceil_div(needed, ceil_div(needed, most))


def _most_warps(lane_states: int) -> int:
    """As in the backward source: each warp needs room for its states."""
    return 8 if lane_states <= 4 else 4 if lane_states == 8 else 2


def _shared(warps: int, lane_states: int) -> int:
    """Bytes of the struct Tiles of the backward source, as far as these warps use it."""
    room = 4 if lane_states == 3 else lane_states
    kept = 8 if lane_states <= 4 else 4 if lane_states == 8 else 2
    sums = 4 * (ceil_div(2 * lane_states, 8) * 8) + 1
    per_warp = 5 * 8 * (STEPS + 1) + STEPS // kept * lane_states * 32 + STEPS * sums
    return 4 * (2 * STEPS * (4 * room + 4) + warps * per_warp)


for _states in STATES:
    for _kernel in ("qmir_scan_chunk_sums", "qmir_scan_backward"):
        _bytes = _shared(_most_warps(_states), _states)
        declare_shared(_kernel, {"QMIR_STATES": _states}, _bytes)


def forward_chunk(length: int) -> int:
    """Time steps of a chunk: short sequences in more pieces, so that they fill a device as well."""
    return STEPS if length < 2048 else 2 * STEPS if length < 32768 else 4 * STEPS


def _scan(tensors: list[Tensor | None], softplus: bool, chunk: int, most_warps: int) -> _Scan:
    u, delta, A, B, C, D, bias = tensors
    assert u is not None and A is not None and B is not None
    dtype = torch.float32
    if all(x is not None and x.dtype == torch.bfloat16 for x in (u, delta, B, C)):
        dtype = torch.bfloat16
    kept = [
        None if x is None else dense(x.to(dtype if in_sequence else torch.float32))
        for x, in_sequence in (
            (u, True), (delta, True), (A, False), (B, True), (C, True), (D, False), (bias, False)
        )
    ]  # fmt: skip
    return _Scan(kept, softplus, chunk, _warps(u.shape[1] // B.shape[1], most_warps))


def _starts(launch: Launcher, scan: _Scan) -> Tensor | None:
    """State before each chunk, None where there is only one."""
    batch, channels, _, states, _ = scan.sizes
    if scan.chunks == 1:
        return None
    rows = batch * channels
    ends, totals = scan.empty(rows, scan.chunks, states), scan.empty(rows, scan.chunks)
    scan.start(launch, FORWARD, "chunks", [ends, totals])
    _carry(launch, scan, "qmir_scan_carry", totals, ends)
    return ends


def _carry(launch: Launcher, scan: _Scan, kernel: str, totals: Tensor, *ends: Tensor) -> None:
    batch, channels, _, states, _ = scan.sizes
    rows = batch * channels
    source = FORWARD if kernel == "qmir_scan_carry" else BACKWARD
    args: list[Argument] = [scan.tensors[2], totals, *ends, rows, channels, states, scan.chunks]
    lane_states = next(n for n in STATES if 4 * n >= states)
    blocks = (ceil_div(rows * states, 256), 1, 1)
    launch(source, kernel, blocks, (256, 1, 1), args, defines={"QMIR_STATES": lane_states})


@cuda_kernel("selective_scan", selective_scan_ref)
def launch_selective_scan(launch: Launcher, *args: Any) -> Tensor:
    """`qmir::selective_scan`; arguments as in the operator after `launch`.

    float32 and bfloat16 sequences run as they are, with float32 arithmetic; float16 takes a detour
    through float32. float64, and more than 64 states, run in plain torch on the device.
    """
    *tensors, softplus = args
    check_operands(*tensors)
    u, A = tensors[0], tensors[2]
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    if wide or A.shape[1] > MAX_STATES or not A.shape[1]:
        return selective_scan_ref(*args)
    if not u.numel():
        return torch.empty_like(u)
    scan = _scan(tensors, softplus, forward_chunk(u.shape[2]), 8)
    y = torch.empty(u.shape, dtype=scan.u.dtype, device=u.device)
    scan.start(launch, FORWARD, "forward", [_starts(launch, scan), y])
    return y.to(u.dtype)


@cuda_kernel("selective_scan_backward", selective_scan_backward_ref)
def launch_selective_scan_backward(launch: Launcher, *args: Any) -> tuple[Tensor, ...]:
    """`qmir::selective_scan_backward`; types as in the forward."""
    grad, *tensors, softplus = args
    check_operands(*tensors)
    u, A = tensors[0], tensors[2]
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    if wide or A.shape[1] > MAX_STATES or not A.shape[1] or not u.numel():
        return selective_scan_backward_ref(*args)
    lane_states = next(n for n in STATES if 4 * n >= A.shape[1])
    scan = _scan(tensors, softplus, STEPS, _most_warps(lane_states))
    up = dense(grad.to(scan.u.dtype))
    starts, behind = _around_chunks(launch, scan, up)
    du, ddelta = (torch.empty(u.shape, dtype=scan.u.dtype, device=u.device) for _ in range(2))
    batch, channels, groups, states, length = scan.sizes
    projections = scan.empty(scan.channel_blocks, 2, batch, groups, states, length)
    parameters = scan.empty(batch * scan.chunks, channels * (states + 2))
    every = [up, starts, behind, du, ddelta, projections, parameters]
    scan.start(launch, BACKWARD, "backward", every)
    found = (
        du,
        ddelta,
        *_sum_parameters(launch, scan, parameters, lane_states),
        *_sum_projections(launch, scan, projections, lane_states),
    )
    order = (0, 1, 2, 5, 6, 3, 4)
    # Absent operands (D, delta_bias) get an empty gradient.
    return tuple(
        u.new_empty(0) if x is None else found[at].to(x.dtype)
        for x, at in zip(tensors, order, strict=True)
    )


def _around_chunks(launch: Launcher, scan: _Scan, grad: Tensor) -> tuple[Tensor, Tensor]:
    """State before each chunk, and gradient of the state behind it."""
    batch, channels, _, states, _ = scan.sizes
    rows = batch * channels
    ends, backs = (scan.empty(rows, scan.chunks, states) for _ in range(2))
    totals = scan.empty(rows, scan.chunks)
    scan.start(launch, BACKWARD, "chunk_sums", [grad, ends, backs, totals])
    _carry(launch, scan, "qmir_scan_carry_both", totals, ends, backs)
    return ends, backs


def _sum_projections(
    launch: Launcher, scan: _Scan, parts: Tensor, lane_states: int
) -> tuple[Tensor, Tensor]:
    """Gradients of B and C from the blocks of channels."""
    blocks, count = parts.shape[0], parts[0, 0].numel()
    dB, dC = (
        torch.empty(parts.shape[2:], dtype=scan.u.dtype, device=parts.device) for _ in range(2)
    )
    kernel = f"qmir_scan_projections_{NAMES[scan.u.dtype]}"
    grid, defines = (ceil_div(2 * count, 256), 1, 1), {"QMIR_STATES": lane_states}
    args: list[Argument] = [parts, dB, dC, blocks, count]
    launch(BACKWARD, kernel, grid, (256, 1, 1), args, defines=defines)
    return dB, dC


def _sum_parameters(
    launch: Launcher, scan: _Scan, parts: Tensor, lane_states: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A, D and the bias: sums over samples and chunks, in two steps of fixed order."""
    _, channels, _, states, _ = scan.sizes
    rows, columns = parts.shape
    spans = ceil_div(rows, SPAN)
    halfway = torch.empty((spans, columns), dtype=torch.float64, device=parts.device)
    blocks, defines = ceil_div(columns, 256), {"QMIR_STATES": lane_states}
    args: list[Argument] = [parts, halfway, rows, columns, SPAN]
    grid = (blocks, spans, 1)
    launch(BACKWARD, "qmir_scan_columns", grid, (256, 1, 1), args, defines=defines)
    dA, dD, dbias = scan.empty(channels, states), scan.empty(channels), scan.empty(channels)
    args = [halfway, dA, dD, dbias, spans, channels, states]
    grid = (blocks, 1, 1)
    launch(BACKWARD, "qmir_scan_parameters", grid, (256, 1, 1), args, defines=defines)
    return dA, dD, dbias
