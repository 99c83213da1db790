"""EDSR: super-resolution by residual blocks of two convolutions.

State-dict keys are BasicSR's, so its published checkpoints load.

Shapes: B batch, C features, H, W height and width of the input image, s scale.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.models.skeleton import RGB_MEAN, shuffle_layers

_LARGE: dict[str, Any] = {"features": 256, "blocks": 32, "res_scale": 0.1}

CONFIGS: dict[str, dict[str, Any]] = {
    **{f"edsr-baseline-x{s}": {"scale": s} for s in (2, 3, 4)},
    **{f"edsr-x{s}": {**_LARGE, "scale": s} for s in (2, 3, 4)},
}
"""Name to the arguments of `EDSR`; all are the published settings."""


class ResidualBlock(nn.Module):
    """Convolution, ReLU, convolution, added to the input after scaling: (B, C, H, W) -> same."""

    def __init__(self, features: int, res_scale: float) -> None:
        super().__init__()
        self.res_scale = res_scale
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Run the block; see the class for shapes."""
        y: Tensor = self.conv2(self.relu(self.conv1(x)))
        return x + (y if self.res_scale == 1.0 else y * self.res_scale)


class EDSR(nn.Module):
    """EDSR network.

    Args:
        scale: enlargement; 2, 3 or 4.
        features: channels of the body.
        blocks: residual blocks.
        res_scale: what each block's residual is multiplied by.
        img_range: the network works on values in [0, img_range].

    Shape:
        input (B, 3, H, W) with values in [0, 1], output (B, 3, s*H, s*W).

    Raises:
        ConfigError: a setting is out of its allowed range.

    Source: Lim et al. 2017, section 3; key names of BasicSR.
    """

    mean: Tensor

    def __init__(
        self,
        *,
        scale: int = 2,
        features: int = 64,
        blocks: int = 16,
        res_scale: float = 1.0,
        img_range: float = 255.0,
    ) -> None:
        super().__init__()
        _check(scale, features, blocks, res_scale, img_range)
        self.scale, self.img_range = scale, img_range
        # Published checkpoints do not hold the mean.
        mean = torch.tensor(RGB_MEAN).reshape(1, -1, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.conv_first = nn.Conv2d(3, features, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(features, res_scale) for _ in range(blocks)))
        self.conv_after_body = nn.Conv2d(features, features, 3, padding=1)
        self.upsample = nn.Sequential(*shuffle_layers(features, scale))
        self.conv_last = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge a batch of images; see the class for shapes."""
        shallow = self.conv_first((x - self.mean) * self.img_range)
        deep = self.conv_after_body(self.body(shallow)) + shallow
        out: Tensor = self.conv_last(self.upsample(deep)) / self.img_range + self.mean
        return out


def _check(scale: int, features: int, blocks: int, res_scale: float, img_range: float) -> None:
    if scale not in (2, 3, 4):
        raise ConfigError(f"EDSR: scale must be one of (2, 3, 4), got {scale!r}")
    if features < 1 or blocks < 1:
        raise ConfigError(
            f"EDSR: features and blocks must be positive, got {features!r} and {blocks!r}"
        )
    if res_scale <= 0.0 or img_range <= 0.0:
        raise ConfigError(
            f"EDSR: res_scale and img_range must be positive, got {res_scale!r} and {img_range!r}"
        )
