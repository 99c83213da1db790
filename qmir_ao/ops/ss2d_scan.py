"""Two-dimensional selective scan: an image read in four directions, the results summed.

    y = sum_k  unfold_k( selective_scan( fold_k(u), fold_k(delta[k]), A[k], fold_k(B[k]), ... ) )

with fold_k the image as a sequence by rows (k = 0), by columns (1), and both from the end (2, 3).
Every operand lies as an image; nobody has to flip or transpose.

Source: VMamba (arXiv 2401.10166), SS2D; MambaIR (arXiv 2402.15648), `SS2D.forward_core`.

Shape letters: B batch, D channels of the image, H, W height and width, N states; 4 directions.
"""

import torch
from torch import Tensor

from qmir_ao.ops._directions import DIRECTIONS, merge, repeated, to_images, to_sequences
from qmir_ao.ops._scan import define_scan
from qmir_ao.ops.selective_scan import selective_scan_backward_ref, selective_scan_ref


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, op: str = "ss2d_scan"
) -> None:
    torch._check(u.dim() == 4, lambda: f"qmir::{op}: u must be (B, D, H, W), got {tuple(u.shape)}")
    batch, channels, height, width = u.shape
    torch._check(
        delta.dim() == 4
        and delta.shape[1] == DIRECTIONS * channels
        and delta.shape[0] == batch
        and delta.shape[2:] == u.shape[2:],
        lambda: (
            f"qmir::{op}: delta must be (B, 4*D, H, W) = "
            f"{(batch, DIRECTIONS * channels, height, width)}, got {tuple(delta.shape)}"
        ),
    )
    torch._check(
        A.dim() == 2 and A.shape[0] == DIRECTIONS * channels,
        lambda: (
            f"qmir::{op}: A must be (4*D, N) with 4*D = {DIRECTIONS * channels}, "
            f"got {tuple(A.shape)}"
        ),
    )
    wanted = (batch, DIRECTIONS, A.shape[1], height, width)
    for name, x in (("B", B), ("C", C)):
        torch._check(
            x.dim() == 5 and all(a == b for a, b in zip(x.shape, wanted, strict=True)),
            lambda name=name, x=x: (
                f"qmir::{op}: {name} must be (B, 4, N, H, W) = {wanted}, got {tuple(x.shape)}"
            ),
        )


def check_images(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    op: str = "ss2d_scan",
) -> None:
    """Check every size; kernels read memory by these sizes.

    Raises:
        RuntimeError: shapes that do not fit together.
    """
    _check(u, delta, A, B, C, op)
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        torch._check(
            x is None or x.shape == A.shape[:1],
            lambda name=name, x=x: (
                f"qmir::{op}: {name} must be (4*D,) = ({A.shape[0]},), got {tuple(x.shape)}"
            ),
        )


def _folded(u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    """The sequences that four plain scans read."""
    by_direction = delta.unflatten(1, (DIRECTIONS, -1))
    return (
        to_sequences(repeated(u)).flatten(1, 2),
        to_sequences(by_direction).flatten(1, 2),
        to_sequences(B),
        to_sequences(C),
    )


def ss2d_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """Four folded copies, four plain scans, four unfolded results."""
    check_images(u, delta, A, B, C, D, delta_bias)
    if not u.numel():
        return torch.zeros_like(u)
    xs, dts, bs, cs = _folded(u, delta, B, C)
    y = selective_scan_ref(xs, dts, A, bs, cs, D, delta_bias, delta_softplus)
    return merge(to_images(y.unflatten(1, (DIRECTIONS, -1)), u.shape[2], u.shape[3]))


def ss2d_scan_backward_ref(
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
    """Gradients of all seven operands; those of absent ones are empty."""
    check_images(u, delta, A, B, C, D, delta_bias)
    height, width = u.shape[2:]
    xs, dts, bs, cs = _folded(u, delta, B, C)
    gy = to_sequences(repeated(grad)).flatten(1, 2)
    du, ddelta, dA, dB, dC, dD, dbias = selective_scan_backward_ref(
        gy, xs, dts, A, bs, cs, D, delta_bias, delta_softplus
    )
    return (
        merge(to_images(du.unflatten(1, (DIRECTIONS, -1)), height, width)),
        to_images(ddelta.unflatten(1, (DIRECTIONS, -1)), height, width).flatten(1, 2),
        dA,
        to_images(dB, height, width),
        to_images(dC, height, width),
        dD,
        dbias,
    )


ss2d_scan_op, ss2d_scan_backward_op = define_scan(
    "ss2d_scan",
    reference=ss2d_scan_ref,
    backward_reference=ss2d_scan_backward_ref,
    check=_check,
)


def ss2d_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Scan an image in four directions and add the results; differentiable in every tensor.

    Args:
        u: image, read by all directions.
        delta: time steps of direction k in channels k*D .. (k+1)*D - 1, before bias and softplus.
        A: state matrices; negative for a decaying state.
        B: input projections of each direction.
        C: output projections of each direction.
        D: skip connections.
        delta_bias: added to delta.
        delta_softplus: whether delta passes through softplus.

    Shape:
        u (B, D, H, W); delta (B, 4*D, H, W); A (4*D, N); B, C (B, 4, N, H, W);
        D, delta_bias (4*D,); returns (B, D, H, W), floating point of one dtype.

    Raises:
        RuntimeError: shapes that do not fit together (named in the message).

    Source: module docstring.
    """
    y: Tensor = ss2d_scan_op(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return y
