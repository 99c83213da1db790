"""SwinIR: super-resolution, denoising and JPEG artifact removal by shifted-window attention.

State-dict keys and shapes are the published ones. Published files also hold `attn_mask`, the mask
at the size of the training patches: it follows from the size of the image, so it is ignored.

Shapes: B batch, C embedding channels, H, W height and width of the input image, s scale.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.models.skeleton import (
    DropPath,
    check_depths,
    check_ends,
    drop_path_rates,
    init_linear,
)
from qmir_ao.recipes.models.windows import (
    WindowedNet,
    bias_table,
    check_windows,
    relative_positions,
    window_attention,
)

_LIGHT: dict[str, Any] = {
    "upsampler": "pixelshuffledirect",
    "embed_dim": 60,
    "depths": (6,) * 4,
    "heads": (6,) * 4,
}
_SUPER: dict[str, Any] = {"upsampler": "pixelshuffle"}

CONFIGS: dict[str, dict[str, Any]] = {
    **{f"swinir-light-x{s}": {**_LIGHT, "scale": s} for s in (2, 3, 4)},
    **{f"swinir-x{s}": {**_SUPER, "scale": s} for s in (2, 3, 4)},
    "swinir-denoise": {},
    "swinir-jpeg": {"in_channels": 1, "window": 7, "img_range": 255.0},
}
"""Name to the arguments of `SwinIR`; all are the published settings."""

_DERIVED = "attn_mask"


class WindowAttention(nn.Module):
    """Multi-head attention within windows: (B, H, W, C) -> same."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.channels, self.window = channels, window
        self.relative_position_bias_table = bias_table(window, heads)
        self.register_buffer("relative_position_index", relative_positions(window))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend; the windows are shifted where a mask is given."""
        bias = self.relative_position_bias_table[self.relative_position_index]
        y = window_attention(self.qkv(x), self.channels, self.window, bias, mask)
        out: Tensor = self.proj(y)
        return out


class Mlp(nn.Module):
    """Two linear layers with GELU between them: (B, H, W, C) -> same."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers."""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class SwinBlock(nn.Module):
    """Window attention and an MLP, both residual: (B, H, W, C) -> same.

    Args:
        channels: C.
        heads: attention heads.
        window: window size.
        shifted: whether the windows are shifted by half their size.
        mlp_ratio: hidden channels of the MLP over C.
        drop_path: stochastic depth rate.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        window: int,
        shifted: bool,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Run the block; see the class for shapes."""
        x = x + self.drop_path(self.attn(self.norm1(x), mask if self.shifted else None))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.pop(prefix + _DERIVED, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class BlockSequence(nn.Module):
    """The blocks of one group under the published name `blocks`."""

    def __init__(self, blocks: Sequence[SwinBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Run all blocks on (B, H, W, C)."""
        for block in self.blocks:
            x = block(x, mask)
        return x


class ResidualGroup(nn.Module):
    """Blocks, a 3x3 convolution and a skip connection: (B, H, W, C) -> same."""

    def __init__(self, blocks: Sequence[SwinBlock], channels: int) -> None:
        super().__init__()
        self.residual_group = BlockSequence(blocks)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Run the group; see the class for shapes."""
        y = self.conv(self.residual_group(x, mask).permute(0, 3, 1, 2))
        out: Tensor = x + y.permute(0, 2, 3, 1)
        return out


class SwinIR(WindowedNet):
    """SwinIR network.

    Args:
        scale: enlargement; 2, 3 or 4 with an upsampler, 1 without.
        upsampler: "pixelshuffle" (classic), "pixelshuffledirect" (light) or "" (residual image).
        embed_dim: channels of the body.
        depths: blocks of each group; every second block has shifted windows.
        heads: attention heads of each group; they divide `embed_dim`.
        window: window size; images are reflected to a multiple of it, and cropped again.
        mlp_ratio: hidden channels of the MLPs over `embed_dim`.
        in_channels: 3 for RGB, 1 for grey images.
        img_range: the network works on values in [0, img_range].
        drop_path_rate: highest stochastic depth rate, linear over the blocks.

    Shape:
        input (B, in_channels, H, W) with values in [0, 1], output (B, in_channels, s*H, s*W).

    Raises:
        ConfigError: a setting is out of its allowed range.

    Source: Liang et al. 2021; parameter names and shapes are the published ones.
    """

    ignored_keys = (_DERIVED,)
    """Last parts of keys that published files hold and this network does not need."""

    def __init__(
        self,
        *,
        scale: int = 1,
        upsampler: str = "",
        embed_dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        window: int = 8,
        mlp_ratio: float = 2.0,
        in_channels: int = 3,
        img_range: float = 1.0,
        drop_path_rate: float = 0.1,
    ) -> None:
        depths, heads = tuple(depths), tuple(heads)
        check_ends("SwinIR", scale, upsampler, in_channels)
        check_depths("SwinIR", depths, drop_path_rate)
        check_windows("SwinIR", embed_dim, depths, heads, window)
        if img_range <= 0.0:
            raise ConfigError(f"SwinIR: img_range must be positive, got {img_range!r}")
        super().__init__(scale, upsampler, window, repeat_edge=False, img_range=img_range)
        self._build_start(embed_dim, in_channels)
        rates = iter(drop_path_rates(drop_path_rate, depths))
        groups = []
        for depth, count in zip(depths, heads, strict=True):
            blocks = [
                SwinBlock(embed_dim, count, window, bool(index % 2), mlp_ratio, next(rates))
                for index in range(depth)
            ]
            groups.append(ResidualGroup(blocks, embed_dim))
        self.layers = nn.ModuleList(groups)
        self._build_end(embed_dim, in_channels)
        self.apply(init_linear)
