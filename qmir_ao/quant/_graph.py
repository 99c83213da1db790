"""Replace fake-quantizer calls in a graph by operators on constants."""

import torch
from torch.fx import GraphModule, Node

from qmir_ao.quant.constants import register_constant


def constants(graph_module: GraphModule, node: Node, **values: torch.Tensor) -> list[Node]:
    """`get_attr` nodes for parameter values of the quantizer that `node` calls."""
    graph = graph_module.graph
    return [
        graph.get_attr(register_constant(graph_module, f"_qmir_{node.name}_{name}", value))
        for name, value in values.items()
    ]


def put_in_place(graph_module: GraphModule, node: Node, new: Node) -> None:
    """Hand the uses and the metadata of `node` over to `new`, and remove `node`."""
    new.meta = {**node.meta, **new.meta}
    node.replace_all_uses_with(new)
    graph_module.graph.erase_node(node)


def pass_through(graph_module: GraphModule, node: Node) -> None:
    """Remove a switched-off fake-quantizer."""
    node.replace_all_uses_with(node.all_input_nodes[0])
    graph_module.graph.erase_node(node)


def quantize_dequantize(
    graph_module: GraphModule,
    node: Node,
    grid: tuple[Node, Node],
    quant_min: int,
    quant_max: int,
    offset: Node | None = None,
) -> None:
    """Emit `dls_dequantize(dls_quantize(x)) - offset` on the given grid, in place of `node`."""
    graph, qmir = graph_module.graph, torch.ops.qmir
    source = node.all_input_nodes[0]
    codes = graph.call_function(qmir.dls_quantize.default, (source, *grid, quant_min, quant_max))
    values = graph.call_function(qmir.dls_dequantize.default, (codes, *grid))
    codes.meta["qmir_source"] = values.meta["qmir_source"] = node.name
    if "nn_module_stack" in node.meta:
        codes.meta["nn_module_stack"] = node.meta["nn_module_stack"]
    if offset is not None:
        values = graph.call_function(torch.ops.aten.sub.Tensor, (values, offset))
    put_in_place(graph_module, node, values)
