"""MambaIR's U-Net for camera noise (SIDD, DND): the blocks of MambaIR on four levels.

State-dict keys, shapes and initialisation are the published ones, so published checkpoints load.

Shapes: B batch, H, W height and width of the input image.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.models.cab import SQUEEZE
from qmir_ao.recipes.models.mambair import VSSBlock
from qmir_ao.recipes.models.unet import MULTIPLE, UNetBody, check_levels
from qmir_ao.recipes.models.windows import crop, pad_mirrored

CONFIGS: dict[str, dict[str, Any]] = {"mambair-real-denoise": {}}
"""Name to the arguments of `MambaIRUNet`; the published settings are its defaults."""


class BlockLevel(nn.Sequential):
    """The blocks of one level on channels-first images: (B, C, H, W) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks."""
        x = x.permute(0, 2, 3, 1)
        for block in self:
            x = block(x)
        return x.permute(0, 3, 1, 2)


class MambaIRUNet(UNetBody):
    """MambaIR's U-Net for real denoising.

    Images of any size are continued by mirroring to multiples of 8 and the output is cropped.

    Args:
        dim: channels of the first level, at least 30 (channel attention divides them by 30).
        depths: blocks of each of the four levels.
        refinement: blocks after the last level.
        d_state: states per inner channel of the scans.
        expand: inner channels of the scans are `int(expand * channels)`.
        in_channels: 3 for RGB, 1 for grey images.

    Shape:
        input (B, in_channels, H, W) with values in [0, 1], output (B, in_channels, H, W).

    Raises:
        ConfigError: a setting is out of its allowed range.

    Source: MambaIR, `MambaIRUNet`; parameter names and shapes are the published ones.
    """

    scale = 1

    def __init__(
        self,
        *,
        dim: int = 48,
        depths: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        d_state: int = 16,
        expand: float = 1.5,
        in_channels: int = 3,
    ) -> None:
        check_levels("MambaIRUNet", dim, depths, refinement)
        if dim < SQUEEZE:
            raise ConfigError(
                f"MambaIRUNet: dim must be at least {SQUEEZE} (channel attention divides it by "
                f"{SQUEEZE}), got {dim!r}"
            )
        super().__init__()

        def level(count: int, channels: int) -> nn.Module:
            return BlockLevel(
                *(VSSBlock(channels, d_state, expand, light=False) for _ in range(count))
            )

        self._build_body(level, in_channels, dim, depths, refinement)
        self.output = nn.Conv2d(2 * dim, in_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Denoise a batch of images; see the class for shapes."""
        _, _, h, w = x.shape
        padded = pad_mirrored(x, MULTIPLE, repeat_edge=False)
        return crop(self.output(self.features(padded)) + padded, h, w)
