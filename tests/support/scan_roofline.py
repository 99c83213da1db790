"""Write docs/scan_kernels.md: what the CUDA scans move and compute, and how fast they can be.

Predictions, not measurements: counts of bytes and instructions over the rates of a GPU.
`python -m support.scan_roofline` in tests/ writes the page.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qmir_ao.backend.cuda.launch import ceil_div
from qmir_ao.backend.cuda.scan_chunks import WARP, ScanSize, images
from qmir_ao.backend.cuda.scan_q import variant

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scan_kernels.md"


class Gpu(NamedTuple):
    """Rates of a GPU: multiprocessors, clock in Hz, memory in bytes/s that others have measured."""

    name: str
    processors: int
    clock: float
    memory: float


GPUS = (
    Gpu("AGX Orin 64 GB", 16, 1.3e9, 152.8e9),
    # 90 % of 3.35 TB/s, the usual share.
    Gpu("H100 SXM", 132, 1.755e9, 3.0e12),
)
ISSUE = 4
"""Warp instructions that a multiprocessor starts in a cycle."""
EXPONENTIALS = 0.5
"""Warp instructions of 2^x that a multiprocessor starts in a cycle: 16 lanes."""
SHARED = 1
"""Rows of 128 bytes of shared memory that it moves in a cycle."""

# Instructions of a warp for one step of 32 channels, counted in the sm_87 binary of NVRTC 12.6
# (inner loop, first pass and second), and estimated for loads and stores of a tile.
INSTRUCTIONS = {
    ("4-bit", 10): (55, 87),
    ("4-bit", 16): (72, 123),
    ("8-bit", 16): (100, 156),
    ("float32", 10): (155 + 92, 161 + 92),
    ("float32", 16): (240 + 92, 247 + 92),
}
STAGING = (18, 30)
SIZES = ((72, 10), (360, 16))
SIDES = ((64, 64), (256, 256), (480, 480))


class Cost(NamedTuple):
    """What one call takes.

    Attributes:
        size: chunks.
        exponentials: in loops; tables are a few thousand more.
        operations: float32 operations in loops, additions, products and fused ones alike.
        instructions: of warps.
        shared: rows of 128 bytes of shared memory.
        bytes: from and to memory.
    """

    size: ScanSize
    exponentials: int
    operations: int
    instructions: float
    shared: float
    bytes: float

    def times(self, gpu: Gpu) -> dict[str, float]:
        """Milliseconds by each limit."""
        cycle = 1e3 / (gpu.processors * gpu.clock)
        fast = self.exponentials / WARP / EXPONENTIALS
        return {
            "issue": self.instructions / ISSUE * cycle,
            "shared": self.shared / SHARED * cycle,
            "2^x": fast * cycle,
            "memory": self.bytes / gpu.memory * 1e3,
        }


def cost(kind: str, channels: int, states: int, height: int, width: int) -> Cost:
    """Cost of a scan of one image in four directions.

    Args:
        kind: operands, a key of INSTRUCTIONS.
        channels: of the image.
        states: of a channel.
        height: rows.
        width: columns.
    """
    size = images(1, channels, height, width, 8)
    pixels, all_channels = height * width, 4 * channels
    state_steps = all_channels * states * pixels
    warp_steps = 4 * ceil_div(channels, WARP) * pixels
    passes = sum(INSTRUCTIONS[kind, states]) + sum(STAGING)
    quantized = kind != "float32"
    table = quantized and variant(states, 2 ** int(kind[0])).table
    element = 1 if quantized else 4
    # A row of 32 decays a state in both passes where they are a table; B, B and C for all lanes at
    # once; codes or values of u and delta; tiles and outputs.
    shared = warp_steps * (2 * (states + 1) * table + 3 * ceil_div(states, 4) + 8)
    operands = 2 * (channels + all_channels) + 3 * 4 * states
    # Two writes and a read by the carry, its write, and a read.
    carries = 6 * 4 * all_channels * states * size.slots
    outputs = (4 + 4 + 1) * 4 * channels
    return Cost(
        size,
        exponentials=0 if table or not quantized else 2 * state_steps,
        operations=(3 + 5) * state_steps if quantized else 2 * 14 * state_steps,
        instructions=warp_steps * passes,
        shared=shared,
        bytes=(operands * element + outputs) * pixels + carries,
    )


HEAD = """# CUDA scans: what limits them

