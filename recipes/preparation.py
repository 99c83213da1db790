"""What happens to the quantizers of a network between its preparation and its first step.

A quantizer may size and fill its parameters from the first batch. That has to be over before an
optimizer, an average of the weights or another rank takes a copy of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase


def quantizers(model: nn.Module) -> dict[str, nn.Module]:
    """The fake-quantizers of a network by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizeBase)
    }


def initialize_quantizers(model: nn.Module, batch: Tensor) -> None:
    """Run a batch through a network whose quantizers wait for one; nothing else changes.

    Args:
        model: network in training mode; without waiting quantizers it does not run.
        batch: its input.

    Raises:
        NonFiniteError: an activation holds NaN or infinity.
    """
    waiting = {
        module
        for module in quantizers(model).values()
        if not bool(getattr(module, "initialized", torch.ones(1)).all())
    }
    if not waiting:
        return
    others = (module for module in model.modules() if module not in waiting)
    buffers = [buffer for module in others for buffer in module.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    # Dropout must not use up the random numbers of the first step. Gradients stay on, because
    # operators may take another path, and round differently, without them.
    with torch.random.fork_rng():
        # Drawn by the loader before the first step: dropout then masks the same values here.
        torch.empty((), dtype=torch.int64).random_()
        model(batch)
    with torch.no_grad():
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)


@contextmanager
def float32_quantizers(model: nn.Module) -> Iterator[None]:
    """Inside the block, quantizers get float32 whatever autocast made of their input."""
    handles = [
        module.register_forward_pre_hook(_to_float32) for module in quantizers(model).values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) else x for x in inputs)
