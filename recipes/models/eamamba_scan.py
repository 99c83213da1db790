"""Scans of EAMamba: eight sequences, each on an eighth of the channels, put together again.

Four heads read the image by diagonals, from each of its corners; four read rows and columns, from
both ends. The diagonal order is computed from the sizes of a tensor by tensor arithmetic alone:
both `torch.export` with dynamic height and width and `torch.fx.symbolic_trace` capture it, on any
device.

Shapes: B batch, C channels, D inner channels, H, W height and width, L = H*W.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmir_ao.recipes.models.grouped_scan import GroupedScan

HEADS = 8
"""Scans: four along diagonals, four along rows and columns."""

Orders = tuple[Tensor, Tensor]
"""The pixel at each place of the diagonal sequence, and the place of each pixel: both (L,)."""


def diagonal_orders(x: Tensor) -> Orders:
    """Orders of the sequence that reads images x (B, C, H, W) by diagonals, from top to bottom."""
    _, _, h, _ = x.shape
    # A running sum of ones instead of arange: it follows the device of x in captured graphs too.
    ones = torch.ones_like(x[0, 0], dtype=torch.int64)
    rows = torch.ops.aten.cumsum(ones, 0) - 1
    columns = torch.ops.aten.cumsum(ones, 1) - 1
    pixels = torch.ops.aten.argsort(((rows + columns) * h + rows).reshape(-1))
    return pixels, torch.ops.aten.argsort(pixels)


def _flipped(x: Tensor) -> list[Tensor]:
    """Four heads of (B, 4*D, H, W), each turned to begin in another corner; its own inverse."""
    first, second, third, fourth = x.chunk(HEADS // 2, dim=1)
    return [first, second.flip(2, 3), third.flip(3), fourth.flip(2)]


def _turned(x: Tensor) -> Tensor:
    """The transpose of (B, D, H, W), read from its end; its own inverse."""
    return x.transpose(2, 3).flip(2, 3)


class MultiHeadScan(GroupedScan):
    """Gated selective scans of a channels-last image, each on its share of the channels.

    Args:
        channels: channels of input and output, a multiple of 8.
        d_state: states per channel.

    Shape:
        input (B, H, W, C), output (B, H, W, C).

    Source: EAMamba, `ExtendedMamba` and `ScanTransform` (diagonal, 8 scans, concatenated);
    parameter names and shapes are the published ones.
    """

    def __init__(self, channels: int, d_state: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(channels, 2 * channels, bias=False)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.act = nn.SiLU()
        self.out_norm = nn.LayerNorm(channels)
        self.out_proj = nn.Linear(channels, channels, bias=False)
        self.add_scan(HEADS, channels // HEADS, math.ceil(channels / 16), d_state)

    def scan(self, x: Tensor, orders: Orders) -> Tensor:
        """Scan x (B, D, H, W), every head in its order; the results in place, of the same shape."""
        b, _, h, w = x.shape
        pixels, places = orders
        select = torch.ops.aten.index_select
        share = self.sizes.inner
        half, length = HEADS // 2 * share, h * w
        diagonal, straight = x.chunk(2, dim=1)
        slanted = torch.cat(_flipped(diagonal), dim=1).reshape(b, half, length)
        first, second, third, fourth = straight.chunk(HEADS // 2, dim=1)
        lines = (first, second.flip(2, 3), third.transpose(2, 3), _turned(fourth))
        rows = [line.reshape(b, share, length) for line in lines]
        xs = torch.cat([select(slanted, 2, pixels), *rows], dim=1)
        slanted, straight = self.scan_sequences(xs, b, length).chunk(2, dim=1)
        slanted = select(slanted, 2, places).reshape(b, half, h, w)
        first, second, third, fourth = straight.chunk(HEADS // 2, dim=1)
        upright = [y.reshape(b, share, h, w) for y in (first, second)]
        lying = [y.reshape(b, share, w, h) for y in (third, fourth)]
        back = (upright[0], upright[1].flip(2, 3), lying[0].transpose(2, 3), _turned(lying[1]))
        return torch.cat([*_flipped(slanted), *back], dim=1)

    def forward(self, x: Tensor, orders: Orders) -> Tensor:
        """Scan a channels-last image; see the class for shapes."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = self.scan(self.act(self.conv(x.permute(0, 3, 1, 2))), orders)
        y = self.out_norm(y.permute(0, 2, 3, 1))
        out: Tensor = self.out_proj(y * F.silu(z))
        return out
