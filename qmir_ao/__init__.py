"""qmir_ao: low-bit quantization of image-restoration networks, trained and run in integers."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ != "qmir_ao":  # the checkout root is on __path__ below; never import this file twice
    raise ImportError(f"import qmir_ao, not {__name__}")

__version__ = "0.1.0"

# In a checkout the folders passes/, backend/ and recipes/ lie beside this one, not in it.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "passes" / "__init__.py").is_file():
    __path__.append(str(_CHECKOUT))

if TYPE_CHECKING:
    from qmir_ao.api import (
        assign_bits,
        calibrate,
        compare,
        convert_and_lower,
        explain,
        load,
        prepare_ptq,
        prepare_qat,
        save,
        sensitivity,
    )
    from qmir_ao.capture.registry import register_selective_scan
    from qmir_ao.errors import QmirError
    from qmir_ao.quant.assignment import get_qmir_qconfig_mapping
    from qmir_ao.quant.fake_quant import DLSFakeQuantize
    from qmir_ao.quant.qconfig import get_qmir_qconfig, qmir_qconfig
    from qmir_ao.quant.quantizer import QmirQuantizer
    from qmir_ao.quant.rfa import RFAFakeQuantize

__all__ = [
    "DLSFakeQuantize",
    "QmirError",
    "QmirQuantizer",
    "RFAFakeQuantize",
    "assign_bits",
    "calibrate",
    "compare",
    "convert_and_lower",
    "explain",
    "get_qmir_qconfig",
    "get_qmir_qconfig_mapping",
    "load",
    "prepare_ptq",
    "prepare_qat",
    "qmir_qconfig",
    "register_selective_scan",
    "save",
    "sensitivity",
]

# torchao takes seconds to import: each name brings its module only when it is asked for.
_HOMES = {
    "DLSFakeQuantize": "qmir_ao.quant.fake_quant",
    "QmirError": "qmir_ao.errors",
    "QmirQuantizer": "qmir_ao.quant.quantizer",
    "RFAFakeQuantize": "qmir_ao.quant.rfa",
    "get_qmir_qconfig": "qmir_ao.quant.qconfig",
    "get_qmir_qconfig_mapping": "qmir_ao.quant.assignment",
    "qmir_qconfig": "qmir_ao.quant.qconfig",
    "register_selective_scan": "qmir_ao.capture.registry",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qmir_ao' has no attribute {name!r}")
    if name in ("DLSFakeQuantize", "RFAFakeQuantize"):
        importlib.import_module("qmir_ao.backend.kernels")  # their operators then have kernels
    return getattr(importlib.import_module(_HOMES.get(name, "qmir_ao.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
