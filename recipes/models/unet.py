"""The four-level U-Net that several restoration networks share; they differ in its blocks.

    patch_embed -> encoder_level1 -> 2 -> 3 -> latent -> decoder_level3 -> 2 -> 1 -> refinement

Shapes: B batch, C channels of the first level, H, W height and width of the input image.

Source: Restormer, figure 2; key names are the published ones.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmir_ao.errors import ConfigError

LEVELS = 4
MULTIPLE = 2 ** (LEVELS - 1)
"""Height and width inside the network are multiples of this."""

Level = Callable[[int, int], nn.Module]
"""Makes a level: a number of blocks on a number of channels."""


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, H, W); its keys are the published `body.*`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every pixel."""
        normed: Tensor = self.body(x.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """First convolution, under its published name: (B, I, H, W) -> (B, C, H, W)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Embed an image."""
        y: Tensor = self.proj(x)
        return y


class Downsample(nn.Module):
    """To half the size and twice the channels: (B, C, H, W) -> (B, 2C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, then move pixels to channels."""
        return F.pixel_unshuffle(self.body(x), 2)


class Upsample(nn.Module):
    """To twice the size and half the channels: (B, C, H, W) -> (B, C/2, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, then move channels to pixels."""
        return F.pixel_shuffle(self.body(x), 2)


class UNetBody(nn.Module):
    """Base class: from an image to 2C features at its size.

    A subclass calls `_build_body` and uses `features`; the parts are its own attributes, because
    the published keys have no prefix.
    """

    def _build_body(
        self, level: Level, in_channels: int, dim: int, depths: Sequence[int], refinement: int
    ) -> None:
        """Create all levels.

        Args:
            level: makes a level of a given number of blocks and channels.
            in_channels: channels of the image.
            dim: channels of the first level; each further level has twice as many.
            depths: blocks of each level.
            refinement: blocks after the last decoder level.
        """
        one, two, three, four = depths
        self.patch_embed = PatchEmbed(in_channels, dim)
        self.encoder_level1 = level(one, dim)
        self.down1_2 = Downsample(dim)
        self.encoder_level2 = level(two, 2 * dim)
        self.down2_3 = Downsample(2 * dim)
        self.encoder_level3 = level(three, 4 * dim)
        self.down3_4 = Downsample(4 * dim)
        self.latent = level(four, 8 * dim)
        self.up4_3 = Upsample(8 * dim)
        self.reduce_chan_level3 = nn.Conv2d(8 * dim, 4 * dim, 1, bias=False)
        self.decoder_level3 = level(three, 4 * dim)
        self.up3_2 = Upsample(4 * dim)
        self.reduce_chan_level2 = nn.Conv2d(4 * dim, 2 * dim, 1, bias=False)
        self.decoder_level2 = level(two, 2 * dim)
        self.up2_1 = Upsample(2 * dim)
        self.decoder_level1 = level(one, 2 * dim)
        self.refinement = level(refinement, 2 * dim)

    def features(self, x: Tensor) -> Tensor:
        """Features (B, 2C, H, W) of an image whose height and width are multiples of `MULTIPLE`."""
        first = self.encoder_level1(self.patch_embed(x))
        second = self.encoder_level2(self.down1_2(first))
        third = self.encoder_level3(self.down2_3(second))
        y = self.up4_3(self.latent(self.down3_4(third)))
        y = self.decoder_level3(self.reduce_chan_level3(torch.cat([y, third], dim=1)))
        y = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(y), second], dim=1)))
        # The first level keeps the channels of both: no convolution reduces them.
        y = self.decoder_level1(torch.cat([self.up2_1(y), first], dim=1))
        out: Tensor = self.refinement(y)
        return out


def check_levels(owner: str, dim: int, depths: Sequence[int], refinement: int) -> None:
    """Raise `ConfigError` unless the numbers make a U-Net of four levels; a level may be empty."""
    if dim < 2 or dim % 2:
        raise ConfigError(f"{owner}: dim must be an even number of channels, got {dim!r}")
    if len(depths) != LEVELS or min(depths) < 0 or refinement < 1:
        raise ConfigError(
            f"{owner}: depths must be {LEVELS} block counts and refinement a positive one, "
            f"got {tuple(depths)!r} and {refinement!r}"
        )
