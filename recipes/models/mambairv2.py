"""MambaIRv2: window attention and an attentive state-space scan in every layer.

State-dict keys, shapes and initialisation are the published ones, so published checkpoints load.

Shapes: B batch, C embedding channels, H, W height and width of the input image, s scale.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.models.mambairv2_parts import ASSM, ROUTINGS, ConvFFN, GatedMLP
from qmir_ao.recipes.models.skeleton import check_depths, check_ends, init_linear
from qmir_ao.recipes.models.windows import (
    WindowedNet,
    bias_table,
    check_windows,
    relative_positions,
    window_attention,
)

_LIGHT: dict[str, Any] = {
    "upsampler": "pixelshuffledirect",
    "embed_dim": 48,
    "d_state": 8,
    "depths": (5,) * 4,
    "heads": (4,) * 4,
    "inner_rank": 32,
    "num_tokens": 64,
    "mlp_ratio": 1.0,
    "gated": True,
}
_SUPER: dict[str, Any] = {"upsampler": "pixelshuffle"}
_SMALL: dict[str, Any] = {**_SUPER, "embed_dim": 132, "depths": (4,) * 6, "heads": (4,) * 6}
_LARGE: dict[str, Any] = {**_SUPER, "depths": (6,) * 9, "heads": (6,) * 9}

CONFIGS: dict[str, dict[str, Any]] = {
    **{f"mambairv2-light-x{s}": {**_LIGHT, "scale": s} for s in (2, 3, 4)},
    **{f"mambairv2-small-x{s}": {**_SMALL, "scale": s} for s in (2, 3, 4)},
    **{f"mambairv2-x{s}": {**_SUPER, "scale": s} for s in (2, 3, 4)},
    **{f"mambairv2-large-x{s}": {**_LARGE, "scale": s} for s in (2, 3, 4)},
    "mambairv2-denoise": {},
    "mambairv2-jpeg": {"in_channels": 1},
}
"""Name to the arguments of `MambaIRv2`; all are the published settings."""

LAYER_SCALE = 1e-4
"""Initial weight of the skip connections around both halves of a layer."""


class WindowAttention(nn.Module):
    """Attention within windows on queries, keys and values: (B, H, W, 3C) -> (B, H, W, C)."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.channels, self.window = channels, window
        self.relative_position_bias_table = bias_table(window, heads)
        self.proj = nn.Linear(channels, channels)

    def forward(self, qkv: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Attend; the windows are shifted where a mask is given."""
        bias = self.relative_position_bias_table[positions]
        y: Tensor = self.proj(window_attention(qkv, self.channels, self.window, bias, mask))
        return y


class AttentiveLayer(nn.Module):
    """Window attention, then the attentive scan, each with a feed-forward network.

    Args:
        channels: C.
        heads: attention heads.
        window: window size.
        shifted: whether the windows are shifted by half their size.
        d_state: states per inner channel of the scan.
        inner_rank: rank of the embedding of the routing tokens.
        num_tokens: routing tokens.
        mlp_ratio: inner channels of the scan and of the feed-forward networks over C.
        gated: the feed-forward network of the light variant.
        routing: see `ASSM`.

    Shape:
        input (B, H, W, C), output (B, H, W, C).
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        window: int,
        shifted: bool,
        *,
        d_state: int,
        inner_rank: int,
        num_tokens: int,
        mlp_ratio: float,
        gated: bool,
        routing: str,
    ) -> None:
        super().__init__()
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)
        self.norm4 = nn.LayerNorm(channels)
        self.scale1 = nn.Parameter(torch.full((channels,), LAYER_SCALE))
        self.scale2 = nn.Parameter(torch.full((channels,), LAYER_SCALE))
        self.wqkv = nn.Linear(channels, 3 * channels)
        self.win_mhsa = WindowAttention(channels, heads, window)
        self.assm = ASSM(channels, d_state, num_tokens, inner_rank, mlp_ratio, routing)
        feed_forward = GatedMLP if gated else ConvFFN
        self.convffn1 = feed_forward(channels, int(channels * mlp_ratio))
        self.convffn2 = feed_forward(channels, int(channels * mlp_ratio))
        self.embeddingA = nn.Embedding(inner_rank, d_state)
        nn.init.uniform_(self.embeddingA.weight, -1 / inner_rank, 1 / inner_rank)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Run the layer; see the class for shapes."""
        qkv = self.wqkv(self.norm1(x))
        y = self.win_mhsa(qkv, mask if self.shifted else None, positions) + x
        y = self.convffn1(self.norm2(y)) + y
        x = x * self.scale1 + y
        y = self.assm(self.norm3(x), self.embeddingA.weight) + x
        y = y + self.convffn2(self.norm4(y))
        out: Tensor = x * self.scale2 + y
        return out


class LayerSequence(nn.Module):
    """The layers of one group under the published name `layers`."""

    def __init__(self, layers: Sequence[AttentiveLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Run all layers on (B, H, W, C)."""
        for layer in self.layers:
            x = layer(x, mask, positions)
        return x


