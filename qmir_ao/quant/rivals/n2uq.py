"""N2UQ: learned, non-uniform input thresholds with uniform output levels."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.quant._bases import parameter
from qmir_ao.quant._graph import constants, put_in_place
from qmir_ao.quant.functions import interval_cuts, threshold_codes
from qmir_ao.quant.init import static_grid
from qmir_ao.quant.static import StaticFakeQuantize

MIN_WIDTH = 1e-3
"""Least width of an interval, as published."""


class N2UQFakeQuantize(StaticFakeQuantize):
    """Learned thresholds in, uniform levels out.

    x is scaled, its code is the number of learned thresholds it exceeds, and the code is scaled
    and shifted back. The published form serves non-negative inputs and leaves shifts to the
    network's own biases; here the output shift is learned instead, so signed tensors work too.
    Its parameters learn at a tenth of the network's rate, as published.

    Arguments and errors as `StaticFakeQuantize`; `init` is "mse" by default.

    Source: Liu et al., N2UQ (CVPR 2022), and its code.
    """

    learning_rate_factor = 0.1
    default_init = "mse"

    def __init__(
        self, bits: int = 4, *, factory_kwargs: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        settings["signed"] = "always"
        super().__init__(bits, factory_kwargs=factory_kwargs, **settings)
        count = 2**self.bits - 1
        self.scale_in = parameter(torch.ones(1), factory_kwargs)
        self.start_in = parameter(torch.zeros(1), factory_kwargs)
        self.widths = parameter(torch.full((count,), 2.0 / count), factory_kwargs)

    def start(self, values: Tensor) -> None:
        """A uniform grid from the first batch, scaled so that all widths sum to 2."""
        step, shift = static_grid(
            values, self.init, self.bits, self.quant_min, self.quant_max, shifted=True
        )
        shift = 0.0 if shift is None else shift
        self.step.fill_(step)
        self.shift.fill_(shift)
        scale = 2.0 / (step * self.widths.numel())
        self.scale_in.fill_(scale)
        # The lowest level, step * quant_min - shift, is where the ramp starts.
        self.start_in.fill_((step * self.quant_min - shift) * scale)

    @torch.no_grad()
    def project(self) -> None:
        """Keep the step positive and the intervals open."""
        super().project()
        if torch.compiler.is_compiling() or float(self.widths.detach().min()) < MIN_WIDTH:
            self.widths.clamp_(min=MIN_WIDTH)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Values on the output grid."""
        codes = threshold_codes((x * self.scale_in).contiguous(), self.start_in, self.widths)
        return self.step * (codes + self.quant_min) - self.shift

    def emit(self, model: GraphModule, node: Node) -> None:
        """Count thresholds, then dequantize; the codes are int8 whatever the width."""
        graph, aten, source = model.graph, torch.ops.aten, node.all_input_nodes[0]
        cuts = interval_cuts(self.start_in, self.widths)
        scale, cuts_node, step, shift = constants(
            model, node, scale_in=self.scale_in, cuts=cuts, step=self.step, shift=self.shift
        )
        scaled = graph.call_function(aten.mul.Tensor, (source, scale))
        dense = graph.call_function(aten.contiguous.default, (scaled,))
        counted = graph.call_function(
            aten.bucketize.Tensor, (dense, cuts_node), {"out_int32": True}
        )
        scaled.meta["qmir_source"] = node.name
        centred = graph.call_function(aten.add.Scalar, (counted, self.quant_min))
        codes = graph.call_function(aten.to.dtype, (centred, torch.int8))
        values = graph.call_function(torch.ops.qmir.dls_dequantize.default, (codes, step, shift))
        codes.meta["qmir_source"] = values.meta["qmir_source"] = node.name
        codes.meta["qmir_range"] = (self.quant_min, self.quant_max)
        if "nn_module_stack" in node.meta:
            codes.meta["nn_module_stack"] = node.meta["nn_module_stack"]
        put_in_place(model, node, values)
