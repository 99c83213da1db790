"""The quantization methods that are compared, as settings of `get_qmir_qconfig`.

Every method has one weight step for each output channel and a searched start, unless its name says
"plain": then it starts as its paper does and rounds a scan's A, D and delta bias by itself.
"""

from dataclasses import dataclass, field
from typing import Any

from qmir_ao.errors import ConfigError


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
