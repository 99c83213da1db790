"""RFA as a trainable weight fake-quantizer for torch.ao and torchao."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.ops.rfa_fake_quant import rfa_fake_quant
from qmir_ao.quant._bases import parameter
from qmir_ao.quant._graph import constants, pass_through, put_in_place
from qmir_ao.quant._weight_base import SteppedWeightFakeQuantize
from qmir_ao.quant.constants import constant_value
from qmir_ao.quant.init import RFA_INITS, lsq_step, weight_steps
from qmir_ao.quant.patterns import is_constant
from qmir_ao.quant.spec import choose

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


class RFAFakeQuantize(SteppedWeightFakeQuantize):
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

    def __init__(
        self,
        bits: int = 4,
        *,
        preset: str | None = None,
        granularity: str | None = None,
        init: str | None = None,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        settings = PRESETS[choose("preset", preset, PRESETS)]
        chosen = choose("init", init or settings["init"], RFA_INITS)
        grain = granularity or settings["granularity"]
        super().__init__(bits, preset, grain, chosen, factory_kwargs)
        self.guard = preset != "official"
        self.shift = parameter(torch.zeros(1), factory_kwargs)
        levels = torch.arange(self.quant_min, self.quant_max + 1)
        self.thresholds = parameter(levels, factory_kwargs)
        self.to(self.step.device)

    def _start(self, rows: Tensor) -> Tensor:
        self.shift.data = torch.zeros_like(self.shift.data[:1])
        if self.init == "mse":
            return weight_steps(rows, self.quant_min, self.quant_max)
        return lsq_step(rows, self.quant_max).expand(len(rows))

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
