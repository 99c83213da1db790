"""Find the kernel sources, in a checkout as in an installed package, and make one text of each."""

import functools
import hashlib
import re
from importlib import resources
from importlib.resources.abc import Traversable

from qmir_ao.errors import ConfigError

_INCLUDE = re.compile(r'^\s*#include\s+"([\w./]+)"\s*$')


def folder() -> Traversable:
    """The folder of kernel sources; its headers are in `include`."""
    return resources.files("qmir_ao.cuda")


def names() -> list[str]:
    """Names of the kernel sources, without `.cu`."""
    files = (path.name for path in folder().iterdir())
    return sorted(name.removesuffix(".cu") for name in files if name.endswith(".cu"))


def flatten(text: str, name: str, include: Traversable, seen: set[str] | None = None) -> str:
    """`text` with the headers that it includes in place, each once.

    Args:
        text: source text; only `#include "..."` of files in `include` is resolved.
        name: what compilers call the text in their messages.
        include: folder of the headers.
        seen: headers that the text has already.

    Raises:
        ConfigError: a header is missing.
    """
    seen = set() if seen is None else seen
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(text.splitlines(), 1):
        found = _INCLUDE.match(line)
        if found is None:
            lines.append("" if line.strip() == "#pragma once" else line)
            continue
        header = found[1]
        if header not in seen:
            seen.add(header)
            path = include / header
            if not path.is_file():
                raise ConfigError(
                    f"{name}:{number} includes {header!r}, which is not in {include}; "
                    "reinstall qmir_ao"
                )
            lines.append(flatten(path.read_text(), header, include, seen))
        lines.append(f'#line {number + 1} "{name}"')
    return "\n".join(lines) + "\n"


@functools.cache
def read(name: str) -> str:
    """One text with the kernels of `cuda/<name>.cu` and all headers they include.

    Raises:
        ConfigError: there is no such source.
    """
    path = folder() / f"{name}.cu"
    if not path.is_file():
        raise ConfigError(f"no kernel source {name!r}; there are: {', '.join(names())}")
    return flatten(path.read_text(), path.name, folder() / "include")


def digest(*parts: str) -> str:
    """Key of the parts for a cache: 24 hexadecimal digits of their SHA-256."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode() + b"\0")
    return whole.hexdigest()[:24]
