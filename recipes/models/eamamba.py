"""EAMamba: eight scans, each on an eighth of the channels, in a plain body (SR) or a U-Net.

State-dict keys, shapes and initialisation are the published ones, so published checkpoints load.
The diagonal scan order is computed from the size of each level: `torch.export` with dynamic batch,
height and width and `torch.fx.symbolic_trace` both capture the networks.

Shapes: B batch, C channels, H, W height and width of an image or a level, s scale.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.models.eamamba_scan import HEADS, MultiHeadScan, Orders, diagonal_orders
from qmir_ao.recipes.models.skeleton import check_depths, shuffle_layers
from qmir_ao.recipes.models.unet import MULTIPLE, ChannelNorm, UNetBody, check_levels
from qmir_ao.recipes.models.windows import crop, pad_mirrored

_LIGHT: dict[str, Any] = {"dim": 64, "depths": (4,) * 4, "d_state": 10, "ffn_ratio": 1.0}

SR_CONFIGS: dict[str, dict[str, Any]] = {
    f"eamamba-light-x{s}": {**_LIGHT, "scale": s} for s in (2, 3, 4)
}
"""Name to the arguments of `EAMambaSR`; all are the published settings."""
UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "eamamba-denoise": {"dim": 64, "depths": (4, 6, 6, 7), "refinement": 2},
}
"""Name to the arguments of `EAMamba`; the published settings."""
CONFIGS = {**SR_CONFIGS, **UNET_CONFIGS}
"""Both."""


class GatedFeedForward(nn.Module):
    """Two pointwise convolutions with a product of halves between: (B, C, H, W) -> same.

    Source: EAMamba, `SimpleFFN`.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.project_in = nn.Conv2d(channels, hidden, 1, bias=False)
        self.project_out = nn.Conv2d(hidden // 2, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers; see the class for shapes."""
        gate, value = self.project_in(x).chunk(2, dim=1)
        y: Tensor = self.project_out(gate * value)
        return y


class ScanBlock(nn.Module):
    """Scan and feed-forward, each after a norm and with a skip: (B, C, H, W) -> same."""

    def __init__(self, channels: int, d_state: int, ratio: float) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.mamba = MultiHeadScan(channels, d_state)
        self.norm2 = ChannelNorm(channels)
        self.ffn = GatedFeedForward(channels, ratio)

    def forward(self, x: Tensor, orders: Orders) -> Tensor:
        """Run the block; see the class for shapes."""
        y = self.mamba(self.norm1(x).permute(0, 2, 3, 1), orders)
        x = x + y.permute(0, 3, 1, 2)
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


class BlockSequence(nn.ModuleList):
    """Blocks on one size of image, which share the scan order: (B, C, H, W) -> same."""

    def __init__(self, count: int, channels: int, d_state: int, ratio: float) -> None:
        super().__init__(ScanBlock(channels, d_state, ratio) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks; see the class for shapes."""
        orders = diagonal_orders(x)
        for block in self:
            x = block(x, orders)
        return x


class ResidualGroup(nn.Module):
    """Blocks, a 3x3 convolution and a skip connection: (B, C, H, W) -> same."""

    def __init__(self, blocks: BlockSequence, channels: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Run the group; see the class for shapes."""
        y: Tensor = self.conv(self.blocks(x))
        return x + y


class EAMambaSR(nn.Module):
    """EAMamba for lightweight super-resolution.

    Args:
        scale: enlargement; 2, 3 or 4.
        dim: channels of the body, a multiple of 8.
        depths: blocks of each group.
        d_state: states per channel of the scans.
        ffn_ratio: hidden channels of the feed-forward layers are `int(ffn_ratio * dim)`.
        in_channels: 3 for RGB, 1 for grey images.

    Shape:
        input (B, in_channels, H, W) with values in [0, 1], output (B, in_channels, s*H, s*W).

    Raises:
        ConfigError: a setting is out of its allowed range.

    Source: EAMamba, `EAMambaSR`; key names are the published ones.
    """

    def __init__(
        self,
        *,
        scale: int = 2,
        dim: int = 64,
        depths: Sequence[int] = (4, 4, 4, 4),
        d_state: int = 10,
        ffn_ratio: float = 1.0,
        in_channels: int = 3,
    ) -> None:
        _check("EAMambaSR", dim, ffn_ratio)
        check_depths("EAMambaSR", tuple(depths))
        if scale not in (2, 3, 4):
            raise ConfigError(f"EAMambaSR: scale must be one of (2, 3, 4), got {scale!r}")
        super().__init__()
        self.scale = scale
        self.conv_first = nn.Conv2d(in_channels, dim, 3, padding=1, bias=False)
        self.layers = nn.Sequential(
            *(ResidualGroup(BlockSequence(d, dim, d_state, ffn_ratio), dim) for d in depths)
        )
        self.norm = ChannelNorm(dim)
        self.conv_after_body = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.LeakyReLU())
        self.upsample = nn.Sequential(*shuffle_layers(dim, scale))
        self.conv_last = nn.Conv2d(dim, in_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge a batch of images; see the class for shapes."""
        shallow = self.conv_first(x)
        deep = self.conv_after_body(self.norm(self.layers(shallow))) + shallow
        y: Tensor = self.conv_last(self.upsample(self.conv_before_upsample(deep)))
        return y


class EAMamba(UNetBody):
    """EAMamba for denoising.

    Images of any size are continued by mirroring to multiples of 8 and the output is cropped.

    Args:
        dim: channels of the first level, a multiple of 8.
        depths: blocks of each of the four levels.
        refinement: blocks after the last level.
        d_state: states per channel of the scans.
        ffn_ratio: hidden channels of the feed-forward layers are `int(ffn_ratio * channels)`.
        in_channels: 3 for RGB, 1 for grey images.

    Shape:
        input (B, in_channels, H, W) with values in [0, 1], output of the same shape.

    Raises:
        ConfigError: a setting is out of its allowed range.

    Source: EAMamba, `EAMamba`; key names are the published ones.
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        depths: Sequence[int] = (4, 6, 6, 7),
        refinement: int = 2,
        d_state: int = 16,
        ffn_ratio: float = 2.0,
        in_channels: int = 3,
    ) -> None:
        _check("EAMamba", dim, ffn_ratio)
        check_levels("EAMamba", dim, depths, refinement)
        super().__init__()
        self.scale = 1

        def level(count: int, channels: int) -> nn.Module:
            return BlockSequence(count, channels, d_state, ffn_ratio)

        self._build_body(level, in_channels, dim, depths, refinement)
        self.output = nn.Conv2d(2 * dim, in_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Restore a batch of images; see the class for shapes."""
        _, _, h, w = x.shape
        padded = pad_mirrored(x, MULTIPLE, repeat_edge=False)
        return crop(self.output(self.features(padded)) + padded, h, w)


def _check(owner: str, dim: int, ffn_ratio: float) -> None:
    if dim < HEADS or dim % HEADS:
        raise ConfigError(f"{owner}: dim must be a multiple of {HEADS} channels, got {dim!r}")
    if int(dim * ffn_ratio) < 2 or int(dim * ffn_ratio) % 2:
        raise ConfigError(
            f"{owner}: ffn_ratio * dim must be an even number of channels, got "
            f"{ffn_ratio!r} * {dim!r}"
        )
