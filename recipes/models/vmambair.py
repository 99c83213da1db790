"""VmambaIR: a U-Net whose blocks scan the image in four directions and its channels in two.

State-dict keys, shapes and initialisation are the published ones, so published checkpoints load.
No control flow depends on tensor shapes: `torch.export` with dynamic batch, height and width and
`torch.fx.symbolic_trace` both capture the network.

Shapes: B batch, C channels of a level, H, W height and width, s scale.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.models.grouped_scan import ScanNames, ScanSizes, grouped_scan
from qmir_ao.recipes.models.skeleton import shuffle_layers
from qmir_ao.recipes.models.ss2d import CrossScan, K
from qmir_ao.recipes.models.unet import MULTIPLE, ChannelNorm, UNetBody, check_levels
from qmir_ao.recipes.models.windows import crop, pad_mirrored

CONFIGS: dict[str, dict[str, Any]] = {
    "vmambair-x4": {"scale": 4, "dim": 48, "depths": (15, 1, 1, 1), "refinement": 15},
}
"""Name to the arguments of `VmambaIR`; the published settings."""

STATES = 16
CHANNEL_SIZES = ScanSizes(groups=2, inner=4, rank=6, states=16)
"""The channel scan reads the channels onwards and backwards, as four features each."""
CHANNEL_NAMES = ScanNames("xc_proj_weight", "dtc_projs_weight", "dtc_projs_bias", "Ac_logs", "Dsc")


class OmniScan(CrossScan):
    """Gated scan of an image in four directions and of its channels in two: (B, C, H, W) -> same.

    Source: VmambaIR, `SS2D_1`; parameter names and shapes are the published ones.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        k, inner, rank, states = CHANNEL_SIZES
        self.conv_cin = nn.Conv2d(1, inner, 1)
        self.conv_cout = nn.Conv2d(inner, 1, 1)
        self.pooling = nn.AdaptiveAvgPool2d(1)
        self.channel_norm = ChannelNorm(channels)
        self.in_conv = nn.Conv2d(channels, 2 * channels, 1)
        self.act = nn.SiLU()
        self.conv2d = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.out_norm = ChannelNorm(channels)
        self.add_scan(K, channels, math.ceil(channels / 16), STATES)
        bound = inner**-0.5
        self.xc_proj_weight = nn.Parameter(
            torch.empty(k, rank + 2 * states, inner).uniform_(-bound, bound)
        )
        self.out_conv = nn.Conv2d(channels, channels, 1)
        self.Dsc = nn.Parameter(torch.ones(k * inner))
        self.Ac_logs = nn.Parameter(torch.randn(k * inner, states))
        self.dtc_projs_weight = nn.Parameter(torch.randn(k, inner, rank))
        self.dtc_projs_bias = nn.Parameter(torch.randn(k, inner))

    def channel_scan(self, y: Tensor) -> Tensor:
        """A factor (B, C, 1, 1) for each channel of y (B, C, H, W)."""
        k, inner, _, _ = CHANNEL_SIZES
        b, c, _, _ = y.shape
        onward = self.conv_cin(self.pooling(y).permute(0, 2, 1, 3)).squeeze(-1)
        xs = torch.cat([onward, onward.flip(-1)], dim=1)
        ys = grouped_scan(self, xs, b, c, CHANNEL_SIZES, CHANNEL_NAMES)
        first, second = ys.reshape(b, k, inner, c).chunk(k, dim=1)
        summed = (first + second.flip(-1)).transpose(1, 2)
        factor: Tensor = self.channel_norm(
            self.conv_cout(summed.reshape(b, inner, c, 1)).transpose(1, 2)
        )
        return factor

    def forward(self, x: Tensor) -> Tensor:
        """Run the scans; see the class for shapes."""
        x, z = self.in_conv(x).chunk(2, dim=1)
        x = self.act(self.conv2d(x))
        y = self.out_norm(self.scan(x)) * self.act(z)
        y = y + y * self.channel_scan(y)
        out: Tensor = self.out_conv(y)
        return out


class GatedFeedForward(nn.Module):
    """Pointwise and depthwise convolution, GELU gate, pointwise convolution: (B, C, H, W) -> same.

    Source: VmambaIR, `FeedForward`.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        both = 2 * hidden
        self.project_in = nn.Conv2d(channels, both, 1, bias=False)
        self.dwconv = nn.Conv2d(both, both, 3, padding=1, groups=both, bias=False)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers; see the class for shapes."""
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        y: Tensor = self.project_out(F.gelu(gate) * value)
        return y


class ScanBlock(nn.Module):
    """Scan and feed-forward, each after a norm and with a skip: (B, C, H, W) -> same."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.attn = OmniScan(channels)
        self.norm2 = ChannelNorm(channels)
        self.ffn = GatedFeedForward(channels, ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block; see the class for shapes."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


class VmambaIR(UNetBody):
    """VmambaIR for super-resolution.

    Images of any size are continued by mirroring to multiples of 8 and the output is cropped.

    Args:
        scale: enlargement; 2, 3 or 4 (4 is the published one).
        dim: channels of the first level.
        depths: blocks of each of the four levels.
        refinement: blocks after the last level.
        ffn_ratio: hidden channels of the feed-forward layers are `int(ffn_ratio * channels)`.
        in_channels: 3 for RGB, 1 for grey images.

    Shape:
        input (B, in_channels, H, W) with values in [0, 1], output (B, in_channels, s*H, s*W).

    Raises:
        ConfigError: a setting is out of its allowed range.

    Source: VmambaIR, `MambaSISR6`; key names are the published ones.
    """

    def __init__(
        self,
        *,
        scale: int = 4,
        dim: int = 48,
        depths: Sequence[int] = (15, 1, 1, 1),
        refinement: int = 15,
        ffn_ratio: float = 2.66,
        in_channels: int = 3,
    ) -> None:
        check_levels("VmambaIR", dim, depths, refinement)
        if scale not in (2, 3, 4):
            raise ConfigError(f"VmambaIR: scale must be one of (2, 3, 4), got {scale!r}")
        super().__init__()
        self.scale = scale

        def level(count: int, channels: int) -> nn.Module:
            return nn.Sequential(*(ScanBlock(channels, ffn_ratio) for _ in range(count)))

        self._build_body(level, in_channels, dim, depths, refinement)
        self.tail = nn.Sequential(
            nn.Sequential(*shuffle_layers(2 * dim, scale)),
            nn.Conv2d(2 * dim, in_channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge a batch of images; see the class for shapes."""
        _, _, h, w = x.shape
        padded = pad_mirrored(x, MULTIPLE, repeat_edge=False)
        y = self.tail(self.features(padded))
        y = y + F.interpolate(padded, scale_factor=self.scale, mode="nearest")
        return crop(y, h * self.scale, w * self.scale)
