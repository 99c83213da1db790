"""Say where in the user's code a capture failed: module path, file, line and the line itself."""

import contextlib
import linecache
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import qmir_ao.errors
from qmir_ao.errors import CaptureError

_NOT_THE_USERS = tuple(
    str(Path(folder).resolve())
    for folder in (
        Path(torch.__file__).parent,
        Path(qmir_ao.errors.__file__).parent,
        sysconfig.get_paths()["stdlib"],
    )
)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, the innermost first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    yield from reversed(chain)


def _is_users(filename: str) -> bool:
    own_packages = "site-packages" in filename  # below the standard library's folder, in a venv
    path = str(Path(filename).resolve())
    if filename.startswith("<"):
        return False
    outside = [f for f in _NOT_THE_USERS if path.startswith(f + "/")]
    stdlib = _NOT_THE_USERS[-1]
    return not outside or (own_packages and outside == [stdlib])


def _owner(frame: FrameType) -> Any:
    """First argument of the function of a frame: `self` in a method."""
    names = frame.f_code.co_varnames
    return frame.f_locals.get(names[0]) if names else None


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    """Frames of the user's code in the first traceback that has any, the outermost first."""
    for cause in _causes(error):
        walked = traceback.walk_tb(cause.__traceback__)
        found = [(f, line) for f, line in walked if _is_users(f.f_code.co_filename)]
        if any(isinstance(_owner(f), nn.Module) for f, _ in found):
            return found
    return []


def blame(model: nn.Module, error: BaseException) -> str:
    """Where `error` left the model's code: " at file:line in module 'path': `code`", or ""."""
    frames = _frames(error)
    if not frames:
        return ""
    frame, line = frames[-1]
    paths = {id(module): path for path, module in model.named_modules()}
    held = (paths.get(id(_owner(f))) for f, _ in reversed(frames))
    path = next((p for p in held if p is not None), None)
    filename = frame.f_code.co_filename
    code = linecache.getline(filename, line).strip()
    owner = "" if path is None else f" in module {path or type(model).__name__!r}"
    return f" at {filename}:{line}{owner}: `{code}`"


@contextlib.contextmanager
def blamed(model: nn.Module) -> Iterator[None]:
    """Add to a `CaptureError` of the block where in the model's code it came from."""
    try:
        yield
    except CaptureError as error:
        place = blame(model, error)
        if not place:
            raise
        raise CaptureError(f"{error} The capture stopped{place}.") from error
