"""Networks of plain torch: work in place, state, norms, containers, several inputs and outputs."""

from typing import Any

import torch
from support.plain_networks import CHANNELS, Framed
from torch import Tensor, nn
from torch.nn import functional as F


class InPlace(Framed):
    """In-place arithmetic: the tensor that the first layer read is another one afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.two = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Tensor:
        y = self.one(x)
        x += y
        y = self.two(x)
        x.mul_(0.5)
        self.act(y)
        y[:, :2] = 0.25
        return self.one(x) + y


class AddsInPlace(Framed):
    """The same without assignments, which a symbolic trace cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.conv(y)
        self.act(y)
        z += self.conv(y)
        return F.silu(z, inplace=True).add_(y)


class Residual(Framed):
    """A block of a residual network: convolutions called twice, batch norm, ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.alike = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
        self.act = nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        y = self.alike(self.conv(y))
        y += x
        return self.act(y)


class MixesImages(Framed):
    """Every image is compared with the mean of its batch; a counter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.register_buffer("calls", torch.zeros(()))

    def body(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x - x.mean(0, keepdim=True))


class Counts(MixesImages):
    """A result that depends on how often the network was called before."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) * self.calls


class OddOperators(Framed):
    """Fourier transforms, pooling, resampling, sorting, indexing, three-dimensional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.deep = nn.Conv3d(1, 1, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.pools = nn.Sequential(nn.AvgPool2d(2), nn.MaxPool2d(3, 1, 1), nn.Hardswish())

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = torch.fft.irfft2(torch.fft.rfft2(y, norm="ortho") * 0.5, s=x.shape[-2:], norm="ortho")
        y = self.pools(self.up(self.deep(y.unsqueeze(1)).squeeze(1)))
        y = y[:, torch.tensor([3, 1, 2, 0, 5, 4])]
        y = torch.where(y > 0, y, 0.2 * y).masked_fill(y > 3, 0.1)
        return self.conv(y.roll((1, 2), (2, 3)).sort(dim=1)[0]) + x.std((2, 3), keepdim=True)


class Norms(Framed):
    """Batch, group and instance normalization, dropout of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.b = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.batch = nn.BatchNorm2d(CHANNELS)
        self.group = nn.GroupNorm(2, CHANNELS)
        self.instance = nn.InstanceNorm2d(CHANNELS, affine=True)
        self.drop, self.channels = nn.Dropout(0.3), nn.Dropout2d(0.2)

    def body(self, x: Tensor) -> Tensor:
        y = self.drop(F.relu(self.batch(self.a(x))))
        y = self.channels(self.instance(self.b(self.group(y))))
        return x + F.dropout(y, 0.1, self.training)


class QuantizedTwice(Framed):
    """A residual stream that several layers read, also after something was added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(4)])

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = x + layer(x)
        return x + self.layers[2](x) * self.layers[3](x)


class Containers(Framed):
    """Modules in lists and dictionaries, arguments with defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleDict(
            {"a": nn.Conv2d(CHANNELS, CHANNELS, 1), "b": nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1)}
        )
        self.rest = nn.ModuleList([nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.SiLU())])

    def step(self, x: Tensor, *, name: str = "a", gain: float = 1.0) -> Tensor:
        return self.steps[name](x) * gain

    def body(self, x: Tensor) -> Tensor:
        y = self.step(x) + self.step(x, name="b", gain=0.5)
        for module in self.rest:
            y = module(y)
        return y


class TupleOutput(nn.Module):
    """Two results, and inner results that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Containers()
        self.side = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.net(x)
        self.side(y).relu()
        return y, self.side(y)


class DictOutput(TupleOutput):
    """The same by name."""

    def forward(self, x: Tensor) -> Any:
        y, side = super().forward(x)
        return {"image": y, "side": [side]}


class TwoInputs(nn.Module):
    """An image and its guide, the second through its own first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.guide = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.merge = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)
        self.last = nn.Conv2d(CHANNELS, 3, 1)

    def forward(self, x: Tensor, guide: Tensor, strength: float = 1.0) -> Tensor:
        both = torch.cat((self.image(x), self.guide(guide) * strength), 1)
        return x + self.last(self.merge(both).sigmoid())


class Sequences(nn.Module):
    """One-dimensional convolutions and linear layers on (B, C, L), with a parametrized weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, CHANNELS, 3, padding=1)
        self.mix = nn.utils.parametrizations.weight_norm(
            nn.Conv1d(CHANNELS, CHANNELS, 5, padding=2)
        )
        self.depth = nn.Conv1d(CHANNELS, CHANNELS, 4, padding=3, groups=CHANNELS)
        self.point = nn.Linear(CHANNELS, CHANNELS)
        self.act = nn.PReLU(CHANNELS)
        self.last = nn.Conv1d(CHANNELS, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.mix(self.first(x)))
        y = self.depth(y)[..., : x.shape[-1]]
        y = self.point(y.transpose(1, 2).contiguous()).transpose(1, 2)
        return self.last(y)
