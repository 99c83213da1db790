"""The quantization methods that are compared, as settings of `get_qmir_qconfig`.

Every method has one weight step for each output channel and a searched start, unless its name says
"plain": then it starts as its paper does and rounds a scan's A, D and delta bias by itself.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.nn import functional as F

from qmir_ao.errors import ConfigError
from qmir_ao.quant.qconfig import get_qmir_qconfig


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        key: name in files and on the command line.
        label: name in tables.
        settings: keyword arguments of `get_qmir_qconfig`.
        ours: whether it holds DLS or RFA.
    """

    key: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    ours: bool = False


_SEARCHED = {"init": "mse", "weight_init": "mse", "granularity": "per_channel"}
_PLAIN = {
    "init": "lsq",
    "weight_init": "lsq",
    "granularity": "per_channel",
    "constants": "own",
}


def _rival(key: str, label: str, name: str, **settings: Any) -> Method:
    return Method(key, label, {"activation": name, "weight": name, **_SEARCHED, **settings})


METHODS = {
    method.key: method
    for method in (
        _rival("ste", "STE", "ste"),
        _rival("lsq", "LSQ", "lsq"),
        _rival("lsq-plain", "LSQ, plain", "lsq", **_PLAIN),
        _rival("lsq+", "LSQ+", "lsq+"),
        _rival("pact", "PACT", "pact"),
        _rival("pams", "PAMS", "pams"),
        _rival("quantsr", "QuantSR", "quantsr"),
        _rival("quantsr-plain", "QuantSR, plain", "quantsr", **_PLAIN),
        _rival("n2uq", "N2UQ", "n2uq"),
        Method("dls", "DLS, LSQ weights", {"weight": "lsq", "weight_init": "mse"}, ours=True),
        Method("rfa", "LSQ activations, RFA", {"activation": "lsq", "init": "mse"}, ours=True),
        Method("dls+rfa", "DLS + RFA", ours=True),
    )
}
"""All methods by key; "float" is no method."""


def get_method(key: str) -> Method:
    """The method of that key.

    Raises:
        ConfigError: unknown key.
    """
    if key not in METHODS:
        raise ConfigError(f"method {key!r} is unknown; allowed: {', '.join(METHODS)}")
    return METHODS[key]


RFA_COMPONENTS: dict[str, Any] = {"linear": nn.Linear, "conv": nn.Conv2d, "scan": F.conv2d}
"""What RFA can be limited to: layers, or a scan's projections, which are calls without a layer."""


def build_qconfig(
    weight_bits: int, act_bits: int, settings: dict[str, Any]
) -> QConfig | QConfigMapping:
    """The QConfig of a method's settings.

    Args:
        weight_bits: 2 to 8.
        act_bits: 2 to 8.
        settings: keyword arguments of `get_qmir_qconfig`, and `rfa_on`, the one component of
            `RFA_COMPONENTS` whose weights RFA quantizes; the others have LSQ's.

    Raises:
        ConfigError: unknown settings.
    """
    settings = dict(settings)
    component = settings.pop("rfa_on", None)
    qconfig = get_qmir_qconfig(weight_bits, act_bits, **settings)
    if component is None:
        return qconfig
    if component not in RFA_COMPONENTS:
        raise ConfigError(f"rfa_on={component!r} is unknown; allowed: {', '.join(RFA_COMPONENTS)}")
    others = get_qmir_qconfig(weight_bits, act_bits, **(settings | get_method("dls").settings))
    # A class goes before the call that means the same, so the call's setting is not the layers'.
    mapping = QConfigMapping().set_global(others).set_object_type(nn.Conv2d, others)
    return mapping.set_object_type(RFA_COMPONENTS[component], qconfig)
