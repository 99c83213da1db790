"""What most restoration networks share: embedding, body of groups, one of three heads.

    x - mean -> conv_first -> patch_embed.norm -> layers -> norm -> conv_after_body, + skip -> head

Shapes: B batch, C embedding channels, H, W height and width of the input image, s scale.
"""

import torch
from torch import Tensor, nn

from qmir_ao.errors import ConfigError

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


def init_linear(module: nn.Module) -> None:
    """Published initialisation of a Linear; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(highest: float, depths: tuple[int, ...]) -> list[float]:
    """Stochastic depth rate of each block: linear from 0 to `highest`."""
    total = sum(depths)
    return [highest * index / max(total - 1, 1) for index in range(total)]


def check_ends(owner: str, scale: int, upsampler: str, in_channels: int) -> None:
    """Raise `ConfigError` unless scale, upsampler and input channels go together."""
    if upsampler not in UPSAMPLERS:
        raise ConfigError(f"{owner}: upsampler must be one of {UPSAMPLERS}, got {upsampler!r}")
    allowed = (2, 3, 4) if upsampler else (1,)
    if scale not in allowed:
        raise ConfigError(
            f"{owner}: scale must be one of {allowed} with upsampler {upsampler!r}, got {scale!r}"
        )
    if in_channels not in (1, 3):
        raise ConfigError(f"{owner}: in_channels must be 1 or 3, got {in_channels!r}")


def check_depths(owner: str, depths: tuple[int, ...], drop_path_rate: float = 0.0) -> None:
    """Raise `ConfigError` unless every group has blocks and the rate is a probability below 1."""
    if not depths or min(depths) < 1:
        raise ConfigError(f"{owner}: depths must be positive block counts, got {depths!r}")
    if not 0.0 <= drop_path_rate < 1.0:
        raise ConfigError(f"{owner}: drop_path_rate must be in [0, 1), got {drop_path_rate!r}")


class RestorationNet(nn.Module):
    """Base class: a subclass calls `_build_start`, sets `layers`, and calls `_build_end`.

    Args:
        scale: enlargement; 2, 3 or 4 with an upsampler, 1 without.
        upsampler: "pixelshuffle", "pixelshuffledirect" or "" (residual image).

    Shape:
        input (B, in_channels, H, W), output (B, in_channels, s*H, s*W).
    """

    mean: Tensor
    layers: nn.ModuleList

    def __init__(self, scale: int, upsampler: str) -> None:
        super().__init__()
        self.scale, self.upsampler = scale, upsampler

    def _build_start(self, embed_dim: int, in_channels: int) -> None:
        mean = RGB_MEAN if in_channels == 3 else (0.0,)
        # Published checkpoints do not hold the mean.
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(in_channels, embed_dim, 3, padding=1)
        self.patch_embed = PatchEmbed(embed_dim)

    def _build_end(self, embed_dim: int, out_channels: int) -> None:
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
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

    def groups(self, x: Tensor) -> Tensor:
        """All groups of the body: (B, H, W, C) -> same."""
        for layer in self.layers:
            x = layer(x)
        return x

    def body(self, x: Tensor) -> Tensor:
        """Groups and final norm on the embedding (B, C, H, W)."""
        y = self.groups(self.patch_embed(x.permute(0, 2, 3, 1)))
        normed: Tensor = self.norm(y)
        return normed.permute(0, 3, 1, 2)

    def reconstruct(self, x: Tensor) -> Tensor:
        """From an image without its mean to a restored one without its mean."""
        shallow = self.conv_first(x)
        deep = self.conv_after_body(self.body(shallow)) + shallow
        y: Tensor
        if self.upsampler == "pixelshuffledirect":
            y = self.upsample(deep)
        elif self.upsampler == "pixelshuffle":
            y = self.conv_last(self.upsample(self.conv_before_upsample(deep)))
        else:
            y = x + self.conv_last(deep)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Restore a batch of images; see the class for shapes."""
        return self.reconstruct(x - self.mean) + self.mean
