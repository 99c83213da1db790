"""Random small networks of the supported operators, as hypothesis strategies."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import qmir_ao
from qmir_ao.ops.selective_scan import selective_scan_op
from qmir_ao.ops.ss2d_scan import ss2d_scan_op

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a tensor without its batch: (C, H, W) of an image, (C, L) of a sequence."""

    sizes: tuple[int, ...]

    @property
    def channels(self) -> int:
        return self.sizes[0]

    @property
    def image(self) -> bool:
        return len(self.sizes) == 3


class Function(nn.Module):
    """A function of one tensor as a module, so that bits can be set by its name."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class ChannelsLast(nn.Module):
    """A module on the last dimension, applied to the channels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.transpose(1, -1))
        return y.transpose(1, -1)


class Scan(nn.Module):
    """A selective scan with all or some of its operands, on (B, C, L)."""

    def __init__(self, channels: int, states: int, groups: int, optional: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, 2 * groups * states)
        self.A_log = nn.Parameter(torch.rand(channels, states))
        self.D = nn.Parameter(torch.randn(channels)) if optional else None
        self.bias = nn.Parameter(torch.randn(channels) - 1) if optional else None
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x.transpose(1, 2)).transpose(1, 2)
        parts = mixed.chunk(2, 1)
        B, C = (parts[i].unflatten(1, (self.groups, -1)) for i in (0, 1))
        A = -torch.exp(self.A_log)
        return selective_scan_op(x, x.flip(1) * 0.5, A, B, C, self.D, self.bias, True)


