"""Activations that an integer operator or a quantizer can compute within itself.

torch's in the references. A kernel rounds relu as torch does, and the others otherwise by a few
units of 2^-24 (cuda/include/activations.cuh).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""By name, in the order that the kernels count them."""
ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
EXACT = ("none", "relu")
"""Those for which every target gives torch's bytes."""
