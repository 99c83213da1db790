"""Weight rivals: LSQ, LSQ+, PACT's DoReFa, PAMS, QuantSR, N2UQ, soft and plain estimators."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.ops._affine import gradient_scale
from qmir_ao.ops.pack import pack
from qmir_ao.quant._graph import constants, pass_through, put_in_place
from qmir_ao.quant._weight_base import SteppedWeightFakeQuantize
from qmir_ao.quant.constants import constant_value
from qmir_ao.quant.functions import round_soft, round_ste, scale_gradient, straight_through
from qmir_ao.quant.init import lsq_step, weight_steps
from qmir_ao.quant.rfa import STEP_FLOOR
from qmir_ao.quant.spec import choose, container_bits

WEIGHT_INITS = ("lsq", "mse", "minmax", "sigma")


class WeightFakeQuantize(SteppedWeightFakeQuantize):
    """Base of the weight rivals: a uniform grid for the tensor or for each output channel.

    Args:
        bits: 2 to 8.
        preset: "paper" starts as the method's paper does, None as `init` says.
        granularity: "per_channel" (dim 0 of the weight) or "per_tensor".
        init: "lsq", "mse" (search), "minmax" or "sigma" (mean and three deviations, LSQ+); only
            methods with a learned step use it.
        factory_kwargs: device, passed by torch.ao.

    Raises:
        ConfigError: unknown bits, preset, granularity or init.
    """

    learned = True
    paper_init = "lsq"

    def __init__(
        self,
        bits: int = 4,
        *,
        preset: str | None = None,
        granularity: str | None = None,
        init: str | None = None,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        choose("preset", preset, (None, "paper", "official"))
        plain = "per_channel" if preset is None else "per_tensor"
        chosen = init or ("mse" if preset is None else self.paper_init)
        choose("init", chosen, WEIGHT_INITS)
        super().__init__(bits, preset, granularity or plain, chosen, factory_kwargs)
        self.step.requires_grad_(self.learned)
        self.to(self.step.device)

    def _start(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        if self.init == "mse":
            return weight_steps(rows, self.quant_min, self.quant_max)
        if self.init == "lsq":
            return torch.cat([lsq_step(row, self.quant_max) for row in rows])
        if self.init == "minmax":
            step = rows.abs().amax(1) / self.quant_max
        else:
            mean, spread = rows.mean(1), 3.0 * rows.std(1)
            peak = torch.maximum((mean - spread).abs(), (mean + spread).abs())
            step = torch.nan_to_num(peak) / 2 ** (self.bits - 1)
        return torch.where(step > 0, step, torch.ones_like(step))

    def may_resize(self, name: str, saved: Tensor) -> bool:
        """The step takes the number of channels that a checkpoint brings."""
        return self.granularity == "per_channel" and saved.dim() == 1 and name == "step"

    def forward(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize a weight."""
        if not self._ready:
            self.materialize(weight)
        if not self._quantizing:
            return weight
        self.project()
        return self.fake_quantize(weight)

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Values on the grid, with the method's gradients."""
        codes, step, shift = self.codes(weight)
        return step * codes if shift is None else step * codes - shift

    @torch.no_grad()
    def project(self) -> None:
        """Keep the steps positive."""
        if torch.compiler.is_compiling() or float(self.step.detach().min()) < STEP_FLOOR:
            self.step.clamp_(min=STEP_FLOOR)

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Whole-numbered codes in the shape of the weight, with gradients, and step and shift.

        Step and shift have the rank of the weight, so that they meet its output channels.
        """
        step = self._per_row(self.step, weight)
        count = weight.numel() // max(self.step.numel(), 1)
        step = scale_gradient(step, gradient_scale(count, self.quant_max))
        ratio = torch.clamp(weight / step, self.quant_min, self.quant_max)
        return self.round(ratio), step, None

    def round(self, ratio: Tensor) -> Tensor:
        """Rounding with the method's gradient."""
        return round_ste(ratio)

    @staticmethod
    def _per_row(values: Tensor, weight: Tensor) -> Tensor:
        if values.numel() == 1:
            return values.reshape([1] * weight.dim())
        return values.reshape(-1, *[1] * (weight.dim() - 1))

    def _largest(self, weight: Tensor) -> Tensor:
        """Largest value of the tensor, or of each output channel, in the rank of the weight."""
        if self.granularity == "per_tensor" or weight.dim() < 2:
            return weight.amax().reshape([1] * weight.dim())
        return weight.amax(dim=tuple(range(1, weight.dim())), keepdim=True)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the learned step: w_hat = scale * (code - zero_point)."""
        return self.step.detach(), torch.zeros_like(self.step)

    @torch.no_grad()
    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the call of this quantizer in a graph by packed integers and their grid."""
        if not self._quantizing:
            return pass_through(model, node)
        weight = constant_value(model, node.all_input_nodes[0])
        if not self._ready:
            self.materialize(weight)
        self.project()
        codes, step, shift = self.codes(weight)
        width = container_bits(self.bits)
        packed = pack(codes.to(torch.int8), width)
        flat = step.detach().reshape(-1)
        offset = torch.zeros_like(flat[:1]) if shift is None else shift.detach().reshape(-1)
        with model.graph.inserting_before(node):
            nodes = constants(model, node, packed=packed, step=flat, shift=offset)
            new = model.graph.call_function(
                torch.ops.qmir.rfa_dequantize.default, (*nodes, list(weight.shape), width)
            )
        new.meta["qmir_source"], new.meta["qmir_bits"] = node.name, self.bits
        return put_in_place(model, node, new)