class ResidualGroup(nn.Module):
    """Layers, a 3x3 convolution and a skip connection: (B, H, W, C) -> same."""

    def __init__(self, layers: Sequence[AttentiveLayer], channels: int) -> None:
        super().__init__()
        self.residual_group = LayerSequence(layers)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Run the group; see the class for shapes."""
        y = self.conv(self.residual_group(x, mask, positions).permute(0, 3, 1, 2))
        out: Tensor = x + y.permute(0, 2, 3, 1)
        return out


class MambaIRv2(WindowedNet):
    """MambaIRv2 network.

    Args:
        scale: enlargement; 2, 3 or 4 with an upsampler, 1 without.
        upsampler: "pixelshuffle" (classic), "pixelshuffledirect" (light) or "" (residual image).
        embed_dim: channels of the body.
        depths: layers of each group; every second layer has shifted windows.
        heads: attention heads of each group; they divide `embed_dim`.
        window: window size; images are mirrored to a multiple of it, and cropped again.
        d_state: states per inner channel of the scans.
        inner_rank: rank of the embedding of the routing tokens.
        num_tokens: routing tokens.
        mlp_ratio: inner channels of scans and feed-forward networks over `embed_dim`.
        gated: the feed-forward network of the light variant.
        in_channels: 3 for RGB, 1 for grey images.
        routing: "gumbel" (tokens are sampled while training, as published) or "argmax". In
            evaluation and in captured graphs it is always the argmax: results are deterministic,
            unlike those of the published code.

    Shape:
        input (B, in_channels, H, W) with values in [0, 1], output (B, in_channels, s*H, s*W).

    Raises:
        ConfigError: a setting is out of its allowed range.

    Source: Guo et al. 2024; parameter names and shapes are the published ones.
    """

    relative_position_index_SA: Tensor

    def __init__(
        self,
        *,
        scale: int = 1,
        upsampler: str = "",
        embed_dim: int = 174,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        window: int = 16,
        d_state: int = 16,
        inner_rank: int = 64,
        num_tokens: int = 128,
        mlp_ratio: float = 2.0,
        gated: bool = False,
        in_channels: int = 3,
        routing: str = "gumbel",
    ) -> None:
        depths, heads = tuple(depths), tuple(heads)
        check_ends("MambaIRv2", scale, upsampler, in_channels)
        check_depths("MambaIRv2", depths)
        check_windows("MambaIRv2", embed_dim, depths, heads, window)
        if routing not in ROUTINGS:
            raise ConfigError(f"MambaIRv2: routing must be one of {ROUTINGS}, got {routing!r}")
        super().__init__(scale, upsampler, window, repeat_edge=True)
        settings: dict[str, Any] = {
            "d_state": d_state,
            "inner_rank": inner_rank,
            "num_tokens": num_tokens,
            "mlp_ratio": mlp_ratio,
            "gated": gated,
            "routing": routing,
        }
        self._build_start(embed_dim, in_channels)
        self.register_buffer("relative_position_index_SA", relative_positions(window))
        groups = []
        for depth, count in zip(depths, heads, strict=True):
            layers = [
                AttentiveLayer(embed_dim, count, window, bool(index % 2), **settings)
                for index in range(depth)
            ]
            groups.append(ResidualGroup(layers, embed_dim))
        self.layers = nn.ModuleList(groups)
        self._build_end(embed_dim, in_channels)
        self.apply(init_linear)

    def run_layer(self, layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        """One group of the body: (B, H, W, C) -> same."""
        y: Tensor = layer(x, mask, self.relative_position_index_SA)
        return y
