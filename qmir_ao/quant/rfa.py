"""RFA as a trainable weight fake-quantizer for torch.ao and torchao."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.ops._affine import check_finite
from qmir_ao.ops.rfa_fake_quant import rfa_fake_quant
from qmir_ao.quant._bases import QmirFakeQuantize, parameter
from qmir_ao.quant._graph import constants, pass_through, put_in_place
from qmir_ao.quant.constants import constant_value
from qmir_ao.quant.init import RFA_INITS, lsq_step, weight_steps
from qmir_ao.quant.patterns import is_constant
from qmir_ao.quant.spec import check_bits, choose, code_range

PRESETS: dict[str | None, dict[str, str]] = {
    None: {"granularity": "per_channel", "init": "mse"},
    "paper": {"granularity": "per_tensor", "init": "lsq"},
    "official": {"granularity": "per_tensor", "init": "lsq"},
}

MIN_GAP = 1e-3
"""Least distance between neighbouring thresholds: the surrogate's slope is its inverse."""

STEP_FLOOR = 1e-6
"""Least step: gradient descent may push one through zero."""

# Sorting and gap enforcement round; a violation smaller than this is left alone.
_GAP_TOLERANCE = 1e-4


class RFAFakeQuantize(QmirFakeQuantize):
    """Weight fake-quantizer with learned step, shift and rounding thresholds.

    Args:
        bits: 2 to 8.
        preset: None for the defaults that won in this project's evidence, "paper" for one step per
            tensor with LSQ's start, "official" for the same without the guards on order and sign.
        granularity: "per_channel" (dim 0 of the weight) or "per_tensor", of the steps; the shift is
            one per tensor always. Overrides the preset.
        init: "mse" (search) or "lsq"; overrides the preset.
        factory_kwargs: device, passed by torch.ao.

    Raises:
        ConfigError: unknown bits, preset, granularity or init.

    Source: arXiv 2503.21970, section 3.4 and algorithm 1.
    """

    ch_axis = 0
    quantizes_weights = True

    def __init__(
        self,
        bits: int = 4,
        *,
        preset: str | None = None,
        granularity: str | None = None,
        init: str | None = None,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(check_bits(bits), *code_range(bits))
        settings = PRESETS[choose("preset", preset, PRESETS)]
        allowed = ("per_channel", "per_tensor")
        self.preset, self.guard = preset, preset != "official"
        self.granularity = choose("granularity", granularity or settings["granularity"], allowed)
        self.init = choose("init", init or settings["init"], RFA_INITS)
        per_channel = self.granularity == "per_channel"
        self.qscheme = torch.per_channel_affine if per_channel else torch.per_tensor_affine
        self.step = parameter(torch.ones(1), factory_kwargs)
        self.shift = parameter(torch.zeros(1), factory_kwargs)
        levels = torch.arange(self.quant_min, self.quant_max + 1)
        self.thresholds = parameter(levels, factory_kwargs)
        self.to(self.step.device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def materialize(self, weight: Tensor, channels: int | None = None) -> None:
        """Size and initialise the parameters for a weight.

        The parameter objects stay the same, so an optimizer made before this call still has them.

        Args:
            weight: the weight to quantize.
            channels: number of output channels; dim 0 of the weight by default.

        Raises:
            NonFiniteError: the weight holds NaN or infinity.
        """
        weight = weight.detach().to(self.step.device)
        check_finite("rfa_fake_quant", "the weight", weight)
        groups = 1
        if self.granularity == "per_channel" and weight.dim() > 0:
            groups = weight.shape[0] if channels is None else channels
        rows = weight.reshape(groups, -1)
        if weight.numel() == 0:
            step = torch.ones(groups)
        elif self.init == "mse":
            step = weight_steps(rows, self.quant_min, self.quant_max)
        else:
            step = lsq_step(rows, self.quant_max).expand(groups)
        self.step.data = step.to(self.step).clone()
        self.shift.data = torch.zeros_like(self.step.data[:1])
        self.mark_initialized()

    def may_resize(self, name: str, saved: Tensor) -> bool:
        """Step takes the number of channels that a checkpoint brings.

        So does shift, of which older checkpoints hold one for each channel.
        """
        one_per_channel = self.granularity == "per_channel" and saved.dim() == 1
        return name in ("step", "shift") and one_per_channel

    def forward(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize a weight.

        Raises:
            NonFiniteError: the weight holds NaN or infinity.
        """
        if not self._ready:
            self.materialize(weight)
        if not self._quantizing:
            return weight
        if self.guard:
            self.project()
        return rfa_fake_quant(weight, self.step, self.shift, self.thresholds, self.quant_min)

    @torch.no_grad()
    def project(self) -> None:
        """Keep steps positive and thresholds in order with a gap; writes only where needed.

        A write between two uses of one weight would invalidate the first use's backward.
        """
        if not torch.compiler.is_compiling():
            gap = float(self.thresholds.detach().diff().min())
            step = float(self.step.detach().min()) if self.step.numel() else STEP_FLOOR
            if gap >= MIN_GAP - _GAP_TOLERANCE and step >= STEP_FLOOR:
                return
        self.step.clamp_(min=STEP_FLOOR)
        ramp = MIN_GAP * torch.arange(self.thresholds.numel(), device=self.thresholds.device)
        ordered = torch.sort(self.thresholds).values
        self.thresholds.copy_(torch.cummax(ordered - ramp, dim=0).values + ramp)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and (fractional) zero point: w_hat = scale * (code - zero_point)."""
        return self.step.detach(), (self.shift / self.step).detach()

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the call of this quantizer in a graph by `rfa_fake_quant` on constants.

        Folding the weight to packed integers is the business of a later pass.
        """
        if not self._quantizing:
            return pass_through(model, node)
        source = node.all_input_nodes[0]
        if not self._ready and is_constant(source):
            self.materialize(constant_value(model, source))
        if self.guard:
            self.project()
        with model.graph.inserting_before(node):
            learned = constants(
                model, node, step=self.step, shift=self.shift, thresholds=self.thresholds
            )
            new = model.graph.call_function(
                torch.ops.qmir.rfa_fake_quant.default, (source, *learned, self.quant_min)
            )
        new.meta["qmir_source"], new.meta["qmir_bits"] = node.name, self.bits
        return put_in_place(model, node, new)

    def extra_repr(self) -> str:
        """Settings, for printing a model."""
        return (
            f"bits={self.bits}, preset={self.preset!r}, granularity={self.granularity!r}, "
            f"init={self.init!r}"
        )
