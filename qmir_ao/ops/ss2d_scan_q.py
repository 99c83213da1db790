"""Two-dimensional selective scan of quantized operands: codes in, float32 image out.

The four plain scans are `qmir::selective_scan_q`, float operation by float operation, on the
directions of `qmir::ss2d_scan`; their images are added as (rows + rows back) + (columns + columns
back). Kernels repeat this order, and give the same bytes. `ss2d_scan_q_moments` also gives the
statistics of the result (`qmir_ao.ops._moments`).

Source: ops/selective_scan_q.py and ops/ss2d_scan.py.

Shape letters: B batch, D channels of the image, H, W height and width, N states, G = B or 1
quantization groups; 4 directions. Inference only: there is no backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qmir_ao.ops._directions import DIRECTIONS, merge, repeated, to_images, to_sequences
from qmir_ao.ops._library import define
from qmir_ao.ops._moments import ARGUMENT as MOMENTS_ARGUMENT
from qmir_ao.ops._moments import with_empty_moments, with_moments
from qmir_ao.ops.selective_scan_q import SCHEMA as _PLAIN_SCHEMA
from qmir_ao.ops.selective_scan_q import ScanArgs, check_scan, selective_scan_q_ref
from qmir_ao.ops.ss2d_scan import check_images

SCHEMA = _PLAIN_SCHEMA.replace("selective_scan_q", "ss2d_scan_q")
MOMENTS_SCHEMA = SCHEMA.replace("ss2d_scan_q", "ss2d_scan_q_moments").replace(
    ") -> Tensor", f", {MOMENTS_ARGUMENT}) -> (Tensor, Tensor)"
)
PARAMETERS = len(ScanArgs._fields)
"""How many parameters `ss2d_scan_q` has; `ss2d_scan_q_moments` has one more."""


def check_image_scan(args: ScanArgs) -> None:
    """Refuse operands whose types or shapes do not fit together."""
    a = args
    check_images(a.u, a.delta, a.A, a.B, a.C, a.D, a.delta_bias, op="ss2d_scan_q")
    check_scan(as_sequences(args), op="ss2d_scan_q")


def as_sequences(args: ScanArgs) -> ScanArgs:
    """Operands in the shapes of the plain scan, all read by rows: for checks and tables.

    `u` has the shape and type only: four copies of it would be its values.
    """
    return args._replace(
        u=args.u.new_empty(1).expand(*args.delta.shape[:2], args.u.shape[2] * args.u.shape[3]),
        delta=args.delta.flatten(2),
        B=args.B.flatten(3),
        C=args.C.flatten(3),
    )


def _folded(args: ScanArgs) -> ScanArgs:
    return args._replace(
        u=to_sequences(repeated(args.u)).flatten(1, 2),
        delta=to_sequences(args.delta.unflatten(1, (DIRECTIONS, -1))).flatten(1, 2),
        B=to_sequences(args.B),
        C=to_sequences(args.C),
    )


def ss2d_scan_q_ref(*operands: object) -> Tensor:
    """Four folded copies of the codes, four plain scans, four unfolded results."""
    args = ScanArgs(*operands)  # type: ignore[arg-type]
    check_image_scan(args)
    height, width = args.u.shape[2:]
    if not args.u.numel():
        return torch.zeros(args.u.shape, device=args.u.device)
    y = selective_scan_q_ref(*_folded(args))
    return merge(to_images(y.unflatten(1, (DIRECTIONS, -1)), height, width))


def _fake(*operands: object) -> Tensor:
    args = ScanArgs(*operands)  # type: ignore[arg-type]
    check_image_scan(args)
    return args.u.new_empty(args.u.shape, dtype=torch.float32)


_ss2d_scan_q = define(SCHEMA, reference=ss2d_scan_q_ref, fake=_fake)
ss2d_scan_q_moments_ref = with_moments(ss2d_scan_q_ref, "ss2d_scan_q_moments", 1, PARAMETERS)
ss2d_scan_q_moments = define(
    MOMENTS_SCHEMA,
    reference=ss2d_scan_q_moments_ref,
    fake=with_empty_moments(_fake, "ss2d_scan_q_moments", 1, PARAMETERS),
)
"""`ss2d_scan_q` and the statistics of its channels for each sample (`qmir_ao.ops._moments`)."""


def ss2d_scan_q(
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    A: Tensor,
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    delta_quant_min: int,
    delta_quant_max: int,
) -> Tensor:
    """Scan an image of codes in four directions and add the results.

    Args:
        u: codes (B, D, H, W), int8 or uint8, with their step and shift, float32 (B,) or (1,).
        delta: codes (B, 4*D, H, W), all within delta_quant_min..delta_quant_max, step and shift.
        A: float32 (4*D, N), negative for a state that decays.
        B: codes (B, 4, N, H, W), step and shift.
        C: codes (B, 4, N, H, W), step and shift.
        D: float32 (4*D,), the weight of the direct path, or None.
        delta_bias: float32 (4*D,), added to delta before softplus, or None.
        delta_softplus: apply softplus to delta.
        delta_quant_min: smallest code of delta.
        delta_quant_max: largest code of delta.

    Returns:
        float32 (B, D, H, W).

    Shape: u (B, D, H, W); delta (B, 4*D, H, W); B, C (B, 4, N, H, W); result (B, D, H, W).

    Raises:
        RuntimeError: an operand of another type or shape, or a code of delta out of range.

    Source: module docstring.
    """
    y: Tensor = _ss2d_scan_q(
        *u, *delta, A, *B, *C, D, delta_bias, delta_softplus, delta_quant_min, delta_quant_max
    )
    return y
