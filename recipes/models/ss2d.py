"""Two-dimensional selective scan (SS2D): four one-dimensional scans over an image, summed.

The operator is called directly and shapes are only unpacked, never tested, so that both
`torch.export` (dynamic batch, height, width) and `torch.fx.symbolic_trace` capture the module.

Shapes: B batch, H, W height and width, C channels, D inner channels, L = H*W,
N states, R rank of the delta projection, K = 4 directions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qmir_ao.ops.selective_scan  # noqa: F401  (defines torch.ops.qmir.selective_scan)

K = 4
"""Scan directions: rows, columns, and both reversed."""
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


def delta_bias_init(inner: int) -> Tensor:
    """Bias (K, inner) whose softplus is log-uniform in [DT_MIN, DT_MAX]."""
    span = math.log(DT_MAX) - math.log(DT_MIN)
    dt = torch.exp(torch.rand(K, inner) * span + math.log(DT_MIN)).clamp(min=DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))


class SS2D(nn.Module):
    """Gated four-direction selective scan of a channels-last image.

    Args:
        channels: channels of input and output.
        d_state: states per inner channel.
        expand: inner channels are `int(expand * channels)`.

    Shape:
        input (B, H, W, C), output (B, H, W, C).

    Source: MambaIR, `SS2D`; parameter names and shapes are the published ones.
    """

    def __init__(self, channels: int, d_state: int, expand: float) -> None:
        super().__init__()
        inner = int(expand * channels)
        rank = math.ceil(channels / 16)
        self.inner, self.rank, self.d_state = inner, rank, d_state
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.act = nn.SiLU()
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        bound = inner**-0.5
        self.x_proj_weight = nn.Parameter(
            torch.empty(K, rank + 2 * d_state, inner).uniform_(-bound, bound)
        )
        bound = rank**-0.5
        self.dt_projs_weight = nn.Parameter(torch.empty(K, inner, rank).uniform_(-bound, bound))
        self.dt_projs_bias = nn.Parameter(delta_bias_init(inner))
        states = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_logs = nn.Parameter(torch.log(states).repeat(K * inner, 1))
        self.Ds = nn.Parameter(torch.ones(K * inner))

    def scan(self, x: Tensor) -> Tensor:
        """Sum of the four directional scans of x (B, D, H, W), as (B, D, H, W)."""
        b, d, h, w = x.shape
        rows = x.reshape(b, 1, d, h * w)
        columns = x.transpose(2, 3).reshape(b, 1, d, h * w)
        both = torch.cat([rows, columns], dim=1)
        xs = torch.cat([both, both.flip(-1)], dim=1).reshape(b, K * self.inner, h * w)
        # The published einsum over (4, R+2N, D) is a grouped 1x1 convolution: an ordinary
        # operator with a weight, which the quantizer treats like any other.
        width = self.rank + 2 * self.d_state
        x_weight = self.x_proj_weight.reshape(K * width, self.inner, 1)
        projected = F.conv1d(xs, x_weight, groups=K).reshape(b, K, width, h * w)
        parts = [self.rank, self.d_state, self.d_state]
        dts, b_in, c_out = torch.split(projected, parts, dim=2)
        dt_weight = self.dt_projs_weight.reshape(K * self.inner, self.rank, 1)
        dts = F.conv1d(dts.reshape(b, K * self.rank, h * w), dt_weight, groups=K)
        decay = -torch.exp(self.A_logs)
        bias = self.dt_projs_bias.reshape(K * self.inner)
        y = torch.ops.qmir.selective_scan(xs, dts, decay, b_in, c_out, self.Ds, bias, True)
        # Chunks, not slices: the gradient of a slice is a tensor of zeros with a part filled in.
        onward, back = y.reshape(b, K, d, h * w).chunk(2, dim=1)
        rows, columns = (onward + back.flip(-1)).chunk(2, dim=1)
        summed: Tensor = rows.reshape(b, d, h, w) + columns.reshape(b, d, w, h).transpose(2, 3)
        return summed

    def forward(self, x: Tensor) -> Tensor:
        """Scan a channels-last image; see the class for shapes."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.act(self.conv2d(x.permute(0, 3, 1, 2)))
        y = self.out_norm(self.scan(x).permute(0, 2, 3, 1))
        out: Tensor = self.out_proj(y * F.silu(z))
        return out
