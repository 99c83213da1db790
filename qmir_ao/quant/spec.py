"""Bit widths and code ranges, with their validation."""

from typing import Any

from qmir_ao.errors import ConfigError

MIN_BITS, MAX_BITS = 2, 8


def check_bits(bits: Any) -> int:
    """Return `bits` if it is an integer from 2 to 8.

    Raises:
        ConfigError: anything else, including booleans, strings and floats.
    """
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(
            f"bits={bits!r} is not supported: bits must be an integer from {MIN_BITS} to "
            f"{MAX_BITS}, such as get_qmir_qconfig(weight_bits=4, act_bits=4)"
        )
    return bits


def code_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """Smallest and largest code of `bits` bits."""
    check_bits(bits)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def container_bits(bits: int) -> int:
    """Width in which codes of `bits` bits are stored: 2, 4 or 8."""
    check_bits(bits)
    return next(width for width in (2, 4, 8) if bits <= width)


def choose(kind: str, name: Any, allowed: Any) -> Any:
    """Return `name` if it is allowed.

    Raises:
        ConfigError: it is not; the message lists what is.
    """
    if name not in allowed:
        raise ConfigError(f"{kind}={name!r} is unknown; allowed: {', '.join(map(repr, allowed))}")
    return name
