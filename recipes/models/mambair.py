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

RGB_MEAN = (0.4488, 0.4371, 0.4040)
UPSAMPLERS = ("pixelshuffle", "pixelshuffledirect", "")
HEAD_CHANNELS = 64
"""Channels of the `pixelshuffle` head."""


class DropPath(nn.Module):
    """Drop a residual branch for whole samples while training (stochastic depth)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        # nn.Dropout switches off by itself in eval(), also inside a captured graph.
        self.dropout = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return x, or zeros for dropped samples; survivors are scaled by 1 / (1 - rate)."""
        if self.rate == 0.0:
            return x
        b, _, _, _ = x.shape
        kept: Tensor = x * self.dropout(x.new_ones((b, 1, 1, 1)))
        return kept


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


class PatchEmbed(nn.Module):
    """Norm of the embedding; the name holds the published key `patch_embed.norm`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, H, W, C) over channels."""
        y: Tensor = self.norm(x)
        return y


def shuffle_layers(channels: int, scale: int) -> list[nn.Module]:
    """Convolutions and pixel shuffles that enlarge (B, channels, H, W) by `scale`."""
    if scale == 3:
        return [nn.Conv2d(channels, 9 * channels, 3, padding=1), nn.PixelShuffle(3)]
    layers: list[nn.Module] = []
    for _ in range({2: 1, 4: 2}[scale]):
        layers += [nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2)]
    return layers


class MambaIR(nn.Module):
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

    mean: Tensor

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
        super().__init__()
        _check(scale, upsampler, embed_dim, depths, in_channels, drop_path_rate)
        self.scale, self.upsampler = scale, upsampler
        mean = RGB_MEAN if in_channels == 3 else (0.0,)
        # Published checkpoints do not hold the mean.
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(in_channels, embed_dim, 3, padding=1)
        self.patch_embed = PatchEmbed(embed_dim)
        light = upsampler == "pixelshuffledirect"
        total = sum(depths)
        rates = iter([drop_path_rate * index / max(total - 1, 1) for index in range(total)])
        groups = []
        for depth in depths:
            blocks = [
                VSSBlock(embed_dim, d_state, expand, light, next(rates)) for _ in range(depth)
            ]
            groups.append(ResidualGroup(blocks, embed_dim))
        self.layers = nn.ModuleList(groups)
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self._build_head(embed_dim, in_channels)
        self.apply(_init_linear)

    def _build_head(self, embed_dim: int, out_channels: int) -> None:
        if self.upsampler == "pixelshuffledirect":
            factor = self.scale**2
            self.upsample = nn.Sequential(
                nn.Conv2d(embed_dim, factor * out_channels, 3, padding=1),
                nn.PixelShuffle(self.scale),
            )
            return
        last = embed_dim
        if self.upsampler == "pixelshuffle":
            last = HEAD_CHANNELS
            self.conv_before_upsample = nn.Sequential(
                nn.Conv2d(embed_dim, last, 3, padding=1), nn.LeakyReLU()
            )
            self.upsample = nn.Sequential(*shuffle_layers(last, self.scale))
        self.conv_last = nn.Conv2d(last, out_channels, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        """Groups and final norm on the embedding (B, C, H, W)."""
        y = self.patch_embed(x.permute(0, 2, 3, 1))
        for layer in self.layers:
            y = layer(y)
        normed: Tensor = self.norm(y)
        return normed.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Restore a batch of images; see the class for shapes."""
        x = x - self.mean
        shallow = self.conv_first(x)
        deep = self.conv_after_body(self.body(shallow)) + shallow
        if self.upsampler == "pixelshuffledirect":
            y = self.upsample(deep)
        elif self.upsampler == "pixelshuffle":
            y = self.conv_last(self.upsample(self.conv_before_upsample(deep)))
        else:
            y = x + self.conv_last(deep)
        out: Tensor = y + self.mean
        return out


def _check(
    scale: int,
    upsampler: str,
    embed_dim: int,
    depths: Sequence[int],
    in_channels: int,
    drop_path_rate: float,
) -> None:
    if upsampler not in UPSAMPLERS:
        raise ConfigError(f"MambaIR: upsampler must be one of {UPSAMPLERS}, got {upsampler!r}")
    allowed = (2, 3, 4) if upsampler else (1,)
    if scale not in allowed:
        raise ConfigError(
            f"MambaIR: scale must be one of {allowed} with upsampler {upsampler!r}, got {scale!r}"
        )
    if embed_dim < 30:
        raise ConfigError(
            f"MambaIR: embed_dim must be at least 30 (channel attention divides it by 30), "
            f"got {embed_dim!r}"
        )
    if not depths or min(depths) < 1:
        raise ConfigError(f"MambaIR: depths must be positive block counts, got {depths!r}")
    if in_channels not in (1, 3):
        raise ConfigError(f"MambaIR: in_channels must be 1 or 3, got {in_channels!r}")
    if not 0.0 <= drop_path_rate < 1.0:
        raise ConfigError(f"MambaIR: drop_path_rate must be in [0, 1), got {drop_path_rate!r}")


def _init_linear(module: nn.Module) -> None:
    # x_proj and dt_projs are bare parameters and keep the initialisation of SS2D.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
