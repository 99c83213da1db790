"""Selective scan beside the recurrence that mamba-ssm ships as its reference, in plain torch."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qmir_ao.ops.selective_scan import selective_scan

pytestmark = pytest.mark.bench


def plain_recurrence(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """One torch step per element of the sequence; differentiable through autograd."""
    dt = F.softplus(delta)
    repeat = u.shape[1] // B.shape[1]
    b, c = B.repeat_interleave(repeat, 1), C.repeat_interleave(repeat, 1)
    decay = torch.exp(torch.einsum("bel,en->beln", dt, A))
    inputs = torch.einsum("bel,benl,bel->beln", dt, b, u)
    h = torch.zeros_like(decay[:, :, 0])
    rows = []
    # unbind, not indexing: the backward of an index writes a whole sequence of zeros at each step.
    for a, x, c_row in zip(decay.unbind(2), inputs.unbind(2), c.unbind(3), strict=True):
        h = a * h + x
        rows.append((h * c_row).sum(-1))
    return torch.stack(rows, 2) + D[:, None] * u


def operands(length: int, requires_grad: bool) -> list[Tensor]:
    """MambaIR-light's sizes: 4 directions of 72 channels, 10 states."""
    torch.manual_seed(0)
    shapes = [(1, 288, length)] * 2 + [(288, 10)] + [(1, 4, 10, length)] * 2 + [(288,)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[2] = -torch.rand(288, 10) - 0.1
    return [x.requires_grad_(requires_grad) for x in tensors]


def kernel(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The operator of this package, on the same operands."""
    return selective_scan(u, delta, A, B, C, D, None, True)


@pytest.mark.parametrize("implementation", [kernel, plain_recurrence])
@pytest.mark.benchmark(group="selective_scan forward, L = 4096")
def test_forward(benchmark, implementation) -> None:
    args = operands(4096, requires_grad=False)
    with torch.no_grad():
        rounds = 3 if implementation is plain_recurrence else 50
        y = benchmark.pedantic(implementation, args, rounds=rounds, warmup_rounds=1)
        torch.testing.assert_close(y[..., :64], kernel(*args)[..., :64], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", [kernel, plain_recurrence])
@pytest.mark.benchmark(group="selective_scan forward + backward, L = 4096")
def test_forward_backward(benchmark, implementation) -> None:
    args = operands(4096, requires_grad=True)

    def step() -> Tensor:
        y = implementation(*args)
        y.sum().backward()
        return y.detach()

    rounds = 1 if implementation is plain_recurrence else 20
    assert benchmark.pedantic(step, rounds=rounds, warmup_rounds=int(rounds > 1)).isfinite().all()
