"""Adapters that users register for scan functions of their own."""

import inspect
import types
from collections.abc import Callable
from typing import Any

from qmir_ao.capture.swap import is_function_class
from qmir_ao.errors import ConfigError

_REGISTERED: dict[int, "Registration"] = {}


class Registration:
    """One registered adapter; `remove()` or the end of a `with` block takes it out again.

    Attributes:
        original: what is replaced while a model is captured.
        adapter: what is called instead.
    """

    def __init__(self, original: Any, adapter: Callable[..., Any]) -> None:
        self.original, self.adapter = original, adapter

    def remove(self) -> None:
        """Take the adapter out; does nothing where it is out already."""
        if _REGISTERED.get(id(self.original)) is self:
            del _REGISTERED[id(self.original)]

    def __enter__(self) -> "Registration":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _target(fn: Any) -> Any:
    """The autograd function of `Function.apply`, else `fn` itself."""
    if isinstance(fn, types.MethodType) and fn.__name__ == "apply":
        return fn.__self__ if is_function_class(fn.__self__) else fn
    return fn


def register_selective_scan(fn: Any, adapter: Callable[..., Any]) -> Registration:
    """Replace `fn` by `adapter` in every model that is captured from now on.

    Args:
        fn: the function a model calls: a plain function under whatever names it is imported, a
            `torch.autograd.Function` subclass or its `apply`, or any other callable that a module
            or a namespace holds by name.
        adapter: takes the arguments that the model gives to `fn` and returns what `fn` would, made
            of `torch.ops.qmir.selective_scan` and operators that can be traced.

    Returns:
        A handle with `remove()`, which also works as a context manager.

    Raises:
        ConfigError: an argument that cannot be called, or an `fn` that is registered already.
    """
    for name, value in (("fn", fn), ("adapter", adapter)):
        if not callable(value):
            raise ConfigError(
                f"register_selective_scan: {name} must be callable, got {value!r:.80} of type "
                f"{type(value).__name__}"
            )
    target = _target(fn)
    if isinstance(target, type) and not is_function_class(target):
        raise ConfigError(
            f"register_selective_scan: fn is the class {target.__name__}; allowed are functions "
            "and torch.autograd.Function subclasses. Register the function that its forward calls."
        )
    if target is adapter:
        raise ConfigError("register_selective_scan: adapter is fn itself")
    if id(target) in _REGISTERED:
        raise ConfigError(
            f"register_selective_scan: {name_of(target)} is registered already; call remove() on "
            "the handle that the first registration returned"
        )
    registration = Registration(target, adapter)
    _REGISTERED[id(target)] = registration
    return registration


def registered() -> list[tuple[Any, Callable[..., Any]]]:
    """All registered pairs (original, adapter)."""
    return [(r.original, r.adapter) for r in _REGISTERED.values()]


def name_of(fn: Any) -> str:
    """Qualified name of a callable, for messages."""
    module = inspect.getmodule(fn)
    name = getattr(fn, "__qualname__", getattr(fn, "__name__", repr(fn)))
    return f"{module.__name__}.{name}" if module is not None else str(name)
