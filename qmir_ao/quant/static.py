"""The static activation quantizer of the published placement as a fake-quantizer."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.ops._affine import check_finite
from qmir_ao.ops.static import static_fake_quant
from qmir_ao.quant._bases import QmirFakeQuantize, parameter
from qmir_ao.quant._graph import constants, pass_through, put_in_place, quantize_dequantize
from qmir_ao.quant.fake_quant import SIGNED_BELOW
from qmir_ao.quant.init import STATIC_INITS, lsq_step, search_grid
from qmir_ao.quant.patterns import is_constant
from qmir_ao.quant.rfa import STEP_FLOOR
from qmir_ao.quant.spec import check_bits, choose, code_range


class StaticFakeQuantize(QmirFakeQuantize):
    """Fake-quantizer with one learned step and one learned shift for the whole tensor.

    Args:
        bits: 2 to 8.
        preset: None keeps the step positive; "official" leaves it free, as published.
        init: "lsq" (2 * mean|x| / sqrt(quant_max), as published) or "mse" (search), both on the
            first training batch.
        signed: "auto" (decided by the first training batch) or "always".
        factory_kwargs: device, passed by torch.ao.

    Raises:
        ConfigError: unknown bits, preset, init or signed.

    Source: the activation quantizer in the published code of arXiv 2503.21970.
    """

    signed_range: Tensor

    def __init__(
        self,
        bits: int = 4,
        *,
        preset: str | None = None,
        init: str = "lsq",
        signed: str = "auto",
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        is_signed = choose("signed", signed, ("auto", "always")) == "always"
        super().__init__(check_bits(bits), *code_range(bits, is_signed))
        self.preset = choose("preset", preset, (None, "paper", "official"))
        self.init, self.signed = choose("init", init, STATIC_INITS), signed
        self.guard = preset != "official"
        self.register_buffer("signed_range", torch.tensor([int(is_signed)], dtype=torch.uint8))
        self.step = parameter(torch.ones(1), factory_kwargs)
        self.shift = parameter(torch.zeros(1), factory_kwargs)
        self.to(self.step.device)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize `x`.

        Raises:
            NonFiniteError: `x` holds NaN or infinity.
        """
        if not self._ready and self.training and self._observing:
            self.initialize(x)
        if not self._quantizing:
            return x
        if self.guard:
            self.project()
        return static_fake_quant(x, self.step, self.shift, self.quant_min, self.quant_max)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set step, shift and the sign of the range from a first batch."""
        if x.numel() == 0:
            return
        check_finite("static_fake_quant", "x", x)
        values = x.detach().float() + self.shift
        if self.signed == "auto":
            self.signed_range.fill_(int(float(values.min()) < SIGNED_BELOW))
            self.quant_min, self.quant_max = code_range(self.bits, bool(self.signed_range[0]))
        low, high = x.detach().float().aminmax()
        if self.init == "mse" and bool(high > low):
            flat = x.detach().float().reshape(-1)
            weights = torch.ones_like(flat)
            step, shift = search_grid(flat, weights, self.bits, self.quant_min)
            self.step.fill_(step)
            self.shift.fill_(shift)
        else:
            self.step.copy_(lsq_step(values, self.quant_max))
        self.mark_initialized()

    @torch.no_grad()
    def project(self) -> None:
        """Keep the step positive."""
        if torch.compiler.is_compiling() or float(self.step.detach()) < STEP_FLOOR:
            self.step.clamp_(min=STEP_FLOOR)

    def sync(self) -> None:
        """Bring the Python attributes in line with the buffers."""
        super().sync()
        self.quant_min, self.quant_max = code_range(self.bits, bool(self.signed_range[0]))

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and (fractional) zero point: x_hat = scale * (code - zero_point)."""
        return self.step.detach(), (self.shift / self.step).detach()

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the call of this quantizer in a graph by quantize and dequantize."""
        if not self._quantizing:
            return pass_through(model, node)
        if self.guard:
            self.project()
        with model.graph.inserting_before(node):
            step, shift = constants(model, node, step=self.step, shift=self.shift)
            source = node.all_input_nodes[0]
            if self.quant_max > 127 or is_constant(source):
                new = model.graph.call_function(
                    torch.ops.qmir.static_fake_quant.default,
                    (source, step, shift, self.quant_min, self.quant_max),
                )
                new.meta["qmir_source"] = node.name
                return put_in_place(model, node, new)
            quantize_dequantize(model, node, (step, shift), self.quant_min, self.quant_max)
        return None

    def extra_repr(self) -> str:
        """Settings, for printing a model."""
        return (
            f"bits={self.bits}, preset={self.preset!r}, init={self.init!r}, signed={self.signed!r}"
        )
