"""Adapters: what a model's own scan, convolution and projection functions become in a graph.

Each one has its original's argument names and calls only operators that can be traced, exported
and quantized.
"""

from typing import Any

import torch
from torch.nn import functional as F

from qmir_ao.capture.operands import as_groups, known_tensor, refuse, weight_shape
from qmir_ao.errors import CaptureError
from qmir_ao.ops.selective_scan import selective_scan_op

SILU = ("silu", "swish")


def _spread(x: Any, u: Any) -> Any:
    """A constant (1, E, N, 1), from `as_groups`, over the batch and length of u."""
    tensor = known_tensor(x)
    if tensor is None or tensor.dim() != 2:
        return as_groups(x, lambda: 0)
    groups = as_groups(x, lambda: int(tensor.shape[0]))
    return groups.expand(u.shape[0], -1, -1, u.shape[-1])


def scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: Any = False,
    return_last_state: Any = False,
) -> Any:
    """Stand in for a selective scan with the operands of mamba-ssm's `selective_scan_fn`.

    Raises:
        CaptureError: `return_last_state=True`, which an image network never needs, or a complex A.
    """
    if return_last_state:
        raise CaptureError(
            "selective_scan_fn(return_last_state=True) cannot be captured; "
            "image networks read only the output: pass return_last_state=False"
        )
    known = known_tensor(A)
    if known is not None and known.is_complex():
        raise refuse("selective_scan_fn", "A", known.dtype, "a real A")
    y = selective_scan_op(
        u, delta, A, _spread(B, u), _spread(C, u), D, delta_bias, bool(delta_softplus)
    )
    return y if z is None else y * F.silu(z)


def causal_conv(
    x: Any,
    weight: Any,
    bias: Any = None,
    activation: Any = None,
    return_final_states: Any = False,
) -> Any:
    """Stand in for `causal_conv1d_fn`: x (B, D, L), weight (D, W) or (D, 1, W).

    Raises:
        CaptureError: an unknown activation, or final states asked for.
    """
    if return_final_states:
        raise refuse("causal_conv1d_fn", "return_final_states", True, "False")
    if activation not in (None, *SILU):
        raise refuse("causal_conv1d_fn", "activation", activation, "None, 'silu', 'swish'")
    channels, *_, width = weight_shape(weight, "weight", "causal_conv1d_fn")
    y = F.conv1d(x, weight.reshape(channels, 1, width), bias, padding=width - 1, groups=channels)
    y = cut_tail(y, width)
    return y if activation is None else F.silu(y)


def cut_tail(y: Any, width: int) -> Any:
    """Drop what a convolution padded on both sides gives beyond the end of the sequence."""
    return y[..., : -(width - 1)] if width > 1 else y


def inner(
    xz: Any,
    conv1d_weight: Any,
    conv1d_bias: Any,
    x_proj_weight: Any,
    delta_proj_weight: Any,
    out_proj_weight: Any = None,
    out_proj_bias: Any = None,
    *,
    A: Any,
    B: Any = None,
    C: Any = None,
    D: Any = None,
    delta_bias: Any = None,
    B_proj_bias: Any = None,
    C_proj_bias: Any = None,
    delta_softplus: Any = True,
) -> Any:
    """Stand in for mamba-ssm's `mamba_inner_fn`, as plain convolution, linear and scan.

    Without `out_proj_weight` (as in `mamba_inner_fn_no_out_proj`) the result is (B, D, L).
    """
    x, z = xz.chunk(2, dim=1)
    x = causal_conv(x, conv1d_weight, conv1d_bias, "silu")
    rank = weight_shape(delta_proj_weight, "delta_proj_weight", "mamba_inner_fn")[1]
    states = weight_shape(A, "A", "mamba_inner_fn")[-1]
    projected = F.linear(x.transpose(1, 2), x_proj_weight)
    delta = F.linear(projected[..., :rank], delta_proj_weight).transpose(1, 2)
    if B is None:
        B = projected[..., rank : rank + states]
        B = (B if B_proj_bias is None else B + B_proj_bias).transpose(1, 2)
    if C is None:
        C = projected[..., -states:]
        C = (C if C_proj_bias is None else C + C_proj_bias).transpose(1, 2)
    y = scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if out_proj_weight is None:
        return y
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def extension_scan(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, *rest: Any
) -> tuple[Any, Any, Any]:
    """Stand in for `fwd` of the extension modules `selective_scan_cuda*`.

    mamba-ssm's takes z before delta_bias and delta_softplus, VMamba's do not.

    Returns:
        The output without gate, what the backward pass would read (NaN: it has no meaning here),
        and the gated output.
    """
    z, *rest_of = rest if not isinstance(rest[1], bool) else (None, *rest)
    delta_bias, delta_softplus = rest_of[:2]
    y = scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    states = torch.full_like(u, float("nan"))
    return y, states, y if z is None else y * F.silu(z)
