"""mamba-ssm's `Mamba` module, captured with its projections as ordinary layers.

Its own forward multiplies by `in_proj.weight` and `dt_proj.weight` in ways of its own, for speed on
a GPU. Here the same layers are called as layers, so that each of them is found and quantized.
"""

import inspect
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn import functional as F

from qmir_ao.capture import adapters
from qmir_ao.capture.operands import refuse

log = logging.getLogger(__name__)

_PARAMETERS = frozenset(
    "A_log D in_proj.weight in_proj.bias conv1d.weight conv1d.bias x_proj.weight dt_proj.weight "
    "dt_proj.bias out_proj.weight out_proj.bias".split()
)


def forward(self: Any, hidden_states: Any, inference_params: Any = None) -> Any:
    """Stand in for `Mamba.forward`: (B, L, C) to (B, L, C).

    Raises:
        CaptureError: `inference_params`, the state of text generation.
    """
    if inference_params is not None and not isinstance(inference_params, Proxy):
        raise refuse("Mamba.forward", "inference_params", inference_params, "None")
    x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
    width = self.conv1d.kernel_size[0]
    x = F.silu(adapters.cut_tail(self.conv1d(x.transpose(1, 2)), width))
    rank, states = self.dt_proj.in_features, self.A_log.shape[-1]
    projected = self.x_proj(x.transpose(1, 2))
    delta = F.linear(projected[..., :rank], self.dt_proj.weight).transpose(1, 2)
    B = projected[..., rank : rank + states].transpose(1, 2)
    C = projected[..., -states:].transpose(1, 2)
    A = -torch.exp(self.A_log.float())
    y = adapters.scan(
        x, delta, A, B, C, self.D.float(), z.transpose(1, 2), self.dt_proj.bias.float(), True
    )
    return self.out_proj(y.transpose(1, 2))


def is_mamba(module: nn.Module) -> bool:
    """Whether a module is mamba-ssm's `Mamba` as published, and not one of its many variants."""
    cls = type(module)
    if cls.__name__ != "Mamba" or cls.__module__.split(".")[0] != "mamba_ssm":
        return False
    names = list(inspect.signature(cls.forward).parameters)
    return (
        names[:3] == ["self", "hidden_states", "inference_params"]
        and {name for name, _ in module.named_parameters()} <= _PARAMETERS
        and getattr(module, "activation", "silu") in adapters.SILU
    )


def mamba_classes(model: nn.Module) -> Iterator[type]:
    """Each class of the model's published `Mamba` modules, once."""
    found = {type(m): None for m in model.modules() if is_mamba(m)}
    for cls in found:
        same = [m for m in model.modules() if type(m) is cls]
        if all(is_mamba(m) and _agrees(m) for m in same):
            yield cls


def _agrees(module: Any) -> bool:
    """False where the original can run here and gives another result."""
    weight = module.in_proj.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 5, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    try:
        with torch.no_grad():
            got = type(module).forward(module, x)
    except Exception as reason:  # it needs a GPU: then its name and parameters have to do
        log.debug("Mamba does not run on %s (%s)", weight.device, reason)
        return True
    with torch.no_grad():
        return torch.allclose(got, forward(module, x), rtol=1e-3, atol=1e-4)


def imported() -> bool:
    """Whether any part of mamba-ssm is imported."""
    return any(name == "mamba_ssm" or name.startswith("mamba_ssm.") for name in sys.modules)
