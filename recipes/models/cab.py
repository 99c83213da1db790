"""Convolution block with channel attention (CAB) of MambaIR.

Shapes: B batch, C channels, H, W height and width.
"""

from torch import Tensor, nn

SQUEEZE = 30
"""Channel attention works on C // SQUEEZE channels, as published."""


class ChannelAttention(nn.Module):
    """Scale each channel by a factor computed from all channel means: (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = channels // SQUEEZE
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return x times its attention."""
        scaled: Tensor = x * self.attention(x)
        return scaled


class CAB(nn.Module):
    """Two convolutions (classic) or two separable pairs (light), then channel attention.

    Args:
        channels: channels of input and output, at least 30.
        light: the depthwise form of the lightweight super-resolution network.

    Shape:
        input (B, C, H, W), output (B, C, H, W).

    Source: MambaIR, `CAB`; key names are the published ones.
    """

    def __init__(self, channels: int, light: bool) -> None:
        super().__init__()
        c, half, third = channels, channels // 2, channels // 3
        if light:
            layers: list[nn.Module] = [
                nn.Conv2d(c, half, 1),
                nn.Conv2d(half, half, 3, padding=1, groups=half),
                nn.GELU(),
                nn.Conv2d(half, c, 1),
                nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=c),
            ]
        else:
            layers = [
                nn.Conv2d(c, third, 3, padding=1),
                nn.GELU(),
                nn.Conv2d(third, c, 3, padding=1),
            ]
        self.cab = nn.Sequential(*layers, ChannelAttention(c))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block; see the class for shapes."""
        y: Tensor = self.cab(x)
        return y
