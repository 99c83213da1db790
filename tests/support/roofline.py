"""What the integer kernels can reach at best, from counted bytes and operations: no measurement."""

import math
from collections.abc import Iterator
from typing import NamedTuple

SECTION = """
## Lower bounds of times: predictions, not measurements

Counted from the shapes of MambaIR, one image: each operand read once, each result written once,
every multiply-add as two operations. A time is the larger one of bytes by bandwidth and of
operations by rate, in microseconds. Nothing here was run; caches, launches and tails are left out.

- Orin: AGX 64 GB at 1.3 GHz; 152.8 GB/s, which others measured of the 204.8 in its data sheet; 85
  (int8) and 170 (int4) dense tera-operations, times the 0.79 that others measured for bf16.
- Hopper: H100 SXM; 3.35 TB/s and 1979 tera-operations (int8) of its data sheet, times 0.9 and 0.7,
  which are guesses. Its 4-bit products are emulated: the kernels widen nibbles and take the 8-bit
  ones.
- Instructions of statistics: 54 float ones for each element on Orin, where pairs of floats stand
  for doubles, and 8 double ones on a Hopper.

| work | MB | G operations | Orin us | bound by | Hopper us | bound by |
|---|---|---|---|---|---|---|
"""


class Machine(NamedTuple):
    """Bytes, operations of 8 and 4 bits, and instructions of sums, each per second."""

    bandwidth: float
    int8: float
    int4: float
    sums: float


ORIN = Machine(152.8e9, 0.79 * 85.2e12, 0.79 * 170e12, 16 * 128 * 1.3e9 / 54)
HOPPER = Machine(0.9 * 3.35e12, 0.7 * 1979e12, 0.7 * 1979e12, 132 * 64 * 1.755e9 / 8)


class Work(NamedTuple):
    """One kernel on one shape; `summed` elements go into statistics.

    Products of 0 bits are no work of tensor cores, and take no time here.
    """

    name: str
    moved: float
    operations: float = 0.0
    bits: int = 8
    summed: int = 0

    def time(self, machine: Machine) -> tuple[float, str]:
        """Seconds, and what takes them."""
        rate = {0: math.inf, 4: machine.int4, 8: machine.int8}[self.bits]
        parts = {
            "memory": self.moved / machine.bandwidth,
            "products": self.operations / rate,
            "sums": self.summed / machine.sums,
        }
        bound = max(parts, key=parts.__getitem__)
        return parts[bound], bound


def _linear(pixels: int, inputs: int, features: int, bits: int) -> Work:
    moved = pixels * (inputs + 4 * features) + inputs * features * bits / 8
    name = f"linear {pixels} x {inputs} -> {features}, {bits} bits"
    return Work(name, moved, 2.0 * pixels * inputs * features, bits)


def _convolution(side: int, inputs: int, features: int, bits: int) -> Work:
    pixels = side * side
    moved = pixels * (inputs + 4 * features) + 9 * inputs * features * bits / 8
    name = f"conv 3x3 {side}x{side}, {inputs} -> {features}, {bits} bits"
    return Work(name, moved, 18.0 * pixels * inputs * features, bits)


def _chains(pixels: int, width: int, inner: int) -> Iterator[Work]:
    """Fused quantizers by each of the ways of backend/cuda/chain_quantize.py."""
    outer, hidden = pixels * width, pixels * inner
    yield Work(f"norm, token codes {pixels} x {width}", 5.0 * outer, summed=2 * outer)
    yield Work(f"norm * silu, token codes {pixels} x {inner}", 9.0 * hidden, summed=2 * hidden)
    yield Work(f"silu, codes {inner} x {pixels}", 9.0 * hidden, summed=hidden)
    yield Work(f"norm, codes as planes {width} x {pixels}", 17.0 * outer, summed=2 * outer)


def works() -> Iterator[Work]:
    """The integer work of MambaIR-light (60 channels) and MambaIR (180)."""
    for side, width, inner in ((64, 60, 72), (320, 60, 72), (480, 60, 72), (64, 180, 360)):
        pixels, elements = side * side, side * side * width
        yield Work(f"dls_qparams {pixels} x {width}", 4.0 * elements, summed=elements)
        yield Work(f"dls_quantize {pixels} x {width}", 5.0 * elements)
        yield from _chains(pixels, width, inner)
        for bits in (4, 8):
            yield _linear(pixels, width, 2 * inner, bits)
            yield _linear(pixels, inner, width, bits)
            yield _convolution(side, width, width, bits)
        yield Work(
            f"depthwise 3x3 {side}x{side}, {inner}", 5.0 * pixels * inner, 18.0 * pixels * inner, 0
        )


def section() -> str:
    """The table with what it rests on."""
    rows = []
    for work in works():
        cells = [work.name, f"{work.moved / 1e6:.2f}", f"{work.operations / 1e9:.2f}"]
        for machine in (ORIN, HOPPER):
            seconds, bound = work.time(machine)
            cells += [f"{seconds * 1e6:.1f}", bound]
        rows.append(f"| {' | '.join(cells)} |")
    return SECTION + "\n".join(rows) + "\n"