class Scan2d(nn.Module):
    """A scan in four directions, on (B, C, H, W)."""

    def __init__(self, channels: int, states: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, 4 * (channels + 2 * states), 1)
        self.A_log = nn.Parameter(torch.rand(4 * channels, states))
        self.D, self.bias = (nn.Parameter(torch.randn(4 * channels)) for _ in range(2))
        self.sizes = [4 * channels, 4 * states, 4 * states]

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mix(x).split(self.sizes, 1)
        B, C = (parts[i].unflatten(1, (4, -1)) for i in (1, 2))
        A = -torch.exp(self.A_log)
        return ss2d_scan_op(x, parts[0], A, B, C, self.D, self.bias, True)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _conv(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    inputs, rank = shape.channels, len(shape.sizes) - 1
    groups = draw(st.sampled_from(_divisors(inputs)))
    outputs = groups * draw(st.integers(1, 4 if groups < 3 else 2))
    kernel, stride, padding, dilation, sizes = [], [], [], [], []
    for size in shape.sizes[1:]:
        d, p = draw(st.integers(1, 2)), draw(st.integers(0, 2))
        k = draw(st.integers(1, min(4, (size + 2 * p - 1) // d + 1)))
        s = draw(st.integers(1, 2))
        kernel.append(k), stride.append(s), padding.append(p), dilation.append(d)
        sizes.append((size + 2 * p - d * (k - 1) - 1) // s + 1)
    kind: Any = (nn.Conv1d, nn.Conv2d)[rank - 1]
    made = kind(
        inputs, outputs, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups,
        bias=draw(st.booleans()),
    )  # fmt: skip
    return made, Shape((outputs, *sizes))


def _linear(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    outputs = draw(st.integers(1, 7))
    made = ChannelsLast(nn.Linear(shape.channels, outputs, bias=draw(st.booleans())))
    return made, Shape((outputs, *shape.sizes[1:]))


def _scan(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    states = draw(st.integers(1, 4))
    if shape.image:
        return Scan2d(shape.channels, states), shape
    groups = draw(st.sampled_from(_divisors(shape.channels)))
    return Scan(shape.channels, states, groups, draw(st.booleans())), shape


def _norm(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    return ChannelsLast(nn.LayerNorm(shape.channels)), shape


def _pointwise(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    modules = (nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU(inplace=True), nn.Sigmoid())
    functions = (torch.relu, F.silu, torch.sigmoid, lambda x: x + x * 0.5, lambda x: F.gelu(x) * x)
    return draw(st.sampled_from([*modules, *map(Function, functions)])), shape


def _softmax(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    dim = draw(st.integers(1, len(shape.sizes)))
    return Function(lambda x: x.softmax(dim) * 3), shape


def _flip(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    dims = draw(st.lists(st.integers(1, len(shape.sizes)), min_size=1, max_size=2, unique=True))
    return Function(lambda x: x.flip(dims)), shape


def _permute(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    order = draw(st.permutations(range(1, 1 + len(shape.sizes))))
    return Function(lambda x: x.permute(0, *order)), Shape(tuple(shape.sizes[i - 1] for i in order))


def _reshape(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    if shape.image:
        channels, height, width = shape.sizes
        return Function(lambda x: x.flatten(2)), Shape((channels, height * width))
    groups = draw(st.sampled_from(_divisors(shape.channels)))
    sizes = (groups, shape.channels // groups, shape.sizes[1])
    return Function(lambda x: x.reshape(-1, *sizes)), Shape(sizes)


def _cat(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    dim = draw(st.integers(1, len(shape.sizes)))
    sizes = tuple(2 * n if i + 1 == dim else n for i, n in enumerate(shape.sizes))
    return Function(lambda x: torch.cat((x, torch.relu(x)), dim)), Shape(sizes)


def _gate(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    if shape.channels % 2:
        return Function(lambda x: x * torch.sigmoid(x.flip(1))), shape
    half = shape.channels // 2
    split = draw(st.booleans())

    def gate(x: Tensor) -> Tensor:
        parts = x.split([half, half], 1) if split else x.chunk(2, 1)
        return parts[0] * F.silu(parts[1])

    return Function(gate), Shape((half, *shape.sizes[1:]))


def _pad(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    modes = ["constant", "replicate", *(["reflect"] if shape.sizes[-1] > 2 else [])]
    mode, spatial = draw(st.sampled_from(modes)), len(shape.sizes) - 1
    pads = [before, after] + [0, 0] * (spatial - 1)
    sizes = (*shape.sizes[:-1], shape.sizes[-1] + before + after)
    return Function(lambda x: F.pad(x, pads, mode=mode)), Shape(sizes)


def _shuffle(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    if not shape.image or shape.channels % 4:
        return _flip(draw, shape)
    channels, height, width = shape.sizes
    return nn.PixelShuffle(2), Shape((channels // 4, 2 * height, 2 * width))


def _pool(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    if not shape.image:
        return Function(lambda x: x - x.mean(-1, keepdim=True)), shape
    channels, height, width = shape.sizes
    if draw(st.booleans()) or min(height, width) < 2:
        return Function(lambda x: x * F.adaptive_avg_pool2d(x, 1)), shape
    pool = draw(st.sampled_from([nn.AvgPool2d(2), nn.MaxPool2d(2)]))
    return pool, Shape((channels, height // 2, width // 2))


def _attend(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    def attend(x: Tensor) -> Tensor:
        scores = torch.matmul(x, x.transpose(-1, -2)).softmax(-1)
        return torch.einsum("...ij,...jk->...ik", scores, x)

    return Function(attend), shape


QUANTIZED = (_conv, _conv, _linear, _scan)
OTHERS = (
    _norm, _pointwise, _pointwise, _softmax, _flip, _permute, _reshape, _cat, _gate, _pad, _shuffle,
    _pool, _attend,
)  # fmt: skip
LARGEST = 400
"""Most elements of a sample; what would make more is left out."""


class Graph(nn.Module):
    """Steps one after the other; a residual where the shapes allow it and it was drawn."""

    def __init__(self, steps: list[nn.Module], residuals: list[bool]) -> None:
        super().__init__()
        self.steps, self.residuals = nn.ModuleList(steps), residuals

    def forward(self, x: Tensor) -> Tensor:
        for step, residual in zip(self.steps, self.residuals, strict=True):
            x = step(x) + x if residual else step(x)
        return x


@dataclasses.dataclass
class Case:
    """A random network, its bits by module name, and the shapes it was made for."""

    model: nn.Module
    bits: dict[str, tuple[int, int]]
    shape: tuple[int, ...]
    seed: int

    def __repr__(self) -> str:
        return f"Case(shape={self.shape}, bits={self.bits}, seed={self.seed}, {self.model})"

    def qconfig(self) -> Any:
        return qmir_ao.get_qmir_qconfig_mapping(self.model, self.bits, default=4)


@st.composite
def cases(draw: Draw) -> Case:
    """Networks of one to four steps, at least one of them quantized, with mixed bits."""
    seed = draw(st.integers(0, 2**31 - 1))
    torch.manual_seed(seed)
    image = draw(st.booleans())
    sizes = draw(st.tuples(*[st.integers(1, 7)] * (3 if image else 2)))
    shape = start = Shape(sizes)
    count = draw(st.integers(1, 4))
    certain = draw(st.integers(0, count - 1))
    steps: list[nn.Module] = []
    residuals: list[bool] = []
    for at in range(count):
        choices = QUANTIZED if at == certain else (*QUANTIZED, *OTHERS)
        module, after = draw(st.sampled_from(choices))(draw, shape)
        if torch.Size(after.sizes).numel() > LARGEST:
            continue
        residuals.append(after == shape and draw(st.booleans()))
        steps.append(module)
        shape = after
    model = Graph(steps, residuals)
    widths = st.tuples(st.integers(2, 8), st.integers(2, 8))
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, Scan, Scan2d)
    bits = {name: draw(widths) for name, m in model.named_modules() if isinstance(m, layers)}
    return Case(model, bits, (draw(st.integers(1, 3)), *start.sizes), seed)
