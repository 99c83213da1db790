"""Epilogues of the integer operators for the tests of every backend, and their separate form."""

from collections.abc import Callable

import torch
from torch import Tensor

from qmir_ao.ops._epilogue import Epilogue

END = {
    "residual": (True, False, "none"),
    "scaled": (True, True, "none"),
    "relu": (False, False, "relu"),
    "all": (True, True, "relu"),
}
"""Name: whether there is a residual, whether its channels have factors, the activation."""

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "half of the channels": lambda x: (
        torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[0]
    ),
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}
"""How the residual of a convolution may lie in memory."""

SPECIAL = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3e38])


def ending(seed: int, name: str, size: torch.Size, features: int) -> Epilogue:
    """The named epilogue of a result; a few values of the residual are special."""
    with_residual, with_scale, activation = END[name]
    draw = torch.Generator().manual_seed(seed)
    residual = torch.randn(size, generator=draw) if with_residual else None
    if residual is not None:
        flat = residual.view(-1)
        flat[: min(len(flat), len(SPECIAL))] = SPECIAL[: len(flat)]
    scale = torch.randn(features, generator=draw) if with_scale else None
    return Epilogue(residual, scale, activation)


def separate(y: Tensor, end: Epilogue, per_channel: tuple[int, ...]) -> Tensor:
    """The epilogue as the operators of a graph that nothing was fused in."""
    if end.residual is not None and end.residual_scale is not None:
        y = torch.add(torch.mul(end.residual, end.residual_scale.reshape(per_channel)), y)
    elif end.residual is not None:
        y = torch.add(end.residual, y)
    return torch.relu(y) if end.activation == "relu" else y


def same_values(left: Tensor, right: Tensor) -> bool:
    """Equal to the last bit, signs of zeros included; a NaN has no bits that anyone promises."""
    left, right = left.contiguous(), right.contiguous()
    if left.shape != right.shape or not torch.equal(left.isnan(), right.isnan()):
        return False
    known = ~left.isnan()
    return torch.equal(left[known].view(torch.int32), right[known].view(torch.int32))
