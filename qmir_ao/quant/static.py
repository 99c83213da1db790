"""Static activation quantizers: one learned step and one learned shift for a whole tensor."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.errors import QmirError
from qmir_ao.ops._affine import check_finite, gradient_scale
from qmir_ao.ops.static import static_fake_quant
from qmir_ao.quant._bases import QmirFakeQuantize, parameter
from qmir_ao.quant._graph import constants, pass_through, put_in_place, quantize_dequantize
from qmir_ao.quant.constants import constant_value, register_constant
from qmir_ao.quant.fake_quant import SIGNED_BELOW
from qmir_ao.quant.functions import scale_gradient
from qmir_ao.quant.init import STATIC_INITS, static_grid
from qmir_ao.quant.patterns import is_constant
from qmir_ao.quant.rfa import STEP_FLOOR
from qmir_ao.quant.spec import check_bits, choose, code_range

CONSTANTS = ("own", "searched")
"""How a scan's A, D and delta bias are quantized: by the method itself, or on a searched grid."""


class StaticFakeQuantize(QmirFakeQuantize):
    """Fake-quantizer with one learned step and one learned shift for the whole tensor.

    The quantizer of the published placement, and the base of the static rivals: those override
    `grid`, `fake_quantize` and the class attributes.

    Args:
        bits: 2 to 8.
        preset: None keeps the step positive; "official" leaves it free, as published.
        init: "lsq" (2 * mean|x| / sqrt(quant_max), as published), "mse" (search), "minmax" or
            "percentile", all on the first training batch or on calibration data.
        signed: "auto" (decided by the first training batch) or "always".
        constants: "own" or "searched": whether a parameter operand (A, D, delta bias of a scan)
            goes through this method, which may round A to zero, or through a searched grid
            (the default).
        constant: the input is a parameter; the result is clipped to its range.
        factory_kwargs: device, passed by torch.ao.

    Raises:
        ConfigError: unknown bits, preset, init, signed or constants.

    Source: the activation quantizer in the published code of arXiv 2503.21970.
    """

    signed_range: Tensor
    learns_shift = True
    scales_shift_gradient = False
    symmetric = False
    """Whether codes run from -quant_max; one level is left unused."""
    default_init = "lsq"
    default_constants = "searched"

    def __init__(
        self,
        bits: int = 4,
        *,
        preset: str | None = None,
        init: str | None = None,
        signed: str = "auto",
        constants: str | None = None,
        constant: bool = False,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        is_signed = choose("signed", signed, ("auto", "always")) == "always"
        super().__init__(check_bits(bits), *code_range(bits, is_signed))
        self.preset = choose("preset", preset, (None, "paper", "official"))
        self.init = choose("init", init or self.default_init, STATIC_INITS)
        self.signed, self.constant = signed, constant
        self.constants = choose("constants", constants or self.default_constants, CONSTANTS)
        self.guard = preset != "official"
        self.register_buffer("signed_range", torch.tensor([int(is_signed)], dtype=torch.uint8))
        self.step = parameter(torch.ones(1), factory_kwargs)
        self.shift = parameter(torch.zeros(1), factory_kwargs)
        self.shift.requires_grad_(self.learns_shift)
        self._set_range()
        self.to(self.step.device)

    def for_constant(self) -> QmirFakeQuantize:
        """This quantizer, or a searched grid that clips to the range of the parameter."""
        if self.constant or self.constants == "own":
            return self
        return StaticFakeQuantize(self.bits, init="mse", signed="always", constant=True)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize `x`.

        Raises:
            NonFiniteError: `x` holds NaN or infinity.
        """
        if self._calibrating:
            return cast(Tensor, self.observe(x))
        if not self._ready and self.training and self._observing:
            self.initialize(x)
        if not self._quantizing:
            return x
        if self.guard:
            self.project()
        y = self.fake_quantize(x)
        return torch.maximum(torch.minimum(y, x.amax()), x.amin()) if self.constant else y

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Values on the grid, with the method's gradients."""
        shift: Tensor = self.shift
        if self.scales_shift_gradient:
            shift = scale_gradient(shift, gradient_scale(x.numel(), self.quant_max))
        return static_fake_quant(x, self.step, shift, self.quant_min, self.quant_max)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Step and shift of x_hat = step * code - shift, shape (1,)."""
        return self.step.detach(), self.shift.detach()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set step, shift and the sign of the range from a first batch."""
        if x.numel() == 0:
            return
        check_finite("static_fake_quant", "x", x)
        values = x.detach().float()
        if self.signed == "auto":
            self.signed_range.fill_(int(float((values + self.shift).min()) < SIGNED_BELOW))
            self._set_range()
        self.start(values)
        self.mark_initialized()

    def start(self, values: Tensor) -> None:
        """Set the learned parameters from the float32 values of a first batch."""
        step, shift = static_grid(
            values + self.shift, self.init, self.bits, self.quant_min, self.quant_max,
            shifted=self.learns_shift,
        )  # fmt: skip
        self.step.fill_(step)
        if shift is not None:
            self.shift.fill_(shift)

    @torch.no_grad()
    def project(self) -> None:
        """Keep the step positive."""
        if torch.compiler.is_compiling() or float(self.step.detach()) < STEP_FLOOR:
            self.step.clamp_(min=STEP_FLOOR)

    def sync(self) -> None:
        """Bring the Python attributes in line with the buffers."""
        super().sync()
        self._set_range()

    def _set_range(self) -> None:
        self.quant_min, self.quant_max = code_range(self.bits, bool(self.signed_range[0]))
        if self.symmetric and self.quant_min < 0:
            self.quant_min = -self.quant_max

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and (fractional) zero point: x_hat = scale * (code - zero_point)."""
        step, shift = self.grid()
        return step, shift / step

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the call of this quantizer in a graph by quantize and dequantize.

        A parameter operand becomes its value. Unsigned 8-bit codes are moved into int8.

        Raises:
            QmirError: the quantizer was never initialised.
        """
        if not self._quantizing:
            return pass_through(model, node)
        if not self._ready:
            raise QmirError(
                f"the quantizer {node.target} ({type(self).__name__}) has seen no data, so it has "
                "no step; train the prepared model, or pass data through qmir_ao.calibrate"
            )
        if self.guard:
            self.project()
        source = node.all_input_nodes[0]
        with model.graph.inserting_before(node):
            if is_constant(source):
                with torch.no_grad():
                    value = self(constant_value(model, source))
                new = model.graph.get_attr(register_constant(model, f"_qmir_{node.name}", value))
                new.meta["qmir_source"] = node.name
                return put_in_place(model, node, new)
            self.emit(model, node)
        return None

    def emit(self, model: GraphModule, node: Node) -> None:
        """Put quantize and dequantize operators in place of `node`."""
        grid, low, high = self.grid(), self.quant_min, self.quant_max
        if high > 127:
            step, shift = grid
            grid, low, high = (step, shift - 128 * step), low - 128, high - 128
        step_node, shift_node = constants(model, node, step=grid[0], shift=grid[1])
        quantize_dequantize(model, node, (step_node, shift_node), low, high)

    def extra_repr(self) -> str:
        """Settings, for printing a model."""
        return (
            f"bits={self.bits}, preset={self.preset!r}, init={self.init!r}, "
            f"signed={self.signed!r}, constant={self.constant}"
        )
