"""MaIR: super-resolution and denoising by scans along nested S-shaped stripes.

State-dict keys, shapes and initialisation are the published ones, so published checkpoints load.
The scan orders are computed from the image's size once in a forward: `torch.export` with dynamic
batch, height and width and `torch.fx.symbolic_trace` both capture the network.

Shapes: B batch, C embedding channels, D inner channels, H, W height and width, L = H*W,
K = 4 sequences, s scale.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.models.grouped_scan import GroupedScan
from qmir_ao.recipes.models.mair_scan import scan_orders
from qmir_ao.recipes.models.skeleton import (
    DropPath,
    RestorationNet,
    check_depths,
    check_ends,
    drop_path_rates,
    init_linear,
)
from qmir_ao.recipes.models.ss2d import K

_LIGHT: dict[str, Any] = {
    "upsampler": "pixelshuffledirect",
    "embed_dim": 60,
    "depths": (6,) * 4,
    "mlp_ratio": 1.6,
}
_TINY_LIGHT = {**_LIGHT, "d_state": 1, "expand": 1.1, "stripe": 8}
_SMALL_LIGHT = {**_LIGHT, "d_state": 16, "expand": 1.4, "stripe": 4}
_CLASSIC: dict[str, Any] = {"embed_dim": 180, "depths": (6,) * 6, "d_state": 16}
_SUPER = {**_CLASSIC, "upsampler": "pixelshuffle", "expand": 2.0, "mlp_ratio": 2.5, "stripe": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    **{f"mair-tiny-light-x{s}": {**_TINY_LIGHT, "scale": s} for s in (2, 3, 4)},
    **{f"mair-small-light-x{s}": {**_SMALL_LIGHT, "scale": s} for s in (2, 3, 4)},
    **{f"mair-x{s}": {**_SUPER, "scale": s} for s in (2, 3, 4)},
    "mair-denoise": {**_CLASSIC, "expand": 1.3, "mlp_ratio": 2.0, "stripe": 4},
}
"""Name to the arguments of `MaIR`; all are the published settings."""

Orders = tuple[Tensor, Tensor]
"""The pixel at each place of the sequences, and the place of each pixel: both (K, L)."""


class SequenceGate(nn.Module):
    """A factor for each channel of each sequence, from the means of its twins in all sequences.

    Shape:
        input (B, K*D, H, W), output (B, K*D, 1, 1).

    Source: MaIR, `ShuffleAttn`; key names are the published ones.
    """

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.inner = inner
        total = K * inner
        self.gating = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(total, total, 1, groups=inner), nn.Sigmoid()
        )

    def forward(self, y: Tensor) -> Tensor:
        """Return the gate; see the class for shapes."""
        # The published code reorders whole maps before it takes their means; the means suffice.
        means = self.gating[0](y).reshape(-1, K, self.inner).transpose(1, 2)
        gate = self.gating[2](self.gating[1](means.reshape(-1, K * self.inner, 1, 1)))
        back: Tensor = gate.reshape(-1, self.inner, K).transpose(1, 2)
        return back.reshape(-1, K * self.inner, 1, 1)


class StripeScan(GroupedScan):
    """Gated selective scan of a channels-last image along four orders.

    Args:
        channels: channels of input and output.
        d_state: states per inner channel.
        expand: inner channels are `int(expand * channels)`.

    Shape:
        input (B, H, W, C), output (B, H, W, C).

    Source: MaIR, `VMM`; parameter names and shapes are the published ones.
    """

    def __init__(self, channels: int, d_state: int, expand: float) -> None:
        super().__init__()
        inner = int(expand * channels)
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.act = nn.SiLU()
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self.gating = SequenceGate(inner)
        self.add_scan(K, inner, math.ceil(channels / 16), d_state)

    def scan(self, x: Tensor, orders: Orders) -> Tensor:
        """Scan x (B, D, H, W) along all orders; the results, each in place, as (B, K*D, H, W)."""
        b, d, h, w = x.shape
        pixels, places = orders
        select = torch.ops.aten.index_select
        xs = select(x.reshape(b, d, h * w), 2, pixels.reshape(-1)).reshape(b, d, K, h * w)
        xs = xs.transpose(1, 2).reshape(b, K * self.sizes.inner, h * w)
        ys = self.scan_sequences(xs, b, h * w).chunk(K, dim=1)
        maps = [select(ys[k], 2, places[k]) for k in range(K)]
        return torch.cat(maps, dim=1).reshape(b, K * self.sizes.inner, h, w)

    def forward(self, x: Tensor, orders: Orders) -> Tensor:
        """Scan a channels-last image; see the class for shapes."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = self.scan(self.act(self.conv2d(x.permute(0, 3, 1, 2))), orders)
        first, second, third, fourth = (y * self.gating(y)).chunk(K, dim=1)
        y = self.out_norm((first + second + third + fourth).permute(0, 2, 3, 1))
        out: Tensor = self.out_proj(y * F.silu(z))
        return out


