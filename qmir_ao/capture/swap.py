"""Put stand-ins in the place of callables for the duration of a capture, for one thread only.

A plain function is given other code, so that every reference to it is covered, also those in
closures, default arguments and partials. An autograd function gets another `apply`. What has no
code of its own (an extension module's function, a decorated one) is replaced in the namespaces
that hold it. Other threads go on calling the originals, and all is put back afterwards.
"""

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

Adapter = Callable[..., Any]

_CAPTURE = threading.RLock()
_active: set[int] = set()
# Entries stay: another thread may be between the first line of a stand-in's code and its call, and
# they keep the function alive, so that no other one gets its id.
_PLACED: dict[int, tuple[types.FunctionType, Adapter]] = {}
_KEY = -7_264_019  # a constant in the code of `_stand_in`, replaced by the function's id


def dispatch(key: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call what stands for the function with this id; the code of a swapped function."""
    return _PLACED[key][1](*args, **kwargs)


def _stand_in(*args: Any, **kwargs: Any) -> Any:
    from qmir_ao.capture.swap import dispatch

    return dispatch(-7_264_019, args, kwargs)


def is_function_class(target: Any) -> bool:
    """Whether `target` is a subclass of `torch.autograd.Function`."""
    return isinstance(target, type) and issubclass(target, torch.autograd.Function)


def has_plain_code(target: Any) -> bool:
    """Whether `target` is a function whose code can be exchanged: it closes over nothing."""
    return isinstance(target, types.FunctionType) and not target.__closure__


def _for_this_thread(adapter: Adapter, original: Adapter) -> Adapter:
    thread = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = adapter if threading.get_ident() == thread else original
        return chosen(*args, **kwargs)

    return call


def _swap_code(function: types.FunctionType, adapter: Adapter) -> Callable[[], None]:
    code, key = function.__code__, id(function)
    original = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    _PLACED[key] = (function, _for_this_thread(adapter, original))
    placed = _stand_in.__code__
    constants = tuple(key if c == _KEY else c for c in placed.co_consts)
    function.__code__ = placed.replace(co_consts=constants, co_name=code.co_name)

    def put_back() -> None:
        function.__code__ = code
        _PLACED[key] = (function, original)

    return put_back


def _swap_apply(cls: Any, adapter: Adapter) -> Callable[[], None]:
    own = vars(cls).get("apply")
    original, forward = cls.apply, cls.forward
    thread = threading.get_ident()

    def apply(called: Any, *args: Any, **kwargs: Any) -> Any:
        # A subclass with another forward inherits this method, but not its meaning.
        if threading.get_ident() == thread and called.forward is forward:
            return adapter(*args, **kwargs)
        return original.__func__(called, *args, **kwargs)

    return set_attribute(cls, "apply", classmethod(apply), own)


def set_attribute(owner: Any, name: str, value: Any, previous: Any) -> Callable[[], None]:
    """Set a class attribute; the result puts `previous` back, or deletes it where None."""
    setattr(owner, name, value)

    def put_back() -> None:
        if previous is None:
            delattr(owner, name)
        else:
            setattr(owner, name, previous)

    return put_back


def namespaces(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Where callables are held by name: the model's modules, then all imported modules."""
    for module in model.modules():
        yield vars(module)
    for imported in list(sys.modules.values()):
        yield getattr(imported, "__dict__", {})


def _swap_references(
    model: nn.Module, targets: dict[int, tuple[Any, Adapter]]
) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Replace references by name; yields (namespace, name, value) of each place before it is."""
    for namespace in namespaces(model):
        for name, value in list(namespace.items()):
            # `type`, not `isinstance`: deprecated names warn when they are asked for their class.
            if type(value) is types.MethodType and value.__name__ == "apply":
                found = targets.get(id(value.__self__))
            else:
                found = targets.get(id(value))
            if found is not None and not is_function_class(value):
                yield namespace, name, value
                namespace[name] = _for_this_thread(found[1], value)


@contextlib.contextmanager
def swapped(model: nn.Module, pairs: Sequence[tuple[Any, Adapter]]) -> Iterator[None]:
    """Call each adapter in the place of its original while the block runs in this thread.

    Args:
        model: the model to be captured; its attributes are searched for references.
        pairs: (original, adapter). The first pair of an original counts.
    """
    if not pairs:
        yield
        return
    with _CAPTURE, contextlib.ExitStack() as undo:
        seen: set[int] = set()
        by_name: dict[int, tuple[Any, Adapter]] = {}
        for original, adapter in pairs:
            if id(original) in seen:
                continue
            seen.add(id(original))
            if has_plain_code(original):
                if id(original) not in _active:  # a capture inside a capture finds it swapped
                    _active.add(id(original))
                    undo.callback(_active.discard, id(original))
                    undo.callback(_swap_code(original, adapter))
                continue
            by_name[id(original)] = (original, adapter)
            if is_function_class(original):
                undo.callback(_swap_apply(original, adapter))
        if by_name:
            for namespace, name, value in _swap_references(model, by_name):
                undo.callback(namespace.__setitem__, name, value)
        yield
