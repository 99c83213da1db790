"""Nested S-shaped scan orders of MaIR: in which order its sequences visit the pixels of an image.

The image is cut into vertical stripes. Stripes are read downwards and upwards in turn, and within
a stripe every other row from right to left, so that neighbours in a sequence are neighbours in the
image. Shifted orders begin with a narrower stripe; the last stripe takes what is left.

Orders are computed from the sizes of a tensor by tensor arithmetic alone: both `torch.export` with
dynamic height and width and `torch.fx.symbolic_trace` capture them, on any device.

Shapes: B batch, D channels, H, W height and width, L = H*W, K = 4 sequences.

Source: MaIR, `mair_ids_generate` and `mair_shift_ids_generate`. For images narrower than the first
stripe the published code reads odd rows from left to right, unlike everywhere else; this does not.
"""

import torch
from torch import Tensor

from qmir_ao.recipes.models.ss2d import K


def _places(rows: Tensor, columns: Tensor, h: int, w: int, stripe: int, shift: int) -> Tensor:
    """Place of each pixel in the sequence that reads an image of h rows and w columns."""
    # A shift widens the first stripe by columns left of the image, which clamp() takes off again.
    outside = -shift % stripe
    index = (columns + outside) // stripe
    start = (index * stripe - outside).clamp(min=0)
    width = w - start - (w - (index + 1) * stripe + outside).clamp(min=0)
    up = index % 2
    row = rows + up * (h - 1 - 2 * rows)
    column = columns - start
    backwards = row % 2
    column = column + backwards * (width - 1 - 2 * column)
    return h * start + row * width + column


def scan_orders(x: Tensor, stripe: int, shift: int) -> tuple[Tensor, Tensor]:
    """Orders of the four sequences over the images x.

    The sequences read the image, the image turned by 180 degrees, and the transposes of both.

    Args:
        x: images (B, D, H, W), of which only the sizes matter.
        stripe: columns of a stripe.
        shift: columns of the first stripe; 0 for a full one.

    Returns:
        The pixel at each place (K, L), and the place of each pixel (K, L); both int64.
    """
    _, _, h, w = x.shape
    # A running sum of ones instead of arange: it follows the device of x in captured graphs too.
    ones = torch.ones_like(x[0, 0], dtype=torch.int64)
    rows = torch.ops.aten.cumsum(ones, 0) - 1
    columns = torch.ops.aten.cumsum(ones, 1) - 1
    upright = _places(rows, columns, h, w, stripe, shift).reshape(-1)
    lying = _places(columns, rows, w, h, stripe, shift).reshape(-1)
    places = torch.stack([upright, lying])
    pixels = torch.ops.aten.argsort(places)
    turned = h * w - 1 - pixels
    return (
        torch.stack([pixels, turned], dim=1).reshape(K, -1),
        torch.stack([places, places.flip(1)], dim=1).reshape(K, -1),
    )
