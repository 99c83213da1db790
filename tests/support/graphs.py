"""What the tests of passes share: captured float graphs, counts of calls, values."""

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qmir_ao.capture.export import export_graph
from qmir_ao.capture.recurrence import call_name

AUTO = torch.export.Dim.AUTO


def captured(net: nn.Module, capture: str, *sizes: int) -> GraphModule:
    """A float graph; by export with all dimensions open but the last."""
    if capture == "trace":
        return torch.fx.symbolic_trace(net)
    open_dims = dict.fromkeys(range(len(sizes) - 1), AUTO)
    return export_graph(net, (torch.rand(sizes),), (open_dims,))


def calls(graph_module: GraphModule, *names: str) -> int:
    """How many nodes call operators of these short names."""
    return sum(call_name(n) in names for n in graph_module.graph.nodes)


def run(graph_module: GraphModule, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return graph_module(*inputs)
