"""Codes of what a chain of float operators makes of a tensor, without the tensors in between.

    y = x                                                       any strides
    y = layer_norm(y) over dimension `dim`                      with `norm_eps`
    y = activation(y)
    y = y * gate_activation(gate)                               with `gate`
    y = y + offset                                              one shift for each channel of `dim`
    step, shift = dls_qparams(y) of each sample, token or of the whole tensor
                  with `moments`: from the statistics that the operator which made x has found
    codes = dls_quantize(y, step, shift)

Layer norm and activations are torch's. A kernel may round them otherwise, by a few units of 2^-24:
its codes differ from the reference where a value lies that close to a rounding boundary. Without
them the codes are those of `dls_qparams` and `dls_quantize`.

Source: Q-MambaIR (arXiv 2503.21970), equations 5, 6, 9 and 10, for the quantizer.

Shape letters: C = channels, the size of dimension `dim`; G = groups with statistics of their own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qmir_ao.ops._activations import ACTIVATIONS
from qmir_ao.ops._affine import as_rows, check_finite, check_range, code_dtype, compute_dtype
from qmir_ao.ops._library import define
from qmir_ao.ops._moments import check_moments, merge_moments
from qmir_ao.ops.dls import check_scalars, dls_quantize_ref, predict, predict_from

OP = "chain_quantize"

STATISTICS = ("sample", "token", "tensor")
"""What has a step of its own: each entry of dimension 0, each row of the last one, or everything;
in the order that the kernels count them."""


class ChainArgs(NamedTuple):
    """The arguments of the operator, in order."""

    x: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_eps: float | None
    activation: str
    gate: Tensor | None
    gate_activation: str
    offset: Tensor | None
    scale_weights: Tensor
    shift_weights: Tensor
    dim: int
    quant_min: int
    quant_max: int
    statistics: str
    cap: bool
    moments: Tensor | None = None
    moments_channels: Tensor | None = None

    @property
    def groups(self) -> int:
        """How many groups the result has."""
        size = self.size
        if self.statistics == "token":
            return size[:-1].numel()
        return 1 if self.statistics == "tensor" or not size else size[0]

    @property
    def is_plain(self) -> bool:
        """Whether x is quantized as it is, or shifted."""
        return self.norm_eps is None and self.activation == "none" and self.gate is None

    @property
    def may_have_moments(self) -> bool:
        """Whether its statistics are those of channels of x."""
        return self.is_plain and self.statistics != "token"

    @property
    def size(self) -> torch.Size:
        """Shape of the codes."""
        if self.gate is None:
            return self.x.shape
        return torch.Size(torch.broadcast_shapes(self.x.shape, self.gate.shape))


def check_chain(chain: ChainArgs) -> None:
    """Refuse what does not fit together."""
    check_scalars(OP, chain.scale_weights, chain.shift_weights)
    check_range(OP, chain.quant_min, chain.quant_max)
    problem = _problem(chain)
    torch._check(problem is None, lambda: f"qmir::{OP}: {problem}")
    if chain.moments is not None:
        samples = chain.x.shape[0] if chain.x.dim() > 1 else 1
        check_moments(OP, chain.moments, chain.moments_channels, samples)


def _problem(chain: ChainArgs) -> str | None:
    """What is wrong, in words, without the cost of torch's checks: kernels ask at each call."""
    x, dim = chain.x, chain.dim
    if not -x.dim() <= dim < 0:
        return f"dim must be -{x.dim()}..-1 for a tensor of rank {x.dim()}, got {dim}"
    for name in (chain.activation, chain.gate_activation):
        if name not in ACTIVATIONS:
            return f"activations are {', '.join(ACTIVATIONS)}; got {name!r}"
    if chain.statistics not in STATISTICS or (chain.statistics == "token" and dim != -1):
        return (
            "statistics must be 'sample', 'tensor' or, with dim -1, 'token'; got "
            f"{chain.statistics!r} with dim {dim}"
        )
    if chain.moments is not None and not chain.may_have_moments:
        return "moments are those of x and its offset, for each sample or the whole tensor"
    weights = chain.norm_weight, chain.norm_bias
    if chain.norm_eps is None and weights != (None, None):
        return "norm_weight and norm_bias need norm_eps, got None"
    channels = x.shape[dim]
    for value in weights:
        if value is not None and value.numel() != channels:
            return f"a norm over {channels} channels got {tuple(value.shape)} weights"
    offset = chain.offset
    if offset is not None and offset.numel() not in (1, channels):
        return f"offset must have 1 or {channels} values, got {tuple(offset.shape)}"
    return None


def chain_values(chain: ChainArgs) -> Tensor:
    """What is quantized."""
    y, dim = chain.x, chain.dim
    if chain.norm_eps is not None:
        weight, bias = (
            None if t is None else t.reshape(-1) for t in (chain.norm_weight, chain.norm_bias)
        )
        last = F.layer_norm(y.movedim(dim, -1), [y.shape[dim]], weight, bias, chain.norm_eps)
        y = last.movedim(-1, dim)
    y = ACTIVATIONS[chain.activation](y)
    if chain.gate is not None:
        y = y * ACTIVATIONS[chain.gate_activation](chain.gate)
    if chain.offset is not None:
        y = y + chain.offset.reshape(-1, *[1] * (-1 - dim))
    return y