class Mlp(nn.Module):
    """Two linear layers with GELU between them: (B, H, W, C) -> same."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Run both layers."""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class ResidualBlock(nn.Module):
    """Scan branch and MLP branch, each with a learned skip scale: (B, H, W, C) -> same."""

    def __init__(
        self, channels: int, d_state: int, expand: float, mlp_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels)
        self.self_attention = StripeScan(channels, d_state, expand)
        self.drop_path = DropPath(drop_path)
        self.skip_scale = nn.Parameter(torch.ones(channels))
        self.conv_blk = Mlp(channels, int(channels * mlp_ratio))
        self.ln_2 = nn.LayerNorm(channels)
        self.skip_scale2 = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, orders: Orders) -> Tensor:
        """Run the block; see the class for shapes."""
        x = x * self.skip_scale + self.drop_path(self.self_attention(self.ln_1(x), orders))
        out: Tensor = x * self.skip_scale2 + self.conv_blk(self.ln_2(x))
        return out


class BlockSequence(nn.Module):
    """The blocks of one group; every second one scans the shifted stripes."""

    def __init__(self, blocks: Sequence[ResidualBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, plain: Orders, shifted: Orders) -> Tensor:
        """Run all blocks on (B, H, W, C)."""
        for index, block in enumerate(self.blocks):
            x = block(x, shifted if index % 2 else plain)
        return x


class ResidualGroup(nn.Module):
    """Blocks, a 3x3 convolution and a skip connection: (B, H, W, C) -> same."""

    def __init__(self, blocks: Sequence[ResidualBlock], channels: int) -> None:
        super().__init__()
        self.residual_group = BlockSequence(blocks)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, plain: Orders, shifted: Orders) -> Tensor:
        """Run the group; see the class for shapes."""
        y = self.conv(self.residual_group(x, plain, shifted).permute(0, 3, 1, 2))
        out: Tensor = x + y.permute(0, 2, 3, 1)
        return out


class MaIR(RestorationNet):
    """MaIR network.

    Args:
        scale: enlargement; 2, 3 or 4 with an upsampler, 1 without.
        upsampler: "pixelshuffle" (classic), "pixelshuffledirect" (light) or "" (residual image).
        embed_dim: channels of the body.
        depths: blocks of each group.
        d_state: states per inner channel of the scans.
        expand: inner channels of the scans are `int(expand * embed_dim)`.
        mlp_ratio: hidden channels of the MLPs are `int(mlp_ratio * embed_dim)`.
        stripe: columns of a scan stripe; shifted stripes begin at half of it.
        in_channels: 3 for RGB, 1 for grey images.
        drop_path_rate: highest stochastic depth rate, linear over the blocks.

    Shape:
        input (B, in_channels, H, W) with values in [0, 1], output (B, in_channels, s*H, s*W).

    Raises:
        ConfigError: a setting is out of its allowed range.

    Source: MaIR, `MaIR`; key names are the published ones.
    """

    def __init__(
        self,
        *,
        scale: int = 1,
        upsampler: str = "",
        embed_dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        d_state: int = 16,
        expand: float = 2.0,
        mlp_ratio: float = 2.0,
        stripe: int = 8,
        in_channels: int = 3,
        drop_path_rate: float = 0.1,
    ) -> None:
        check_ends("MaIR", scale, upsampler, in_channels)
        check_depths("MaIR", tuple(depths), drop_path_rate)
        if stripe < 2:
            raise ConfigError(f"MaIR: stripe must be at least 2 columns, got {stripe!r}")
        super().__init__(scale, upsampler)
        self.stripe = stripe
        self._build_start(embed_dim, in_channels)
        rates = iter(drop_path_rates(drop_path_rate, tuple(depths)))
        groups = []
        for depth in depths:
            blocks = [
                ResidualBlock(embed_dim, d_state, expand, mlp_ratio, next(rates))
                for _ in range(depth)
            ]
            groups.append(ResidualGroup(blocks, embed_dim))
        self.layers = nn.ModuleList(groups)
        self._build_end(embed_dim, in_channels)
        self.apply(init_linear)

    def groups(self, x: Tensor) -> Tensor:
        """All groups of the body: (B, H, W, C) -> same."""
        image = x.permute(0, 3, 1, 2)
        plain = scan_orders(image, self.stripe, 0)
        shifted = scan_orders(image, self.stripe, self.stripe // 2)
        for layer in self.layers:
            x = layer(x, plain, shifted)
        return x
