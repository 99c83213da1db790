"""Two-dimensional selective scan (SS2D): four one-dimensional scans over an image, summed.

The operator is called directly and shapes are only unpacked, never tested, so that both
`torch.export` (dynamic batch, height, width) and `torch.fx.symbolic_trace` capture the module.

Shapes: B batch, H, W height and width, C channels, D inner channels, L = H*W,
N states, R rank of the delta projection, K = 4 directions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qmir_ao.ops.ss2d_scan  # noqa: F401  (defines torch.ops.qmir.ss2d_scan)
from qmir_ao.recipes.models.grouped_scan import GroupedScan

K = 4
"""Scan directions: rows, columns, and both reversed."""


class CrossScan(GroupedScan):
    """The four directional scans of an image; networks add their own projections around them."""

    def scan(self, x: Tensor) -> Tensor:
        """Sum of the four directional scans of x (B, D, H, W), as (B, D, H, W)."""
        b, _, h, w = x.shape
        _, inner, rank, states = self.sizes
        width = rank + 2 * states
        # A pixel has the same projections in whatever order a direction comes by, so the image is
        # projected once for all four: one convolution where the published code has an einsum over
        # four reordered copies.
        x_weight = self.x_proj_weight.reshape(K * width, inner, 1, 1)
        projected = F.conv2d(x, x_weight).reshape(b, K, width, h, w)
        dts, b_in, c_out = torch.split(projected, [rank, states, states], dim=2)
        dt_weight = self.dt_projs_weight.reshape(K * inner, rank, 1, 1)
        dts = F.conv2d(dts.reshape(b, K * rank, h, w), dt_weight, groups=K)
        decay = -torch.exp(self.A_logs)
        bias = self.dt_projs_bias.reshape(K * inner)
        summed: Tensor = torch.ops.qmir.ss2d_scan(x, dts, decay, b_in, c_out, self.Ds, bias, True)
        return summed


class SS2D(CrossScan):
    """Gated four-direction selective scan of a channels-last image.

    Args:
        channels: channels of input and output.
        d_state: states per inner channel.
        expand: inner channels are `int(expand * channels)`.

    Shape:
        input (B, H, W, C), output (B, H, W, C).

    Source: MambaIR, `SS2D`; parameter names and shapes are the published ones.
    """

    def __init__(self, channels: int, d_state: int, expand: float) -> None:
        super().__init__()
        inner = int(expand * channels)
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.act = nn.SiLU()
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self.add_scan(K, inner, math.ceil(channels / 16), d_state)

    def forward(self, x: Tensor) -> Tensor:
        """Scan a channels-last image; see the class for shapes."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.act(self.conv2d(x.permute(0, 3, 1, 2)))
        y = self.out_norm(self.scan(x).permute(0, 2, 3, 1))
        out: Tensor = self.out_proj(y * F.silu(z))
        return out
