"""Window attention for images of any size: padding, windows, the mask of shifted windows.

Everything that depends on height or width is computed from tensors of positions, never by loops
over shapes, so that `torch.export` with dynamic height and width and `torch.fx.symbolic_trace`
both capture it. The batch stays the first dimension throughout: statistics per sample are those of
an image, not of a window.

Shapes: B batch, C channels, H, W height and width (multiples of the window), S window size,
M = H/S * W/S windows, T = S*S tokens of a window, E attention heads.
"""

import torch
from torch import Tensor, nn

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.models.skeleton import RestorationNet

_OUTSIDE = -100.0
"""What a score gets where two tokens of a shifted window are no neighbours in the image."""


def _mirrored(size: int, multiple: int, repeat_edge: bool, x: Tensor) -> Tensor:
    """Positions of an axis of `size`, continued to a multiple by running back and forth."""
    positions = torch.arange((size + multiple - 1) // multiple * multiple, device=x.device)
    period = positions * 0 + (2 * size if repeat_edge else 2 * size - 2)
    # An axis of one pixel has nothing to mirror: it repeats.
    there = positions % period.clamp(min=1)
    return torch.minimum(there, period - int(repeat_edge) - there)


def pad_mirrored(x: Tensor, multiple: int, repeat_edge: bool) -> Tensor:
    """Continue (B, C, H, W) below and to the right to multiples of `multiple`.

    Args:
        x: images of any size.
        multiple: what the padded height and width are multiples of.
        repeat_edge: mirror with the last row and column (a flipped copy) or without (reflection).
    """
    _, _, h, w = x.shape
    rows, columns = (_mirrored(size, multiple, repeat_edge, x) for size in (h, w))
    return x.index_select(2, rows).index_select(3, columns)


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left of (B, C, H, W), as a copy: torch.export adds guards on strides to a slice."""
    rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
    return x.index_select(2, rows).index_select(3, columns)


def to_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) as (B, M, T, C)."""
    b, h, w, c = x.shape
    split = x.reshape(b, h // window, window, w // window, window, c)
    tokens = split.permute(0, 1, 3, 2, 4, 5)
    return tokens.reshape(b, (h // window) * (w // window), window * window, c)


def from_windows(x: Tensor, window: int, like: Tensor) -> Tensor:
    """(B, M, T, C) as (B, H, W, C) with the height and width of `like` (B, H, W, any)."""
    b, h, w, _ = like.shape
    split = x.reshape(b, h // window, w // window, window, window, x.shape[3])
    return split.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, x.shape[3])


def _bands(size: int, window: int, x: Tensor) -> Tensor:
    """Number of the band each position is in: before the last window, and its two halves."""
    positions = torch.arange(size, device=x.device)
    return (positions >= size - window).float() + (positions >= size - window // 2).float()


def shift_mask(x: Tensor, window: int) -> Tensor:
    """What attention in windows shifted by half their size adds to its scores: (1, M, 1, T, T).

    Args:
        x: (B, H, W, C), of which only the size matters.
        window: window size.
    """
    _, h, w, _ = x.shape
    bands = 3.0 * _bands(h, window, x).unsqueeze(1) + _bands(w, window, x).unsqueeze(0)
    tokens = to_windows(bands.unsqueeze(0).unsqueeze(3), window)
    apart = (tokens != tokens.transpose(2, 3)).float()
    return (apart * _OUTSIDE).unsqueeze(2)


def relative_positions(window: int) -> Tensor:
    """Index of every pair of tokens into a table of (2S-1)^2 relative positions: (T, T) int64."""
    y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
    dy, dx = (axis[:, None] - axis[None, :] + window - 1 for axis in (y, x))
    return dy * (2 * window - 1) + dx


def bias_table(window: int, heads: int) -> nn.Parameter:
    """A fresh table of relative position biases ((2S-1)^2, E)."""
    table = torch.zeros((2 * window - 1) ** 2, heads)
    return nn.Parameter(nn.init.trunc_normal_(table, std=0.02))


def attend(qkv: Tensor, channels: int, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Attention within each window.

    Args:
        qkv: queries, keys and values, (B, M, T, 3C).
        channels: C.
        bias: for each pair of tokens and head, (T, T, E).
        mask: of `shift_mask`, or None.

    Returns:
        (B, M, T, C).
    """
    b, m, t, _ = qkv.shape
    heads = bias.shape[2]
    split = qkv.reshape(b, m, t, 3, heads, channels // heads).permute(3, 0, 1, 4, 2, 5)
    q, k, v = split.unbind(0)
    scores = torch.matmul(q * (channels // heads) ** -0.5, k.transpose(-2, -1))
    scores = scores + bias.permute(2, 0, 1)
    if mask is not None:
        scores = scores + mask
    out = torch.matmul(scores.softmax(-1), v)
    return out.transpose(2, 3).reshape(b, m, t, channels)


def window_attention(
    qkv: Tensor, channels: int, window: int, bias: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention in windows, shifted by half their size where a mask is given.

    Args:
        qkv: queries, keys and values, (B, H, W, 3C).
        channels: C.
        window: window size.
        bias: for each pair of tokens and head, (T, T, E).
        mask: of `shift_mask`, or None.

    Returns:
        (B, H, W, C).
    """
    half = window // 2
    if mask is not None:
        qkv = torch.roll(qkv, (-half, -half), (1, 2))
    y = from_windows(attend(to_windows(qkv, window), channels, bias, mask), window, qkv)
    return y if mask is None else torch.roll(y, (half, half), (1, 2))


def check_windows(
    owner: str, embed_dim: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int
) -> None:
    """Raise `ConfigError` unless channels, heads and window size go together."""
    if len(heads) != len(depths):
        raise ConfigError(
            f"{owner}: heads must have one entry for each of the {len(depths)} groups, "
            f"got {heads!r}"
        )
    if min(heads) < 1 or any(embed_dim % count for count in heads):
        raise ConfigError(
            f"{owner}: every entry of heads must divide embed_dim={embed_dim}, got {heads!r}"
        )
    if window < 2:
        raise ConfigError(f"{owner}: window must be at least 2, got {window!r}")


class WindowedNet(RestorationNet):
    """A `RestorationNet` whose layers need multiples of a window size and the mask of windows.

    Args:
        scale: enlargement.
        upsampler: head; see `RestorationNet`.
        window: window size.
        repeat_edge: how the image is padded; see `pad_mirrored`.
        img_range: the network works on values in [0, img_range].
    """

    def __init__(
        self, scale: int, upsampler: str, window: int, repeat_edge: bool, img_range: float = 1.0
    ) -> None:
        super().__init__(scale, upsampler)
        self.window, self.repeat_edge, self.img_range = window, repeat_edge, img_range

    def groups(self, x: Tensor) -> Tensor:
        """All groups of the body: (B, H, W, C) -> same."""
        mask = shift_mask(x, self.window)
        for layer in self.layers:
            x = self.run_layer(layer, x, mask)
        return x

    def run_layer(self, layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        """One group of the body: (B, H, W, C) -> same."""
        y: Tensor = layer(x, mask)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Restore a batch of images of any size; see the class for shapes."""
        _, _, h, w = x.shape
        padded = pad_mirrored(x, self.window, self.repeat_edge) - self.mean
        if self.img_range == 1.0:
            y = self.reconstruct(padded)
        else:
            y = self.reconstruct(padded * self.img_range) / self.img_range
        return crop(y + self.mean, h * self.scale, w * self.scale)
