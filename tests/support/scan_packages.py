"""Stand-ins for the packages of Mamba networks: same names and signatures, nothing to trace.

Every function computes through numpy, so that neither capture can go through it; `cuda_only` ones
refuse to run at all, as the real ones do on a machine without GPU.
"""

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmir_ao.ops.selective_scan import selective_scan_ref as reference_scan

INTERFACE = "mamba_ssm.ops.selective_scan_interface"
MAMBA = "mamba_ssm.modules.mamba_simple"


def opaque(x: Tensor) -> Tensor:
    """The same values in a tensor that no capture can follow."""
    return torch.from_numpy(x.detach().numpy().copy())


def plain_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """The scan of mamba-ssm's interface, by the reference."""

    def groups(x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
        return x.unsqueeze(1) if x.dim() == 3 else x

    operands = (opaque(u), delta, A, groups(B), groups(C), D, delta_bias, delta_softplus)
    with torch.no_grad():
        y = reference_scan(*operands)
        return opaque(y if z is None else y * F.silu(z))


def interface() -> types.ModuleType:
    """`mamba_ssm.ops.selective_scan_interface`."""
    module = types.ModuleType(INTERFACE)

    def selective_scan_fn(
        u,
        delta,
        A,
        B,
        C,
        D=None,
        z=None,
        delta_bias=None,
        delta_softplus=False,
        return_last_state=False,
        cu_seqlens=None,
    ):
        from support.scan_packages import plain_scan

        return plain_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    def mamba_inner_fn(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B=None,
        C=None,
        D=None,
        delta_bias=None,
        B_proj_bias=None,
        C_proj_bias=None,
        delta_softplus=True,
        checkpoint_lvl=1,
    ):
        from support.scan_packages import causal_conv, opaque, plain_scan

        with torch.no_grad():
            x, z = opaque(xz).chunk(2, dim=1)
            x = F.silu(causal_conv(x, conv1d_weight.squeeze(1), conv1d_bias))
            rows = x.transpose(1, 2) @ x_proj_weight.t()
            rank, states = delta_proj_weight.shape[1], A.shape[1]
            delta = (rows[..., :rank] @ delta_proj_weight.t()).transpose(1, 2)
            if B is None:
                B = rows[..., rank : rank + states]
                B = (B if B_proj_bias is None else B + B_proj_bias).transpose(1, 2)
            if C is None:
                C = rows[..., -states:]
                C = (C if C_proj_bias is None else C + C_proj_bias).transpose(1, 2)
            y = plain_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
            return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)

    module.selective_scan_fn = selective_scan_fn
    module.mamba_inner_fn = mamba_inner_fn
    return module


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution that sees the present and the past; weight (D, W)."""
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[1])


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
    """The function of the causal_conv1d package."""
    with torch.no_grad():
        y = causal_conv(opaque(x), weight, bias)
        return opaque(y if activation is None else F.silu(y))


class Mamba(nn.Module):
    """mamba-ssm's module: its parameters, its two paths and its way to multiply by weights."""

    def __init__(self, d_model: int = 6, d_state: int = 3, use_fast_path: bool = True) -> None:
        super().__init__()
        self.d_state, self.dt_rank, self.use_fast_path = d_state, 2, use_fast_path
        inner = 2 * d_model
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.rand(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.activation, self.act = "silu", nn.SiLU()

    def forward(self, hidden_states, inference_params=None):
        import sys

        package = sys.modules[INTERFACE]
        batch, length, _ = hidden_states.shape
        flat = self.in_proj.weight @ hidden_states.reshape(batch * length, -1).t()
        xz = flat.reshape(-1, batch, length).permute(1, 0, 2)
        A = -torch.exp(self.A_log.float())
        if self.use_fast_path:
            weights = (self.conv1d.weight, self.conv1d.bias, self.x_proj.weight)
            weights += (self.dt_proj.weight, self.out_proj.weight, self.out_proj.bias)
            return package.mamba_inner_fn(
                xz, *weights, A, None, None, self.D, delta_bias=self.dt_proj.bias
            )
        x, z = xz.chunk(2, dim=1)
        x = causal_conv1d_fn(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        rows = self.x_proj(x.transpose(1, 2))
        delta, B, C = (
            part.transpose(1, 2)
            for part in torch.split(rows, [self.dt_rank, self.d_state, self.d_state], dim=-1)
        )
        delta = (delta.transpose(1, 2) @ self.dt_proj.weight.t()).transpose(1, 2)
        y = package.selective_scan_fn(
            x, delta, A, B, C, self.D, z=z, delta_bias=self.dt_proj.bias, delta_softplus=True
        )
        return self.out_proj(y.transpose(1, 2))


def cuda_only(*_: Any, **__: Any) -> Any:
    """What a CUDA extension says to a tensor in CPU memory."""
    raise RuntimeError("Expected u.is_cuda() to be true, but got false.")


def scan_class(name: str, *, runs: bool) -> type[torch.autograd.Function]:
    """A VMamba scan function of this name: `SelectiveScanMamba`, `...Core`, `...Oflex`."""

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx,
            u,
            delta,
            A,
            B,
            C,
            D=None,
            delta_bias=None,
            delta_softplus=False,
            nrows=1,
            backnrows=1,
            oflex=True,
        ):
            run = plain_scan if runs else cuda_only
            return run(u, delta, A, B, C, D, None, delta_bias, delta_softplus)

    Scan.__name__ = name
    return Scan


class CrossScan(torch.autograd.Function):
    """VMamba's: (B, C, H, W) to (B, 4, C, L)."""

    @staticmethod
    def forward(ctx, x: Tensor):
        B, C, H, W = x.shape
        y = opaque(x).new_empty((B, 4, C, H * W))
        y[:, 0] = opaque(x).flatten(2, 3)
        y[:, 1] = opaque(x).transpose(2, 3).flatten(2, 3)
        y[:, 2:4] = y[:, 0:2].flip(-1)
        return y


class CrossMerge(torch.autograd.Function):
    """VMamba's: (B, 4, C, H, W) to (B, C, L)."""

    @staticmethod
    def forward(ctx, ys: Tensor):
        B, K, C, H, W = ys.shape
        y = opaque(ys).reshape(B, K, C, -1)
        y = y[:, 0:2] + y[:, 2:4].flip(-1)
        return y[:, 0] + y[:, 1].reshape(B, C, W, H).transpose(2, 3).reshape(B, C, -1)
