"""Typed C functions of the kernel library: argument types are set once, so calls stay cheap."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}


@functools.cache
def bind(lib: ctypes.CDLL, name: str, arguments: str, returns: bool = False) -> Callable[..., int]:
    """The C function `name` of `lib` that takes pointers ("p"), int64 ("i") and double ("d").

    Args:
        lib: the kernel library.
        name: C name.
        arguments: one letter per argument, such as "pppi".
        returns: whether it returns an int64 rather than nothing.
    """
    function = lib[name]
    function.argtypes = [_TYPES[letter] for letter in arguments]
    function.restype = ctypes.c_int64 if returns else None
    return function


def all_float32(*tensors: torch.Tensor) -> bool:
    """Whether the kernels, which know float32 only, can take these tensors."""
    return all(t.dtype == torch.float32 for t in tensors)


def dense(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in contiguous memory, as the kernels read them."""
    return tuple(t.contiguous() for t in tensors)
