"""What the statistics of a result must be, for the kernels of every backend."""

import torch
from support.tolerances import moments_error
from torch import Tensor

from qmir_ao.ops._moments import moments_ref


def assert_moments(
    found: Tensor, y: Tensor, offset: Tensor | None, dim: int, pairs: bool = False
) -> None:
    """Statistics of a result against those of its values, in float64.

    Args:
        found: what a kernel made.
        y: the result that it gave with them.
        offset: one value for each channel, or None.
        dim: of the channels.
        pairs: whether the kernel adds up pairs of floats.
    """
    wanted = moments_ref(y if y.dim() > 1 else y.unsqueeze(0), offset, dim)
    assert found.shape == wanted.shape and found.dtype == torch.float64
    assert torch.equal(found[..., 2:], wanted[..., 2:])
    count = y.numel() // (wanted.shape[0] * wanted.shape[1])
    errors = (found - wanted).abs()
    for error, most in zip(errors.unbind(-1), moments_error(wanted, count, pairs), strict=False):
        assert (error <= most).all(), float((error / most).nan_to_num(0.0).max())
    assert (found[..., 1] >= 0).all()


def with_constant_channel(weight: Tensor, features: int, feature: int) -> Tensor:
    """8-bit codes of a weight in which all taps of a feature are zero."""
    changed = weight.clone()
    changed.view(features, -1)[feature] = 0
    return changed