class LSQWeightFakeQuantize(WeightFakeQuantize):
    """LSQ on weights: a learned step. Arguments and errors as `WeightFakeQuantize`.

    Source: Esser et al., arXiv 1902.08153.
    """


class LSQPlusWeightFakeQuantize(WeightFakeQuantize):
    """LSQ+ on weights: LSQ from mean and three deviations. Arguments as `WeightFakeQuantize`.

    Source: Bhalgat et al., arXiv 2004.09576.
    """

    paper_init = "sigma"


class STEWeightFakeQuantize(WeightFakeQuantize):
    """Straight-through estimator alone: the step stays. Arguments as `WeightFakeQuantize`.

    Source: Bengio et al., arXiv 1308.3432.
    """

    learned = False
    paper_init = "minmax"


class SoftSTEWeightFakeQuantize(WeightFakeQuantize):
    """LSQ with the gradient of a tanh ramp. Arguments and errors as `WeightFakeQuantize`.

    Source: the soft estimator of QuantSR (NeurIPS 2023).
    """

    def round(self, ratio: Tensor) -> Tensor:
        """See `round_soft`."""
        return round_soft(ratio)


class QuantSRWeightFakeQuantize(SoftSTEWeightFakeQuantize):
    """QuantSR on weights: LSQ with its soft rounding. Arguments as `WeightFakeQuantize`.

    Source: Qin et al., QuantSR (NeurIPS 2023).
    """


class PAMSWeightFakeQuantize(WeightFakeQuantize):
    """PAMS on weights: the grid ends at the largest magnitude, at every step of the training.

    Arguments and errors as `WeightFakeQuantize`; `init` has no effect.

    Source: Li et al., PAMS (ECCV 2020), and its code.
    """

    learned = False

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes from -quant_max to quant_max; the magnitude carries no gradient, as published."""
        peak = self._largest(weight.detach().abs()) + 1e-8
        step = peak / self.quant_max
        return round_ste(weight / step), step, None


class PACTWeightFakeQuantize(WeightFakeQuantize):
    """DoReFa, PACT's companion on weights: a grid that is uniform in tanh(w).

    The published form has range [-1, 1] and relies on batch norm; here the grid keeps the range of
    tanh(w), unless `preset="paper"`. Arguments and errors as `WeightFakeQuantize`.

    Source: Zhou et al., arXiv 1606.06160; Choi et al., arXiv 1805.06085.
    """

    learned = False

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes of the whole range, an even number of levels around zero."""
        levels = 2**self.bits - 1
        bent = torch.tanh(weight)
        peak = self._largest(bent.detach().abs()).clamp(min=STEP_FLOOR)
        unit = bent / (2.0 * peak) + 0.5
        codes = round_ste(unit * levels) + self.quant_min
        reach = torch.ones_like(peak) if self.preset == "paper" else peak
        step = 2.0 * reach / levels
        return codes, step, reach + step * self.quant_min


class N2UQWeightFakeQuantize(WeightFakeQuantize):
    """N2UQ on weights: 2**bits levels between -gamma and gamma, gamma from the mean magnitude.

    Arguments and errors as `WeightFakeQuantize`; `init` has no effect.

    Source: Liu et al., N2UQ (CVPR 2022), and its code.
    """

    learned = False

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Values on the grid; the gradient is that of w / gamma, clipped or not, as published."""
        return straight_through(weight / self._gamma(weight), super().fake_quantize(weight))

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes of the whole range."""
        levels, gamma = 2**self.bits - 1, self._gamma(weight)
        unit = (weight.detach() / gamma).clamp(-1.0, 1.0) * 0.5 + 0.5
        step = 2.0 * gamma / levels
        return torch.round(unit * levels) + self.quant_min, step, gamma + step * self.quant_min

    def _gamma(self, weight: Tensor) -> Tensor:
        size = weight.detach().abs()
        if self.granularity == "per_tensor" or weight.dim() < 2:
            mean = size.mean().reshape([1] * weight.dim())
        else:
            mean = size.mean(dim=tuple(range(1, weight.dim())), keepdim=True)
        factor: float = (2**self.bits - 1) / 2 ** (self.bits - 1)
        return (mean * factor).clamp(min=STEP_FLOOR)