**Predictions, not measurements.** No number on this page was measured on a GPU. They are counts of
instructions (in the sm_87 binary; loads and stores of tiles are estimated) and bytes over rates. A
multiprocessor starts 4 warp instructions in a cycle, and 16 powers of two, and moves 128 bytes of
shared memory. {rates}.
A real kernel reaches a part of its limit; small images are bound by the start of five kernels.

`ss2d_scan_q` and `ss2d_scan` go through an image twice: a first pass over the chunks of all
directions gives the state that each ends with and its decay, the carry takes them along each
direction, and a second pass gives the outputs. Four images are then added. Instructions for one
step of 32 channels, first pass and second:

| operands | N | first pass | second pass | exponentials of a state and step |
|---|---|---|---|---|
{instructions}

- 4-bit delta: decays are a table of 16 rows in shared memory, one bank for each lane, so that no
  code leads to a conflict: 22 KB at N = 10 and 34 KB at N = 16, which lets two blocks of eight
  warps share an Orin's 164 KB. A table takes codes x (N + 2) exponentials of a channel, in all.
- 8-bit delta: the same table would take 544 KB for 32 channels and 16 states; 136 KB for 8
  channels, whose four steps at once would read B and C four times as often: 3 rows of shared memory
  a state and step, where 2^x takes 2 cycles. So only delta is a table (32 KB), and a decay is one
  `ex2.approx`, off by 2^-22 at most (`scan_q_computed_roundings` in tests/support/tolerances.py).
- Both passes are bound by the start of instructions: the second multiplies and adds apart, as the
  reference does, where a float scan fuses them. That is the price of the reference's bytes.
- Chunks depend on the shape of a sample alone: results are the same on every GPU, in every batch.
  The bound of the sequential scan (`scan_q_roundings`) holds for any chunks; one chunk gives the
  reference's bytes. The table below says how many chunks rows and columns have, and their steps.
- Codes of delta out of range are found without waiting for the GPU: the outputs of that channel are
  NaN from there on, a flag in pinned memory is set, and the next call of the operator says so.
- float32 decays are polynomials (1 ulp): most of its instructions. `ex2.approx` would halve them,
  at the price of 2^-22 in every decay.

| operands | K*D | N | image | rows, columns | exponentials | operations | bytes | {columns} |
|---|---|---|---|---|---|---|---|{dashes}|
"""


def _chunks(size: ScanSize) -> str:
    width = size.length // size.height
    parts = ceil_div(size.column_unit, size.column_steps)
    columns = ceil_div(width * size.height, size.column_unit) * parts
    rows = ceil_div(size.length, size.row_steps)
    return f"{rows} of {size.row_steps}, {columns} of {size.column_steps}"


def _rows() -> Iterator[str]:
    for channels, states in SIZES:
        for height, width in SIDES:
            for kind in ("4-bit", "8-bit", "float32"):
                if (kind, states) not in INSTRUCTIONS:
                    continue
                found = cost(kind, channels, states, height, width)
                cells = [
                    kind, 4 * channels, states, f"{height}x{width}",
                    _chunks(found.size),
                    f"{found.exponentials / 1e6:.0f} M", f"{found.operations / 1e6:.0f} M",
                    f"{found.bytes / 1e6:.0f} MB",
                ]  # fmt: skip
                for gpu in GPUS:
                    times = found.times(gpu)
                    limit = max(times, key=lambda name: times[name])
                    plain = 4 * channels * states * height * width / WARP / EXPONENTIALS
                    plain *= 1e3 / (gpu.processors * gpu.clock)
                    cells += [f"{times[limit]:.2f} ms, {limit}", f"{plain:.2f} ms"]
                yield "| " + " | ".join(map(str, cells)) + " |"


def page() -> str:
    """The text of docs/scan_kernels.md."""
    instructions = (
        f"| {kind} | {n} | {first} + {STAGING[0]} | {second} + {STAGING[1]} | "
        f"{'2 of 2^x' if kind == '8-bit' else 'none' if kind == '4-bit' else '2 polynomials'} |"
        for (kind, n), (first, second) in INSTRUCTIONS.items()
    )
    rates = ";\n".join(
        f"{g.name}: {g.processors} multiprocessors, {g.clock / 1e9:.2f} GHz, "
        f"{g.memory / 1e9:.0f} GB/s"
        for g in GPUS
    )
    columns = " | ".join(f"{g.name} | its exponentials in a float scan" for g in GPUS)
    head = HEAD.format(
        rates=rates, instructions="\n".join(instructions), columns=columns,
        dashes="|".join(["---"] * 2 * len(GPUS)),
    )  # fmt: skip
    return head + "\n".join(_rows()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"wrote {PAGE}\n")
