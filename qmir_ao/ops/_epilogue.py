"""What may follow the float result of an integer operator within the operator.

    y = activation(y + residual_scale[o] * residual)

Every operation rounds to float32 on its own, as separate operators do, so that a result without an
activation, or with relu, is theirs to the byte. Kernels round the other activations otherwise than
torch (`qmir_ao.ops._activations`).

Shape letters: O = output channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qmir_ao.ops._activations import ACTIVATION_NUMBERS, ACTIVATIONS
from qmir_ao.ops._integer import require

ARGUMENTS = 'Tensor? residual=None, Tensor? residual_scale=None, str activation="none"'
"""The end of a schema."""


class Epilogue(NamedTuple):
    """The arguments of an operator behind its own, in order."""

    residual: Tensor | None = None
    residual_scale: Tensor | None = None
    activation: str = "none"

    @property
    def kind(self) -> int:
        """The activation as the kernels count it."""
        return ACTIVATION_NUMBERS[self.activation]


def check_epilogue(op: str, epilogue: Epilogue, size: tuple[int, ...], features: int) -> None:
    """Refuse an epilogue that does not fit results of a shape with so many channels."""
    residual, scale, activation = epilogue
    require(
        activation in ACTIVATIONS,
        lambda: (
            f"qmir::{op}: activation must be one of {', '.join(ACTIVATIONS)}, "
            f"got {activation!r}; apply others to the result"
        ),
    )
    if residual is not None:
        require(
            residual.dtype == torch.float32 and tuple(residual.shape) == size,
            lambda: (
                f"qmir::{op}: residual must be float32 of the result's shape {size}, "
                f"got {tuple(residual.shape)} {residual.dtype}"
            ),
        )
    if scale is not None:
        require(
            residual is not None and scale.dtype == torch.float32 and scale.numel() == features,
            lambda: (
                f"qmir::{op}: residual_scale must be float32 of {features} values and come with a "
                f"residual, got {tuple(scale.shape)} {scale.dtype}"
                f"{' without one' if residual is None else ''}"
            ),
        )


def apply_epilogue(y: Tensor, epilogue: Epilogue, per_channel: tuple[int, ...]) -> Tensor:
    """Plain-torch form; `per_channel` is the shape in which O values meet `y`."""
    residual, scale, activation = epilogue
    if residual is not None:
        scaled = residual if scale is None else residual * scale.reshape(per_channel)
        y = scaled + y
    return ACTIVATIONS[activation](y)


def lies_channels_last(residual: Tensor | None) -> bool:
    """Whether the channels of an image (B, O, P, Q) lie next to each other.

    The result of a convolution lies as its residual does: the sum of two tensors would, and a
    channels-last network reads it so.
    """
    return residual is not None and residual.stride(1) == 1 and not residual.is_contiguous()


def image_format(residual: Tensor | None) -> torch.memory_format:
    """Memory format of a convolution's result and, for the kernels, of its residual."""
    return torch.channels_last if lies_channels_last(residual) else torch.contiguous_format