def chain_quantize_ref(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    activation: str,
    gate: Tensor | None,
    gate_activation: str,
    offset: Tensor | None,
    scale_weights: Tensor,
    shift_weights: Tensor,
    dim: int,
    quant_min: int,
    quant_max: int,
    statistics: str,
    cap: bool,
    moments: Tensor | None = None,
    moments_channels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `qmir::chain_quantize`."""
    chain = ChainArgs(
        x, norm_weight, norm_bias, norm_eps, activation, gate, gate_activation, offset,
        scale_weights, shift_weights, dim, quant_min, quant_max, statistics, cap, moments,
        moments_channels,
    )  # fmt: skip
    check_chain(chain)
    y = chain_values(chain).contiguous()
    rows = as_rows(y, chain.groups).to(compute_dtype(y))
    weights = scale_weights, shift_weights
    levels = quant_max - quant_min + 1
    if moments is None:
        found = predict(OP, rows, *weights, levels, cap)
    else:
        merged = merge_moments(moments, moments_channels, chain.groups, rows.shape[1])
        for part in merged:
            check_finite(OP, "a sample of x", part)
        found = predict_from(OP, tuple(t.to(rows.dtype) for t in merged), *weights, levels, cap)
    codes = dls_quantize_ref(y, found.step, found.shift, quant_min, quant_max)
    return codes, found.step, found.shift


def _chain_quantize_fake(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    activation: str,
    gate: Tensor | None,
    gate_activation: str,
    offset: Tensor | None,
    scale_weights: Tensor,
    shift_weights: Tensor,
    dim: int,
    quant_min: int,
    quant_max: int,
    statistics: str,
    cap: bool,
    moments: Tensor | None = None,
    moments_channels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    chain = ChainArgs(
        x, norm_weight, norm_bias, norm_eps, activation, gate, gate_activation, offset,
        scale_weights, shift_weights, dim, quant_min, quant_max, statistics, cap, moments,
        moments_channels,
    )  # fmt: skip
    check_chain(chain)
    groups = (chain.groups,)
    return (
        x.new_empty(chain.size, dtype=code_dtype(quant_max)),
        x.new_empty(groups, dtype=compute_dtype(x)),
        x.new_empty(groups, dtype=compute_dtype(x)),
    )


_chain_quantize = define(
    "chain_quantize(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float? norm_eps, "
    "str activation, Tensor? gate, str gate_activation, Tensor? offset, Tensor scale_weights, "
    "Tensor shift_weights, int dim, int quant_min, int quant_max, str statistics, bool cap, "
    "Tensor? moments=None, Tensor? moments_channels=None) "
    "-> (Tensor, Tensor, Tensor)",
    reference=chain_quantize_ref,
    fake=_chain_quantize_fake,
)


def chain_quantize(
    x: Tensor,
    scale_weights: Tensor,
    shift_weights: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    gate_activation: str = "none",
    offset: Tensor | None = None,
    dim: int = -1,
    quant_min: int = -8,
    quant_max: int = 7,
    statistics: str = "sample",
    cap: bool = False,
    moments: Tensor | None = None,
    moments_channels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, activate, gate, shift and quantize a tensor; see the module for the formula.

    Args:
        x: activations of any strides; dim 0 counts samples.
        scale_weights: (4,) weights of |mean|, std, min and max of the shifted tensor.
        shift_weights: (4,) weights of mean, std, min and max.
        norm_weight: (C,) of the layer norm.
        norm_bias: (C,) of the layer norm.
        norm_eps: with it there is a layer norm over the channels.
        activation: a key of `ACTIVATIONS`.
        gate: factor, broadcast with `x`.
        gate_activation: what the gate passes through.
        offset: one value for each channel, or one.
        dim: the channels' dimension, counted from the end (-1 is the last).
        quant_min: smallest code.
        quant_max: largest code; above 127 the codes are uint8.
        statistics: "sample", "token" or "tensor".
        cap: limit the step to (max - min) / levels.
        moments: float64 (B, O, 4), what `linear_moments`, say, gave with x; they
            stand for the statistics of x + offset, which is not read for them.
        moments_channels: int64, which of the O channels x holds, or None for all.

    Returns:
        Codes (int8 or uint8), contiguous; step and shift, float32.

    Shape:
        x (B, ..., C, ...) -> codes of the same shape; step and shift (B,), (tokens,) or (1,).

    Raises:
        NonFiniteError: a group holds NaN or infinity.
        RuntimeError: arguments that do not fit together.

    Source: arXiv 2503.21970, equations 5, 6, 9 and 10.
    """
    codes, step, shift = _chain_quantize(
        x, norm_weight, norm_bias, norm_eps, activation, gate, gate_activation, offset,
        scale_weights, shift_weights, dim, quant_min, quant_max, statistics, cap, moments,
        moments_channels,
    )  # fmt: skip
    return codes, step, shift
