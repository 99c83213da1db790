"""Small networks and the prepared and lowered forms of them that many tests share."""

import functools

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import qmir_ao
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.ops.selective_scan import selective_scan_op
from qmir_ao.recipes.models import create_model

CAPTURES = ("export", "trace")


class ConvNet(nn.Module):
    """A plain residual network: convolution, depthwise convolution, dropout, linear."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(width, width, 3, padding="same", groups=width)
        self.drop = nn.Dropout(0.5)
        self.point = nn.Linear(width, width)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.depthwise(torch.relu(self.body(x)))
        y = self.drop(y)
        y = self.point(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.last(x + y)


class ScanNet(nn.Module):
    """A linear layer and a selective scan with all its operands: (B, 4, L) to (B, 4, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4 + 2 * 3)
        self.A_log = nn.Parameter(torch.rand(4, 3))
        self.D = nn.Parameter(torch.ones(4))
        self.bias = nn.Parameter(torch.randn(4) - 1.0)

    def forward(self, u: Tensor) -> Tensor:
        delta, B, C = torch.split(self.project(u.transpose(1, 2)), [4, 3, 3], dim=-1)
        operands = (x.transpose(1, 2).unsqueeze(1) for x in (B, C))
        A = -torch.exp(self.A_log)
        delta = delta.transpose(1, 2)
        return selective_scan_op(u, delta, A, *operands, self.D, self.bias, True)


def example(capture: str, *size: int) -> tuple[Tensor, ...] | None:
    """Example inputs where the capture takes some."""
    return (torch.rand(*size),) if capture == "export" else None


def train_step(prepared: GraphModule, x: Tensor) -> None:
    """One forward, backward and Adam step."""
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-4)
    prepared.train()
    prepared(x).square().mean().backward()
    optimizer.step()


@functools.cache
def tiny_pair(
    capture: str, bits: int | tuple[int, int], name: str = "mambair-tiny-x2"
) -> tuple[GraphModule, LoweredModule]:
    """A prepared network of random weights after one training step, and its lowered form."""
    torch.manual_seed(0)
    qconfig = qmir_ao.get_qmir_qconfig(*(bits if isinstance(bits, tuple) else (bits, bits)))
    prepared = qmir_ao.prepare_qat(create_model(name), qconfig, example(capture, 1, 3, 8, 8))
    train_step(prepared, torch.rand(2, 3, 8, 8))
    prepared.eval()
    return prepared, qmir_ao.convert_and_lower(prepared)
