"""Bit widths by name, glob, module class or operator: a `QConfigMapping` from one table."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping

from qmir_ao.errors import ConfigError
from qmir_ao.quant.patterns import PATTERNS
from qmir_ao.quant.qconfig import get_qmir_qconfig

Bits = int | tuple[int, int] | None
"""One width, (weight bits, activation bits), or None for float."""

_WILD = re.compile(r"[*?\[]")
_LAYERS = {kind for pattern in PATTERNS for kind in pattern.modules}
_OPERATORS = [target for pattern in PATTERNS for target in pattern.targets]
_SHOWN = 6


def get_qmir_qconfig_mapping(
    model: nn.Module,
    bits: Mapping[Any, Bits] | None = None,
    *,
    default: Bits = 4,
    keep_float: Iterable[Any] = (),
    **settings: Any,
) -> QConfigMapping:
    """Build a `QConfigMapping` from bits by module name, glob, module class or operator.

    A name holds for the module and everything below it, the nearest name wins. Names go before
    globs (the first that matches), globs before classes of blocks, these before classes of layers,
    and operators (`torch.ops.qmir.selective_scan`, `F.conv1d`) come last. What stays in float by
    default is quantized only where its own name is given.

    Args:
        model: the float network; read only.
        bits: key to an integer from 2 to 8, (weight bits, activation bits), or None for float.
        default: bits of everything else.
        keep_float: keys of what stays in float, before any of `bits` of the same sort.
        **settings: further arguments of `get_qmir_qconfig`, for all alike.

    Returns:
        A mapping for `prepare_qat` or `prepare_ptq` with either capture.

    Raises:
        ConfigError: a key that names nothing in the network, with the nearest name, or bad bits.
    """
    keys: dict[Any, Bits] = dict.fromkeys(keep_float)
    keys |= {key: value for key, value in (bits or {}).items() if key not in keys}
    mapping = QConfigMapping().set_global(_qconfig(default, settings))
    modules = {name: module for name, module in model.named_modules() if name}
    blocks: dict[str, QConfig | None] = {}
    for key, value in keys.items():
        qconfig = _qconfig(value, settings)
        if isinstance(key, str) and _WILD.search(key):
            _check_glob(key, modules)
            mapping.set_module_name_regex(f"{fnmatch.translate(key)[:-2]}(\\..*)?\\Z", qconfig)
        elif isinstance(key, str):
            _check_name(key, modules)
            mapping.set_module_name(key, qconfig)
        elif isinstance(key, type):
            found = _check_class(key, modules)
            if key in _LAYERS:
                mapping.set_object_type(key, qconfig)
            else:
                blocks |= dict.fromkeys(found, qconfig)
        else:
            mapping.set_object_type(_check_operator(key), qconfig)
    # The innermost block decides: deeper names first, as the first pattern that matches wins.
    for name in sorted(blocks, key=lambda name: -name.count(".")):
        mapping.set_module_name_regex(f"{re.escape(name)}(\\..*)?\\Z", blocks[name])
    return mapping


def check_mapping(mapping: QConfigMapping, model: nn.Module) -> None:
    """Refuse a mapping that names a module which the network does not have.

    Raises:
        ConfigError: an unknown name, or a pattern that matches none, with the nearest name.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for name in mapping.module_name_qconfigs:
        if name:
            _check_name(name, modules)
    for pattern in mapping.module_name_regex_qconfigs:
        if not any(re.match(pattern, name) for name in modules):
            raise ConfigError(
                f"QConfigMapping: the pattern {pattern!r} matches no module of the network; "
                f"{_known(modules)}"
            )


def _qconfig(value: Bits, settings: Mapping[str, Any]) -> QConfig | None:
    if value is None:
        return None
    weight, act = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
    return get_qmir_qconfig(weight, act, **settings)


def _check_name(name: str, modules: Mapping[str, nn.Module]) -> None:
    if name not in modules:
        raise ConfigError(f"no module of the network is named {name!r}; {_nearest(name, modules)}")


def _check_glob(glob: str, modules: Mapping[str, nn.Module]) -> None:
    if not fnmatch.filter(modules, glob):
        plain = _WILD.sub("", glob.replace("]", "")).strip(".")
        raise ConfigError(
            f"the glob {glob!r} matches no module of the network; {_nearest(plain, modules)}"
        )


def _check_class(kind: type, modules: Mapping[str, nn.Module]) -> list[str]:
    found = [name for name, module in modules.items() if isinstance(module, kind)]
    if not found:
        classes = sorted({type(module).__name__ for module in modules.values()})
        close = difflib.get_close_matches(kind.__name__, classes, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"no module of the network is a {kind.__name__}; {hint}Its classes: "
            f"{', '.join(classes)}"
        )
    return found


def _check_operator(key: Any) -> Any:
    if not callable(key) or key not in _OPERATORS:
        raise ConfigError(
            f"{key!r} is no name, glob, module class or operator that can be quantized; operators: "
            f"{', '.join(sorted({str(getattr(t, '__name__', t)) for t in _OPERATORS}))}"
        )
    return key


def _nearest(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The module that was probably meant: close as a whole, or close in its last part."""
    close = difflib.get_close_matches(name, modules, n=1)
    if not close:
        tail = name.rsplit(".", 1)[-1]
        tails = {full.rsplit(".", 1)[-1]: full for full in reversed(list(modules))}
        close = [tails[part] for part in difflib.get_close_matches(tail, tails, n=1)]
    return f"did you mean {close[0]!r}?" if close else _known(modules)


def _known(modules: Mapping[str, nn.Module]) -> str:
    names = list(modules)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"its modules: {', '.join(names[:_SHOWN])}{more}"
