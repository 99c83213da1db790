"""Buffers that a forward changes: a symbolic trace runs it, on the buffers of the model itself."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph

from qmir_ao.errors import CaptureError


def own_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a network.

    Raises:
        CaptureError: it holds a tensor that is the result of a computation, which has no copy.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        found = [
            f"{name}.{key}" if name else key
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, Tensor) and value.grad_fn is not None
        ]
        raise CaptureError(
            f"the model cannot be copied: {', '.join(found) or 'an attribute'} is the result of a "
            "computation. Detach it; instead of torch.nn.utils.weight_norm and spectral_norm use "
            "those of torch.nn.utils.parametrizations"
        ) from error


class Buffers:
    """The buffers of a network before a trace."""

    def __init__(self, model: nn.Module) -> None:
        """Remember objects, versions and values."""
        self.model = model
        self._before: dict[str, tuple[nn.Module, str, Tensor, int, Tensor]] = {}
        for path, module in model.named_modules():
            for name, value in module.named_buffers(recurse=False):
                full = f"{path}.{name}" if path else name
                saved = value.detach().clone()
                self._before[full] = (module, name, value, value._version, saved)

    def changed(self) -> list[str]:
        """Names of those that are another tensor now, or have other values."""
        return [
            name
            for name, (module, key, value, version, _) in self._before.items()
            if getattr(module, key, None) is not value or value._version != version
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what changed."""
        for name in self.changed():
            module, key, value, _, saved = self._before[name]
            value.copy_(saved)
            module._buffers[key] = value


@contextlib.contextmanager
def kept_state(model: nn.Module) -> Iterator[Buffers]:
    """Put the buffers of a network back after what the block does with it."""
    buffers = Buffers(model)
    try:
        yield buffers
    finally:
        buffers.restore()


def check_stateless(graph: Graph, buffers: Buffers) -> None:
    """Refuse a traced graph that reads what the forward changed.

    Raises:
        CaptureError: with the name of the buffer.
    """
    read: list[Any] = [str(n.target) for n in graph.nodes if n.op == "get_attr" and n.users]
    for name in buffers.changed():
        if name in read or any("_tensor_constant" in target for target in read):
            raise CaptureError(
                f"the forward changes the buffer {name!r}, which its result seems to depend on; a "
                "captured network keeps no state from one call to the next"
            )
