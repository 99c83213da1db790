"""The four directions in which a selective scan reads an image.

Direction 0 goes through the rows, 1 through the columns, 2 and 3 are 0 and 1 from the end.

Shape letters: B batch, D channels, H, W height and width, L = H * W.
"""

import torch
from torch import Tensor

DIRECTIONS = 4


def to_sequences(x: Tensor) -> Tensor:
    """(B, 4, ..., H, W), one image for each direction, as sequences (B, 4, ..., L)."""
    rows, columns, rows_back, columns_back = x.unbind(1)
    return torch.stack(
        [
            rows.flatten(-2),
            columns.transpose(-1, -2).flatten(-2),
            rows_back.flatten(-2).flip(-1),
            columns_back.transpose(-1, -2).flatten(-2).flip(-1),
        ],
        dim=1,
    )


def to_images(x: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, ..., L) as images (B, 4, ..., H, W); the inverse of `to_sequences`."""
    rows, columns, rows_back, columns_back = x.unbind(1)
    high, wide = (height, width), (width, height)
    return torch.stack(
        [
            rows.unflatten(-1, high),
            columns.unflatten(-1, wide).transpose(-1, -2),
            rows_back.flip(-1).unflatten(-1, high),
            columns_back.flip(-1).unflatten(-1, wide).transpose(-1, -2),
        ],
        dim=1,
    )


def repeated(x: Tensor) -> Tensor:
    """One image for all directions, (B, D, H, W) as (B, 4, D, H, W)."""
    return x.unsqueeze(1).expand(-1, DIRECTIONS, -1, -1, -1)


def merge(images: Tensor) -> Tensor:
    """Sum of the directions' images (B, 4, D, H, W), in an order that every kernel keeps."""
    rows, columns, rows_back, columns_back = images.unbind(1)
    return (rows + rows_back) + (columns + columns_back)
