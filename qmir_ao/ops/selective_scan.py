"""Selective scan of a state-space model, the recurrence at the heart of Mamba.

    delta' = softplus(delta + delta_bias)
    h[l]   = exp(delta'[l] * A) * h[l-1] + delta'[l] * B[l] * u[l],     h[-1] = 0
    y[l]   = <C[l], h[l]> + D * u[l]

Source: Gu and Dao 2023, algorithm 2; semantics of mamba-ssm's `selective_scan_fn`.

Shape letters: B batch, E channels of all groups together, K groups (scan directions in MambaIR),
N state size, L sequence length. E is a multiple of K; group k owns channels k*E/K .. (k+1)*E/K - 1.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qmir_ao.ops._scan import define_scan


def _expand_groups(x_BKNL: Tensor, channels: int) -> Tensor:
    return x_BKNL.repeat_interleave(channels // x_BKNL.shape[1], dim=1)


def _time_step(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    raw = delta if delta_bias is None else delta + delta_bias[:, None]
    return F.softplus(raw) if delta_softplus else raw


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """Plain recurrence over L; the default implementation and the oracle of every kernel."""
    check_operands(u, delta, A, B, C, D, delta_bias)
    dt = _time_step(delta, delta_bias, delta_softplus)
    B_full, C_full = _expand_groups(B, u.shape[1]), _expand_groups(C, u.shape[1])
    h = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    rows = []
    for i in range(u.shape[2]):
        step = dt[:, :, i, None]
        h = torch.exp(step * A) * h + step * u[:, :, i, None] * B_full[..., i]
        rows.append((h * C_full[..., i]).sum(-1))
    y = torch.stack(rows, dim=-1) if rows else torch.zeros_like(u)
    # Under autocast A, D and the bias are float32 beside bf16 sequences.
    return (y if D is None else y + D[:, None] * u).to(u.dtype)


def selective_scan_backward_ref(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    """Gradients of all seven operands, by the reversed recurrence (no autograd inside).

    Absent operands (D, delta_bias) get an empty gradient.
    """
    check_operands(u, delta, A, B, C, D, delta_bias)
    batch, channels, length = u.shape
    groups, states = B.shape[1], B.shape[2]
    dt = _time_step(delta, delta_bias, delta_softplus)
    B_full, C_full = _expand_groups(B, channels), _expand_groups(C, channels)
    h = [u.new_zeros(batch, channels, states)]
    decay = [torch.exp(dt[:, :, i, None] * A) for i in range(length)]
    for i in range(length):
        h.append(decay[i] * h[-1] + (dt[:, :, i] * u[:, :, i])[..., None] * B_full[..., i])
    g = torch.zeros_like(h[0])
    du, ddt = torch.zeros_like(u), torch.zeros_like(u)
    dA = torch.zeros_like(h[0])
    dB, dC = torch.zeros_like(B_full), torch.zeros_like(C_full)
    for i in reversed(range(length)):
        gy = grad[:, :, i, None]
        g = g + gy * C_full[..., i]
        dC[..., i] = gy * h[i + 1]
        dB[..., i] = g * (dt[:, :, i] * u[:, :, i])[..., None]
        du[:, :, i] = (g * B_full[..., i]).sum(-1) * dt[:, :, i]
        through_decay = g * decay[i] * h[i]
        ddt[:, :, i] = (through_decay * A + g * u[:, :, i, None] * B_full[..., i]).sum(-1)
        dA = dA + through_decay * dt[:, :, i, None]
        g = g * decay[i]
    if D is not None:
        du = du + D[:, None] * grad
    if delta_softplus:
        raw = delta if delta_bias is None else delta + delta_bias[:, None]
        ddt = torch.where(raw > 20, ddt, ddt * torch.sigmoid(raw))
    fold = (batch, groups, channels // groups, states, length)
    found = (
        du,
        ddt,
        dA.sum(0),
        dB.reshape(fold).sum(2),
        dC.reshape(fold).sum(2),
        u.new_zeros(0) if D is None else (grad * u).sum((0, 2)),
        u.new_zeros(0) if delta_bias is None else ddt.sum((0, 2)),
    )
    operands = (u, delta, A, B, C, D, delta_bias)
    return tuple(g if x is None else g.to(x.dtype) for g, x in zip(found, operands, strict=True))


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    torch._check(u.dim() == 3, lambda: f"qmir::selective_scan: u must be (B, E, L), got {u.shape}")
    torch._check(
        delta.shape == u.shape,
        lambda: f"qmir::selective_scan: delta must be {u.shape} like u, got {delta.shape}",
    )
    torch._check(
        A.dim() == 2 and A.shape[0] == u.shape[1],
        lambda: f"qmir::selective_scan: A must be (E, N) with E = {u.shape[1]}, got {A.shape}",
    )
    for name, x in (("B", B), ("C", C)):
        torch._check(
            x.dim() == 4 and x.shape[2] == A.shape[1],
            lambda name=name, x=x: (
                f"qmir::selective_scan: {name} must be (B, K, N, L) with N = {A.shape[1]}, "
                f"got {x.shape}"
            ),
        )
    torch._check(
        u.shape[1] % B.shape[1] == 0,
        lambda: (
            f"qmir::selective_scan: the {u.shape[1]} channels of u must be a multiple of the "
            f"{B.shape[1]} groups of B"
        ),
    )


def check_operands(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Check every size against u and B, on real tensors; kernels read memory by these sizes.

    Raises:
        RuntimeError: shapes that do not fit together.
    """
    _check(u, delta, A, B, C)
    (batch, channels, length), (groups, states) = u.shape, B.shape[1:3]
    for name, x, shape in (
        ("B", B, (batch, groups, states, length)),
        ("C", C, (batch, groups, states, length)),
        ("D", D, (channels,)),
        ("delta_bias", delta_bias, (channels,)),
    ):
        torch._check(
            x is None or x.shape == shape,
            lambda name=name, x=x, shape=shape: (
                f"qmir::selective_scan: {name} must be {shape}, got {tuple(x.shape)}"
            ),
        )


selective_scan_op, selective_scan_backward_op = define_scan(
    "selective_scan",
    reference=selective_scan_ref,
    backward_reference=selective_scan_backward_ref,
    check=_check,
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Run the selective scan; differentiable in every tensor.

    Args:
        u: input sequence.
        delta: time steps before bias and softplus.
        A: state matrix; negative for a decaying state.
        B: input projection; (B, N, L) is read as one group.
        C: output projection; (B, N, L) is read as one group.
        D: skip connection.
        delta_bias: added to delta.
        delta_softplus: whether delta passes through softplus.

    Shape:
        u, delta (B, E, L); A (E, N); B, C (B, K, N, L); D, delta_bias (E,); returns (B, E, L),
        floating point of one dtype.

    Raises:
        RuntimeError: shapes that do not fit together (named in the message).

    Source: Gu and Dao 2023, algorithm 2.
    """
    B = B.unsqueeze(1) if B.dim() == 3 else B
    C = C.unsqueeze(1) if C.dim() == 3 else C
    y: Tensor = selective_scan_op(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return y
