"""Rows of the selective scans: float and bf16, of codes, and over images in four directions."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from support.gpu_rows.rows import MAMBA, OURS, Row, Side, trained
from torch import Tensor

import qmir_ao.backend.kernels  # noqa: F401  (registers the kernels)
from qmir_ao.ops._directions import repeated, to_sequences

QMIR = torch.ops.qmir
TYPES = {"float": torch.float32, "bf16": torch.bfloat16}
GROUPS = 4


class Size(NamedTuple):
    """Channels of all four directions, states, height and width of the image."""

    channels: int
    states: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.channels} channels, {self.states} states, L = {self.height * self.width}"


# MambaIR light has 288 channels and 10 states, MambaIR 1440 and 16; L of 64x64, 256x256, 480x480.
SIZES = [
    *(Size(c, n, side, side) for c in (288, 1440) for n in (10, 16) for side in (64, 480)),
    Size(288, 10, 256, 256),
    Size(1440, 16, 256, 256),
]
CODE_SIZES = [size for size in SIZES if (size.channels, size.states) in ((288, 10), (1440, 16))]


def mamba_scan(*args: Tensor) -> Tensor:
    """mamba-ssm's own kernel."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, A, B, C, D, bias = args
    y: Tensor = selective_scan_fn(u, delta, A, B, C, D, None, bias, True)
    return y


def our_scan(*args: Tensor) -> Tensor:
    """The operator of this package."""
    y: Tensor = QMIR.selective_scan(*args, True)
    return y


def operands(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """u, delta, A, B, C, D, bias of one image, as sequences."""
    channels, states, length = size.channels, size.states, size.height * size.width

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=of)

    wide = torch.float32
    A = -torch.rand(channels, states, device=device) - 0.1
    sequences = (normal(1, channels, length), normal(1, channels, length))
    projections = (normal(1, GROUPS, states, length), normal(1, GROUPS, states, length))
    return (*sequences, A, *projections, normal(channels, of=wide), normal(channels, of=wide))


def _float_rows(size: Size, name: str, device: torch.device) -> Iterator[Row]:
    dtype = TYPES[name]

    def make() -> tuple[Tensor, ...]:
        return operands(size, dtype, device)

    def leaves() -> tuple[Tensor, ...]:
        args = operands(size, dtype, device)
        return (*(x.requires_grad_() for x in args), torch.randn_like(args[0]))

    yield Row(
        f"`selective_scan` {name}, forward, {size}",
        {OURS: Side(our_scan, make), MAMBA: Side(mamba_scan, make, "mamba_ssm")},
        {MAMBA: 1.3},
    )
    yield Row(
        f"`selective_scan` {name}, forward + backward, {size}",
        {
            OURS: Side(trained(our_scan, 7), leaves),
            MAMBA: Side(trained(mamba_scan, 7), leaves, "mamba_ssm"),
        },
        {MAMBA: 1.0},
    )


