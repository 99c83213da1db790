"""Turn fake-quantizer modules into operators, by the `convert` method each of them defines."""

from typing import Any

from torch.fx import GraphModule

from qmir_ao.passes.base import Pass
from qmir_ao.quant.patterns import module_of
from qmir_ao.quant.prepare import is_fake_quantize


class ConvertQuantizers(Pass):
    """Replace each fake-quantizer call by quantize and dequantize operators.

    Values do not change: `dls_dequantize(dls_quantize(x))` is the fake-quantizer's own arithmetic.

        before: xq = call_module[fq](x)      after: step, shift = dls_qparams(x, w, v, ...)
                                                    q = dls_quantize(x, step, shift, ...)
                                                    xq = dls_dequantize(q, step, shift)
    """

    requires = ("InlineModules",)
    ensures = ("quantizers_are_operators",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Convert every fake-quantizer that brings a `convert` method."""
        changed = 0
        for node in list(graph_module.graph.nodes):
            module: Any = module_of(graph_module, node)
            if is_fake_quantize(module) and hasattr(module, "convert"):
                module.convert(graph_module, node)
                changed += 1
        return changed
