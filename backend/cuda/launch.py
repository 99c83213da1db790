"""The one way in which operators start kernels, so that tests can put a simulator in its place."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from qmir_ao.errors import DeviceError, DeviceSizeError

Argument = Tensor | int | float | None
Size3 = tuple[int, int, int]

NO_DEFINES: Mapping[str, int] = MappingProxyType({})
MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_INT = 2**31 - 1
INT_SIZES = ("qmir_conv2d",)
"""How names of kernels begin that take sizes as `int`; all others take them as `int64_t`."""
SMALLER = "Split the work into smaller batches, images or tiles"
VECTOR_BYTES = 16
"""Alignment of the memory that kernels read in vectors."""


class Launcher(Protocol):
    """Starts a kernel: on the device of its tensors, or in the tests' simulator."""

    def __call__(
        self,
        source: str,
        kernel: str,
        grid: Size3,
        block: Size3,
        args: Sequence[Argument],
        *,
        shared: int = 0,
        defines: Mapping[str, int] = NO_DEFINES,
    ) -> None:
        """Start `kernel` of `cuda/<source>.cu`.

        Args:
            source: name of the source, without `.cu`.
            kernel: C name of the kernel.
            grid: blocks in x, y and z.
            block: threads in x, y and z.
            args: in the kernel's order. A tensor is passed as the address of its first element,
                None as a null pointer, an int as 64 bits (`int` or `int64_t` in the kernel), a
                float as float32.
            shared: bytes of dynamic shared memory.
            defines: preprocessor constants of this variant.
        """


def check_sizes(kernel: str, grid: Size3, block: Size3) -> None:
    """Refuse a grid or block that no device takes.

    Raises:
        DeviceSizeError: a size of zero or beyond CUDA's limits.
    """
    threads = block[0] * block[1] * block[2]
    if min(*grid, *block) < 1 or threads > MAX_THREADS:
        raise DeviceSizeError(
            f"{kernel}: grid {grid} of blocks {block}; sizes must be positive, a block at most "
            f"{MAX_THREADS} threads. {SMALLER}"
        )
    if any(size > most for size, most in zip(grid, MAX_GRID, strict=True)):
        raise DeviceSizeError(f"{kernel}: grid {grid} is beyond {MAX_GRID}. {SMALLER}")


def check_arguments(kernel: str, args: Sequence[Argument]) -> None:
    """Refuse a size that a kernel's parameters would cut off.

    Raises:
        DeviceSizeError: which number, and what fits.
    """
    if kernel.startswith(INT_SIZES):
        largest = max((abs(a) for a in args if isinstance(a, int)), default=0)
        check_count(f"{kernel}: a size", largest)


def check_count(what: str, count: int, most: int = MAX_INT) -> None:
    """Refuse a number that a kernel cannot count to.

    Args:
        what: what is counted, for the message.
        count: the number.
        most: largest one that fits.

    Raises:
        DeviceSizeError: the number is larger.
    """
    if count > most:
        raise DeviceSizeError(f"{what} of {count} is beyond {most}. {SMALLER}")


def check_device(op: str, *tensors: Tensor | None) -> torch.device:
    """The device that all tensors are on.

    Raises:
        DeviceError: they are on several, with the fix.
    """
    devices = {x.device for x in tensors if x is not None}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices)))
        raise DeviceError(
            f"qmir::{op}: its tensors are on {names}; move them to one device, such as "
            f"model.to({str(max(devices, key=str))!r})"
        )
    return devices.pop()


def dense(x: Tensor) -> Tensor:
    """`x` in contiguous memory aligned to VECTOR_BYTES, copied only where it is not."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % VECTOR_BYTES else x


def ceil_div(a: int, b: int) -> int:
    """Quotient of two positive integers, rounded up."""
    return -(-a // b)
