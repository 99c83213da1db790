"""Launchers of `qmir::chain_quantize` (cuda/chain_quantize.cu; cuda/dls.cu, cuda/moments.cu).

Bytes moved for each value, with a gate in brackets; 4 a float, 1 a code:

| way | kernels | bytes |
|---|---|---|
| a step for each token | everything in one | 5 (+4) |
| no norm, memory in the order of the codes | sums of chunks, steps, codes | 9 (+8) |
| everything else | values in the order of the codes, sums of chunks, steps, codes | 17 (+4) |
| moments given, memory in the order of the codes | steps, codes | 5 |
| moments given, any other memory | steps, codes of tiles | 5 |

The separate operators move 8 for each of norm, activation, gate (+4), channel shift and copy of a
permuted tensor, and 9 for the quantizer. What no kernel knows runs the reference on the device:
other types than float32, channels neither second nor last, and norms over more than LONGEST_ROW.

As in backend/cuda/dls.py, a group that holds NaN or infinity gets NaN as its step and shift.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qmir_ao.backend.chain_layout import Layout, lay_out
from qmir_ao.backend.cuda.dls import (
    CHUNK,
    SHORT,
    SUM_THREADS,
    launch_dls_qparams,
    launch_dls_quantize,
    launch_finish,
)
from qmir_ao.backend.cuda.launch import Argument, Launcher, ceil_div, check_device, dense
from qmir_ao.backend.cuda.moments import launch_steps
from qmir_ao.backend.cuda.registration import cuda_kernel, declare_shared
from qmir_ao.ops._activations import ACTIVATION_NUMBERS
from qmir_ao.ops._affine import code_dtype
from qmir_ao.ops.chain_quantize import OP, ChainArgs, chain_quantize_ref, check_chain

LONGEST_ROW = SHORT
"""Most channels of a norm, and of a token that one kernel quantizes."""
ROWS = (32, 16, 8)
"""Pixels of a tile; half a warp takes one at a time, and a block has eight of them."""
TILE_BYTES = 16 * 1024
"""What a tile should take of shared memory, for several blocks to fit a multiprocessor."""
WIDTH = 64
"""Channels of a tile where no norm needs them all."""

Result = tuple[Tensor, Tensor, Tensor]


def _tile(channels: int) -> tuple[int, int]:
    """Rows of a tile, and its bytes of shared memory; rows have an odd pitch."""
    row = 4 * (channels | 1)
    rows = next((n for n in ROWS if n * row <= TILE_BYTES), ROWS[-1])
    return rows, rows * row


# For the table of kernels: tiles of 60 channels, the width of the light network.
for _kernel in ("tokens", "values", "tile_codes"):
    declare_shared(f"qmir_chain_{_kernel}", {}, _tile(60)[1])


def _operands(chain: ChainArgs, layout: Layout) -> tuple[Argument, ...]:
    _, channels, pixels = layout.size
    return (
        *layout.operands,
        *(channels, pixels),
        *layout.x_strides,
        *layout.gate_strides,
        ACTIVATION_NUMBERS[chain.activation],
        ACTIVATION_NUMBERS[chain.gate_activation],
    )


def _norm(chain: ChainArgs) -> tuple[int, float]:
    """Whether there is a norm, and its epsilon."""
    return int(chain.norm_eps is not None), chain.norm_eps or 0.0


def _follows_memory(layout: Layout) -> bool:
    """Whether neighbours among the codes come from neighbours of x, and of the gate if any."""
    inner = 2 if layout.channels_first else 1
    alone = layout.size[inner] == 1
    gate_ok = layout.gate is None or alone or layout.gate_strides[inner] in (0, 1)
    return gate_ok and (alone or layout.x_strides[inner] == 1)


def _empty(chain: ChainArgs) -> Result:
    device = chain.x.device
    codes = torch.empty(chain.size, dtype=code_dtype(chain.quant_max), device=device)
    step, shift = (torch.empty(chain.groups, dtype=torch.float32, device=device) for _ in range(2))
    return codes, step, shift


def _grid_limits(chain: ChainArgs) -> tuple[float, float, float]:
    """Divisor of the cap, or 0, and the smallest and largest code."""
    levels = chain.quant_max - chain.quant_min + 1 if chain.cap else 0
    return float(levels), float(chain.quant_min), float(chain.quant_max)


def _tokens(launch: Launcher, chain: ChainArgs, layout: Layout) -> Result:
    codes, step, shift = _empty(chain)
    rows, shared = _tile(layout.size[1])
    launch(
        OP,
        "qmir_chain_tokens",
        (ceil_div(chain.groups, rows), 1, 1),
        (SUM_THREADS, 1, 1),
        (*_operands(chain, layout), dense(chain.scale_weights), dense(chain.shift_weights),
         codes, step, shift, chain.groups, rows, *_norm(chain), *_grid_limits(chain)),
        shared=shared,
    )  # fmt: skip
    return codes, step, shift


def _in_place(launch: Launcher, chain: ChainArgs, layout: Layout) -> Result:
    codes, step, shift = _empty(chain)
    groups, device = chain.groups, chain.x.device
    count = codes.numel() // groups
    chunks = ceil_div(count, CHUNK)
    sums = torch.empty(groups * chunks * 2, dtype=torch.float64, device=device)
    ranges = torch.empty(groups * chunks * 2, dtype=torch.float32, device=device)
    firsts = torch.empty(groups, dtype=torch.float32, device=device)
    grid, block, operands = (groups * chunks, 1, 1), (SUM_THREADS, 1, 1), _operands(chain, layout)
    sizes = (int(layout.channels_first), layout.size[0] // groups, count, chunks)
    levels, low, high = _grid_limits(chain)
    launch(OP, "qmir_chain_chunks", grid, block, (*operands, sums, ranges, firsts, *sizes))
    weights = dense(chain.scale_weights), dense(chain.shift_weights)
    launch_finish(launch, firsts, (sums, ranges), weights, (step, shift), (1, count), levels)
    codes_args = (*operands, step, shift, codes, *sizes, low, high)
    launch(OP, "qmir_chain_codes", grid, block, codes_args)
    return codes, step, shift


class _Tiles(NamedTuple):
    """How a tensor is cut into tiles where memory does not follow the order of the codes."""

    tokens: int
    rows: int
    width: int
    shared: int
    grid: tuple[int, int, int]

    @classmethod
    def of(cls, chain: ChainArgs, layout: Layout) -> "_Tiles":
        batch, channels, pixels = layout.size
        width = channels if chain.norm_eps is not None else min(channels, WIDTH)
        rows, shared = _tile(width)
        tokens = batch * pixels
        blocks = ceil_div(tokens, rows) * ceil_div(channels, width)
        return cls(tokens, rows, width, shared, (blocks, 1, 1))


def _values(launch: Launcher, chain: ChainArgs, layout: Layout) -> Tensor:
    """What is quantized, in the order of its codes."""
    y = torch.empty(chain.size, dtype=torch.float32, device=chain.x.device)
    tiles = _Tiles.of(chain, layout)
    launch(
        OP,
        "qmir_chain_values",
        tiles.grid,
        (SUM_THREADS, 1, 1),
        (*_operands(chain, layout), y, int(layout.channels_first), *tiles[:3], *_norm(chain)),
        shared=tiles.shared,
    )
    return y


def _from_moments(launch: Launcher, chain: ChainArgs, layout: Layout, moments: Tensor) -> Result:
    codes, step, shift = _empty(chain)
    groups = chain.groups
    count, samples = codes.numel() // groups, layout.size[0] // groups
    levels, *limits = _grid_limits(chain)
    weights = dense(chain.scale_weights), dense(chain.shift_weights)
    launch_steps(launch, moments, chain.moments_channels, weights, (step, shift), count, levels)
    results = (*_operands(chain, layout), step, shift, codes, int(layout.channels_first))
    block = SUM_THREADS, 1, 1
    if _follows_memory(layout):
        chunks = ceil_div(count, CHUNK)
        args = (*results, samples, count, chunks, *limits)
        launch(OP, "qmir_chain_codes", (groups * chunks, 1, 1), block, args)
    else:
        tiles = _Tiles.of(chain, layout)
        args = (*results, *tiles[:3], samples, *limits)
        launch(OP, "qmir_chain_tile_codes", tiles.grid, block, args, shared=tiles.shared)
    return codes, step, shift


@cuda_kernel(OP, chain_quantize_ref)
def launch_chain_quantize(launch: Launcher, *args: Any) -> Result:
    """Start the kernels of `qmir::chain_quantize`; NaN for a group that is not finite.

    Args:
        launch: starts the kernels.
        args: operands of the operator.
    """
    chain = ChainArgs(*args)
    check_device(OP, *(a for a in args if isinstance(a, Tensor)))
    check_chain(chain)
    layout = lay_out(chain)
    if layout is None:
        return chain_quantize_ref(*args)
    if chain.moments is not None:
        return _from_moments(launch, chain, layout, chain.moments)
    fits = layout.size[1] <= LONGEST_ROW
    if chain.norm_eps is not None and not fits:
        return chain_quantize_ref(*args)
    if chain.statistics == "token" and fits:
        return _tokens(launch, chain, layout)
    if chain.statistics != "token" and chain.norm_eps is None and _follows_memory(layout):
        return _in_place(launch, chain, layout)
    y = _values(launch, chain, layout)
    rows = y.flatten(0, -2) if chain.statistics == "token" else y
    limits = chain.quant_min, chain.quant_max
    found = launch_dls_qparams(
        launch, rows, chain.scale_weights, chain.shift_weights, *limits,
        chain.statistics == "tensor", chain.cap,
    )  # fmt: skip
    return launch_dls_quantize(launch, rows, *found, *limits).view(y.shape), *found