def code_image(size: Size, bits: int, device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    """Name to codes, step and shift: u, delta, B and C of one image."""
    high, wide, inner = size.height, size.width, size.channels // GROUPS
    limit = 2 ** (bits - 1)
    shapes = {
        "u": (1, inner, high, wide),
        "delta": (1, size.channels, high, wide),
        "B": (1, GROUPS, size.states, high, wide),
        "C": (1, GROUPS, size.states, high, wide),
    }
    drawn: dict[str, tuple[Tensor, ...]] = {}
    for name, shape in shapes.items():
        codes = torch.randint(-limit, limit, shape, dtype=torch.int8, device=device)
        step = torch.full((1,), 2.0 / limit, device=device)
        drawn[name] = (codes, step, torch.full((1,), 0.1, device=device))
    return drawn


def _parameters(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    A = -torch.rand(size.channels, size.states, device=device) - 0.1
    D, bias = (torch.randn(size.channels, device=device) for _ in range(2))
    return A, D, bias


def _values(grid: tuple[Tensor, ...]) -> Tensor:
    codes, step, shift = grid
    return codes * step - shift


def _sequences(drawn: dict[str, tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, ...]]:
    """What the plain scan reads: the image four times, in the order of each direction."""
    u, delta, B, C = (drawn[name][0] for name in ("u", "delta", "B", "C"))
    folded = {
        "u": to_sequences(repeated(u)).flatten(1, 2),
        "delta": to_sequences(delta.unflatten(1, (GROUPS, -1))).flatten(1, 2),
        "B": to_sequences(B),
        "C": to_sequences(C),
    }
    return {name: (folded[name].contiguous(), *drawn[name][1:]) for name in drawn}


def _coded(drawn: dict[str, tuple[Tensor, ...]], bits: int, parameters: Any) -> tuple[Any, ...]:
    """Arguments of the integer scans."""
    A, D, bias = parameters
    limits = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    first, last = (*drawn["u"], *drawn["delta"]), (*drawn["B"], *drawn["C"])
    return (*first, A, *last, D, bias, True, *limits)


def _dense(drawn: dict[str, tuple[Tensor, ...]], dtype: torch.dtype, parameters: Any) -> Any:
    """Arguments of the float scans: the values of the same codes."""
    A, D, bias = parameters
    u, delta, B, C = (_values(drawn[name]).to(dtype) for name in ("u", "delta", "B", "C"))
    return u, delta, A, B, C, D, bias


def _code_row(size: Size, bits: int, device: torch.device) -> Row:
    def codes() -> tuple[Any, ...]:
        drawn = _sequences(code_image(size, bits, device))
        return _coded(drawn, bits, _parameters(size, device))

    def values(dtype: torch.dtype) -> Any:
        drawn = _sequences(code_image(size, bits, device))
        return _dense(drawn, dtype, _parameters(size, device))

    half, stand_in = f"{MAMBA}, bf16", "our float scan, bf16"
    return Row(
        f"`selective_scan_q`, {bits}-bit codes, {size}",
        {
            OURS: Side(QMIR.selective_scan_q, codes),
            half: Side(mamba_scan, lambda: values(torch.bfloat16), "mamba_ssm"),
            stand_in: Side(our_scan, lambda: values(torch.bfloat16)),
            "our float scan, float": Side(our_scan, lambda: values(torch.float32)),
        },
        {half: 2.0, stand_in: 2.0},
    )


def published_path(scan: Any, height: int, width: int) -> Any:
    """The published form of the four directions around a plain scan.

    Source: VMamba (arXiv 2401.10166) and MambaIR (arXiv 2402.15648), `SS2D.forward_core`.
    """

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        batch, length = x.shape[0], height * width
        turned = torch.transpose(x, 2, 3).contiguous()
        both = torch.stack([x.reshape(batch, -1, length), turned.view(batch, -1, length)], dim=1)
        xs = torch.cat([both, torch.flip(both, dims=[-1])], dim=1).view(batch, -1, length)
        y = scan(xs, *rest).view(batch, GROUPS, -1, length)
        back = torch.flip(y[:, 2:4], dims=[-1])

        def rows(columns: Tensor) -> Tensor:
            image = columns.reshape(batch, -1, width, height)
            return torch.transpose(image, 2, 3).contiguous().view(batch, -1, length)

        summed: Tensor = y[:, 0] + back[:, 0] + rows(y[:, 1]) + rows(back[:, 1])
        return summed.view(batch, -1, height, width)

    return run


def _image_row(size: Size, bits: int, device: torch.device) -> Row:
    def codes() -> tuple[Any, ...]:
        return _coded(code_image(size, bits, device), bits, _parameters(size, device))

    def values(dtype: torch.dtype) -> Any:
        drawn = code_image(size, bits, device)
        _, *rest = _dense(_sequences(drawn), dtype, _parameters(size, device))
        return (_values(drawn["u"]).to(dtype), *rest)

    def path(scan: Any, name: str, needs: str | None = None) -> Side:
        run = published_path(scan, size.height, size.width)
        return Side(run, lambda: values(TYPES[name]), needs)

    published, stand_in = f"published path, {MAMBA}, float", "published path, our scan, float"
    return Row(
        f"`ss2d_scan_q`, {bits}-bit codes, {size}",
        {
            OURS: Side(QMIR.ss2d_scan_q, codes),
            published: path(mamba_scan, "float", "mamba_ssm"),
            f"published path, {MAMBA}, bf16": path(mamba_scan, "bf16", "mamba_ssm"),
            stand_in: path(our_scan, "float"),
            "published path, our scan, bf16": path(our_scan, "bf16"),
        },
        {published: 3.0, stand_in: 3.0},
    )


def rows(
    gpu: Any, sizes: list[Size] = SIZES, code_sizes: list[Size] = CODE_SIZES, bits: int = 4
) -> Iterator[Row]:
    """All rows of scans, see `Row`."""
    for size in sizes:
        for name in TYPES:
            yield from _float_rows(size, name, gpu.device)
    for size in code_sizes:
        yield _code_row(size, bits, gpu.device)
        yield _image_row(size, bits, gpu.device)
