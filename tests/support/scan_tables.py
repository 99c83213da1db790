"""The reference's table of decays in the layout of the CUDA kernels, and mutated kernel sources."""

import re
from pathlib import Path

import torch
from torch import Tensor

from qmir_ao.backend.cuda import sources
from qmir_ao.backend.cuda.scan_q import Variant
from qmir_ao.ops.selective_scan_q import ScanArgs, scan_table

LANES = 32


def kernel_table(scan: ScanArgs, kind: Variant) -> Tensor:
    """float32 (G, K, blocks, codes, row * 32); operands in the shapes of the plain scan.

    A row holds its values of 32 channels in fours, channel after channel, then what is left over
    value by value; delta is the last value.
    """
    groups = scan.B.shape[1]
    delta, *decays = scan_table(scan).unbind(-1)
    values = torch.stack([*decays[: kind.row - 1], delta], dim=-1)
    values = values.unflatten(1, (groups, -1))
    missing = -values.shape[2] % LANES
    values = torch.nn.functional.pad(values, (0, 0, 0, 0, 0, missing))
    values = values.unflatten(2, (-1, LANES)).transpose(3, 4)  # G, K, blocks, codes, lanes, values
    fours = kind.row // 4 * 4
    quads = values[..., :fours].unflatten(-1, (-1, 4)).transpose(-3, -2).flatten(-3)
    rest = values[..., fours:].transpose(-1, -2).flatten(-2)
    return torch.cat([quads, rest], dim=-1).contiguous()


def from_kernel_table(table: Tensor, channels: int, kind: Variant) -> Tensor:
    """A kernel's table as (G, E, codes, values), delta last; the inverse of `kernel_table`."""
    fours = kind.row // 4 * 4 * LANES
    quads = table[..., :fours].unflatten(-1, (-1, LANES, 4)).transpose(-3, -2).flatten(-2)
    rest = table[..., fours:].unflatten(-1, (-1, LANES)).transpose(-1, -2)
    values = torch.cat([quads, rest], dim=-1).transpose(3, 4).flatten(2, 3)
    return values[:, :, : channels // table.shape[1]].flatten(1, 2)


def mutated(folder: Path, source: str, pattern: str, replacement: str) -> Path:
    """`folder` with a copy of a kernel source in which every match of `pattern` is replaced."""
    text, count = re.subn(pattern, replacement, sources.read(source))
    assert count, f"{source}.cu has nothing like {pattern}"
    (folder / f"{source}.cu").write_text(text)
    return folder
