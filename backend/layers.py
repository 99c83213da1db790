"""The layers of a float network that quantization concerns: where they are, what they weigh."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

import qmir_ao.quant._bases  # noqa: F401  (imports torchao without its noise)
from qmir_ao.capture.export import export_graph
from qmir_ao.capture.functionalize import functionalize
from qmir_ao.capture.selective_scan import swapped_selective_scan
from qmir_ao.capture.state import own_copy
from qmir_ao.errors import CaptureError, UnsupportedGraph
from qmir_ao.passes.pipeline import CAPTURE, run_passes
from qmir_ao.quant.constants import constant_value
from qmir_ao.quant.patterns import (
    Pattern,
    match,
    module_of,
    module_path,
    operand,
    unquantizable,
)
from qmir_ao.quant.placement import float_by_default
from qmir_ao.quant.prepare import trace_graph
from qmir_ao.quant.spec import container_bits


@dataclasses.dataclass(frozen=True)
class Layer:
    """The quantizable operators that one module calls itself; bit widths are set per layer.

    Attributes:
        path: dotted name of the module; "" where the network calls the operators itself.
        kinds: of its operators, in the order in which they run.
        weights: shapes of their weights, output channels first.
        reason: why it stays in float by default, or None.
    """

    path: str
    kinds: tuple[str, ...]
    weights: tuple[tuple[int, ...], ...]
    reason: str | None = None

    @property
    def elements(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.weights)

    def stored_bytes(self, bits: int) -> int:
        """Bytes of the packed weights and their scales; 3 bits are stored in 4, 5 to 7 in 8."""
        width = container_bits(bits)
        packed = sum(-(-math.prod(shape) * width // 8) for shape in self.weights)
        # A step for each output channel and one shift, as RFA learns them by default.
        return packed + sum(4 * (shape[0] + 1) for shape in self.weights)


def capture_float(model: nn.Module, example_inputs: Sequence[Any] | None = None) -> GraphModule:
    """The graph of a float network, by symbolic trace where that works, else by export.

    Args:
        model: float network; left as it was.
        example_inputs: positional inputs for the export.

    Raises:
        CaptureError: neither works.
    """
    own = own_copy(model).eval()
    try:
        with swapped_selective_scan(own):
            graph_module = trace_graph(own)
        functionalize(graph_module)
    except CaptureError:
        if example_inputs is None:
            raise
        graph_module = export_graph(own, example_inputs)
    run_passes(graph_module, CAPTURE)
    return graph_module


def find_layers(graph_module: GraphModule) -> list[Layer]:
    """The layers of a captured float network in the order in which they run.

    Raises:
        UnsupportedGraph: it has none.
    """
    kept = float_by_default(graph_module)
    found: dict[tuple[str, str | None], list[tuple[Node, Pattern]]] = {}
    for node in graph_module.graph.nodes:
        pattern = match(graph_module, node)
        if pattern is not None:
            reason = kept.get(node) or unquantizable(graph_module, node, pattern)
            found.setdefault((module_path(node), reason), []).append((node, pattern))
    if not found:
        raise UnsupportedGraph("the network has no linear layer, convolution or selective scan")
    return [_layer(graph_module, *key, members) for key, members in found.items()]


def quantized_layers(layers: Sequence[Layer]) -> list[Layer]:
    """Those that do not stay in float by default."""
    return [layer for layer in layers if layer.reason is None]


def _layer(
    graph_module: GraphModule, path: str, reason: str | None, members: list[tuple[Node, Pattern]]
) -> Layer:
    weights: dict[Any, tuple[int, ...]] = {}
    for node, pattern in members:
        if pattern.weight is not None and reason is None:
            weights[_weight_key(node, pattern.weight)] = _weight_shape(
                graph_module, node, pattern.weight
            )
    return Layer(path, tuple(p.kind for _, p in members), tuple(weights.values()), reason)


def _weight_key(node: Node, position: int) -> Any:
    """The same for each call of a module that runs twice: it has one weight."""
    weight = operand(node, position)
    if node.op == "call_module":
        return node.target
    return weight.target if weight is not None and weight.op == "get_attr" else node


def _weight_shape(graph_module: GraphModule, node: Node, position: int) -> tuple[int, ...]:
    module: Any = module_of(graph_module, node)
    if module is not None:
        return tuple(module.weight.shape)
    weight = operand(node, position)
    assert weight is not None
    shape: torch.Size = constant_value(graph_module, weight).shape
    return tuple(shape)


def model_bytes(model: nn.Module, layers: Sequence[Layer], bits: int) -> dict[str, int]:
    """Bytes of a network with the layers that are quantized by default at one width.

    Returns:
        `weights` (packed, with their scales), `rest` (parameters left in float32) and `total`.
    """
    quantized = quantized_layers(layers)
    rest = 4 * (sum(p.numel() for p in model.parameters()) - sum(x.elements for x in quantized))
    weights = sum(layer.stored_bytes(bits) for layer in quantized)
    return {"weights": weights, "rest": rest, "total": weights + rest}
