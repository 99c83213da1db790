"""Selective scans of K groups of sequences side by side, each group with its own parameters.

Shapes: B batch, K groups (scan directions), D channels of a group, L sequence length, N states,
R rank of the delta projection.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qmir_ao.ops.selective_scan  # noqa: F401  (defines torch.ops.qmir.selective_scan)

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class ScanSizes(NamedTuple):
    """Sizes of a grouped scan: K, D, R, N of the file's legend."""

    groups: int
    inner: int
    rank: int
    states: int


class ScanNames(NamedTuple):
    """Names of the parameters: (K, R+2N, D), (K, D, R), (K, D), (K*D, N) and (K*D)."""

    x_proj: str = "x_proj_weight"
    dt_projs: str = "dt_projs_weight"
    dt_bias: str = "dt_projs_bias"
    a_logs: str = "A_logs"
    skip: str = "Ds"


def delta_bias_init(groups: int, inner: int) -> Tensor:
    """Bias (groups, inner) whose softplus is log-uniform in [DT_MIN, DT_MAX]."""
    span = math.log(DT_MAX) - math.log(DT_MIN)
    dt = torch.exp(torch.rand(groups, inner) * span + math.log(DT_MIN)).clamp(min=DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))


def grouped_scan(
    owner: nn.Module,
    xs: Tensor,
    batch: int,
    length: int,
    sizes: ScanSizes,
    names: ScanNames = ScanNames(),  # noqa: B008  (immutable)
    prompt: Tensor | None = None,
) -> Tensor:
    """Scan the sequences xs (B, K*D, L), each group with its own parameters.

    Args:
        owner: module that holds the parameters.
        xs: the sequences.
        batch: B, handed over so that captured graphs need not ask again.
        length: L, likewise.
        sizes: K, D, R and N.
        names: what the parameters are called.
        prompt: what to add to the output matrix C, (B, K, N, L).

    Returns:
        (B, K*D, L).
    """
    k, d, rank, states = sizes
    # The published einsum over (K, R+2N, D) is a grouped 1x1 convolution: an ordinary operator
    # with a weight, which the quantizer treats like any other.
    width = rank + 2 * states
    x_weight = getattr(owner, names.x_proj).reshape(k * width, d, 1)
    projected = F.conv1d(xs, x_weight, groups=k).reshape(batch, k, width, length)
    dts, b_in, c_out = torch.split(projected, [rank, states, states], dim=2)
    dt_weight = getattr(owner, names.dt_projs).reshape(k * d, rank, 1)
    dts = F.conv1d(dts.reshape(batch, k * rank, length), dt_weight, groups=k)
    if prompt is not None:
        c_out = c_out + prompt
    decay = -torch.exp(getattr(owner, names.a_logs))
    bias = getattr(owner, names.dt_bias).reshape(k * d)
    skip = getattr(owner, names.skip)
    y: Tensor = torch.ops.qmir.selective_scan(xs, dts, decay, b_in, c_out, skip, bias, True)
    return y


class GroupedScan(nn.Module):
    """A module that owns the parameters of a grouped scan under their published names."""

    def add_scan(self, groups: int, inner: int, rank: int, states: int) -> None:
        """Create the parameters, initialised as published."""
        self.sizes = ScanSizes(groups, inner, rank, states)
        bound = inner**-0.5
        self.x_proj_weight = nn.Parameter(
            torch.empty(groups, rank + 2 * states, inner).uniform_(-bound, bound)
        )
        bound = rank**-0.5
        self.dt_projs_weight = nn.Parameter(
            torch.empty(groups, inner, rank).uniform_(-bound, bound)
        )
        self.dt_projs_bias = nn.Parameter(delta_bias_init(groups, inner))
        counts = torch.arange(1, states + 1, dtype=torch.float32)
        self.A_logs = nn.Parameter(torch.log(counts).repeat(groups * inner, 1))
        self.Ds = nn.Parameter(torch.ones(groups * inner))

    def scan_sequences(
        self, xs: Tensor, batch: int, length: int, prompt: Tensor | None = None
    ) -> Tensor:
        """Scan the sequences xs (B, K*D, L); see `grouped_scan`."""
        return grouped_scan(self, xs, batch, length, self.sizes, prompt=prompt)
