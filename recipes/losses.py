"""Training losses by name."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import l1_loss

CHARBONNIER_EPS = 1e-6
"""In units of a pixel's range; BasicSR, and MambaIR with it, add its square 1e-12."""


def charbonnier_loss(restored: Tensor, truth: Tensor) -> Tensor:
    """Mean of sqrt(d**2 + eps**2): as L1, with a gradient that is smooth around d = 0.

    Args:
        restored: images of any shape.
        truth: images of the same shape.

    Returns:
        One number.

    Source: BasicSR, `CharbonnierLoss` with its default eps; MambaIR's options leave it so.
    """
    squared = (restored - truth).square() + CHARBONNIER_EPS**2
    return squared.sqrt().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1_loss,
    "charbonnier": charbonnier_loss,
}
"""What `TrainOptions.loss` may be."""
