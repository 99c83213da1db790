"""Recognise selective scans in a user's model while it is captured.

The CUDA and Triton code of Mamba networks can be neither traced nor exported. During capture what
calls it is replaced by adapters that record `torch.ops.qmir.selective_scan` and plain operators:
what the user registered, then the published functions. Afterwards all is put back.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn

from qmir_ao.capture import mamba_module
from qmir_ao.capture.adapters import scan as adapter
from qmir_ao.capture.known import known_functions
from qmir_ao.capture.registry import registered
from qmir_ao.capture.swap import set_attribute, swapped

__all__ = ["adapter", "swapped_selective_scan"]


@contextlib.contextmanager
def swapped_selective_scan(model: nn.Module) -> Iterator[None]:
    """Make `model` call adapters instead of its scan functions for the duration of the block."""
    # Probing runs originals on random numbers: before anything is swapped.
    classes = list(mamba_module.mamba_classes(model))
    pairs = [*registered(), *known_functions(model)]
    with swapped(model, pairs), contextlib.ExitStack() as undo:
        for cls in classes:
            undo.callback(_swap_forward(cls))
        yield


def _swap_forward(cls: Any) -> Any:
    original, thread = cls.forward, threading.get_ident()

    def forward(self: Any, hidden_states: Any, inference_params: Any = None) -> Any:
        if threading.get_ident() != thread:
            return original(self, hidden_states, inference_params)
        return mamba_module.forward(self, hidden_states, inference_params)

    return set_attribute(cls, "forward", forward, vars(cls).get("forward"))
