"""MambaIR (version 1): super-resolution, denoising and JPEG artifact removal.

State-dict keys, shapes and initialisation are the published ones, so published checkpoints load.
No control flow depends on tensor shapes: `torch.export` with dynamic batch, height and width and
`torch.fx.symbolic_trace` both capture the network.

Shapes: B batch, C embedding channels, H, W height and width of the input image, s scale.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.models.cab import CAB
from qmir_ao.recipes.models.skeleton import (
    DropPath,
    RestorationNet,
    check_depths,
    check_ends,
    drop_path_rates,
    init_linear,
)
from qmir_ao.recipes.models.ss2d import SS2D

_CLASSIC: dict[str, Any] = {"embed_dim": 180, "depths": (6,) * 6, "d_state": 16}
_LIGHT: dict[str, Any] = {
    "upsampler": "pixelshuffledirect",
    "embed_dim": 60,
    "depths": (6,) * 4,
    "d_state": 10,
    "expand": 1.2,
}
_TINY: dict[str, Any] = {
    "scale": 2,
    "upsampler": "pixelshuffledirect",
    # 48 channels everywhere: full SIMD registers and no waste in blocked convolutions.
    "embed_dim": 48,
    "depths": (2, 2),
    "d_state": 8,
    "expand": 1.0,
    "drop_path_rate": 0.0,
}
_SUPER = {**_CLASSIC, "upsampler": "pixelshuffle", "expand": 2.0}

CONFIGS: dict[str, dict[str, Any]] = {
    "mambair-tiny-x2": _TINY,
    **{f"mambair-light-x{s}": {**_LIGHT, "scale": s} for s in (2, 3, 4)},
    **{f"mambair-x{s}": {**_SUPER, "scale": s} for s in (2, 3, 4)},
    "mambair-denoise": {**_CLASSIC, "expand": 1.2},
    "mambair-jpeg": {**_CLASSIC, "expand": 1.2, "in_channels": 1},
}
"""Name to the arguments of `MambaIR`; all but the tiny one are the published settings."""


class VSSBlock(nn.Module):
    """Scan branch and convolution branch, each with a learned skip scale: (B, H, W, C) -> same."""

    def __init__(
        self, channels: int, d_state: int, expand: float, light: bool, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels)
        self.self_attention = SS2D(channels, d_state, expand)
        self.drop_path = DropPath(drop_path)
        self.skip_scale = nn.Parameter(torch.ones(channels))
        self.conv_blk = CAB(channels, light)
        self.ln_2 = nn.LayerNorm(channels)
        self.skip_scale2 = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block; see the class for shapes."""
        x = x * self.skip_scale + self.drop_path(self.self_attention(self.ln_1(x)))
        local = self.conv_blk(self.ln_2(x).permute(0, 3, 1, 2))
        out: Tensor = x * self.skip_scale2 + local.permute(0, 2, 3, 1)
        return out


class BlockSequence(nn.Module):
    """The blocks of one group under the published name `blocks`."""

    def __init__(self, blocks: Sequence[VSSBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks on (B, H, W, C)."""
        for block in self.blocks:
            x = block(x)
        return x


class ResidualGroup(nn.Module):
    """Blocks, a 3x3 convolution and a skip connection: (B, H, W, C) -> same."""

    def __init__(self, blocks: Sequence[VSSBlock], channels: int) -> None:
        super().__init__()
        self.residual_group = BlockSequence(blocks)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Run the group; see the class for shapes."""
        y = self.conv(self.residual_group(x).permute(0, 3, 1, 2))
        out: Tensor = x + y.permute(0, 2, 3, 1)
        return out


class MambaIR(RestorationNet):
    """MambaIR network.

    Args:
        scale: enlargement; 2, 3 or 4 with an upsampler, 1 without.
        upsampler: "pixelshuffle" (classic), "pixelshuffledirect" (light) or "" (residual image).
        embed_dim: channels of the body, at least 30 (channel attention divides it by 30).
        depths: blocks of each group.
        d_state: states per inner channel of the scans.
        expand: inner channels of the scans are `int(expand * embed_dim)`.
        in_channels: 3 for RGB, 1 for grey images.
        drop_path_rate: highest stochastic depth rate, linear over the blocks.

    Shape:
        input (B, in_channels, H, W) with values in [0, 1], output (B, in_channels, s*H, s*W).

    Raises:
        ConfigError: a setting is out of its allowed range.
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
        in_channels: int = 3,
        drop_path_rate: float = 0.1,
    ) -> None:
        _check(scale, upsampler, embed_dim, tuple(depths), in_channels, drop_path_rate)
        super().__init__(scale, upsampler)
        self._build_start(embed_dim, in_channels)
        light = upsampler == "pixelshuffledirect"
        rates = iter(drop_path_rates(drop_path_rate, tuple(depths)))
        groups = []
        for depth in depths:
            blocks = [
                VSSBlock(embed_dim, d_state, expand, light, next(rates)) for _ in range(depth)
            ]
            groups.append(ResidualGroup(blocks, embed_dim))
        self.layers = nn.ModuleList(groups)
        self._build_end(embed_dim, in_channels)
        # x_proj and dt_projs are bare parameters and keep the initialisation of SS2D.
        self.apply(init_linear)


def _check(
    scale: int,
    upsampler: str,
    embed_dim: int,
    depths: tuple[int, ...],
    in_channels: int,
    drop_path_rate: float,
) -> None:
    check_ends("MambaIR", scale, upsampler, in_channels)
    check_depths("MambaIR", depths, drop_path_rate)
    if embed_dim < 30:
        raise ConfigError(
            f"MambaIR: embed_dim must be at least 30 (channel attention divides it by 30), "
            f"got {embed_dim!r}"
        )
