"""A lowered model: a graph of integer operators with its report."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from qmir_ao.backend.report import LoweringReport
from qmir_ao.capture.inputs import check_input
from qmir_ao.errors import NonFiniteError
from qmir_ao.ops.chain_quantize import ChainArgs
from qmir_ao.passes.record import PassRecord
from qmir_ao.quant.constants import attribute


class LoweredModule(nn.Module):
    """What `convert_and_lower` returns; call it like the network it came from.

    Attributes:
        graph_module: the graph of integer and remaining float operators.
        report: what became of each operator.
        target: "cpu".
        passes: records of the passes that made the graph, for `qmir_ao.explain`.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        report: LoweringReport,
        target: str,
        passes: Sequence[PassRecord] = (),
    ) -> None:
        """Wrap a finished graph; `convert_and_lower` and `load` do this."""
        super().__init__()
        self.graph_module, self.report, self.target = graph_module, report, target
        self.passes = list(passes)
        self._one_by_one = keeps_samples_apart(graph_module)
        self.requires_grad_(False)
        self.eval()

    def forward(self, *args: Any) -> Any:
        """Run the graph without recording gradients, each image of a batch on its own.

        torch's float convolutions choose another algorithm, with other rounding, for another batch
        size; image by image, a result never depends on its batch mates.
        """
        with torch.no_grad():
            x = args[0] if len(args) == 1 else None
            if not self._one_by_one or not isinstance(x, Tensor) or x.dim() != 4 or len(x) < 2:
                return self.graph_module(*args)
            return torch.cat([self._alone(x, i) for i in range(x.shape[0])])

    def _alone(self, x: Tensor, index: int) -> Tensor:
        try:
            image: Tensor = self.graph_module(x[index : index + 1])
        except NonFiniteError as error:
            # The operator saw a batch of one, and calls every image its sample 0.
            raise NonFiniteError(f"image {index} of the batch, run alone: {error}") from error
        return image


def keeps_samples_apart(graph_module: GraphModule) -> bool:
    """Whether a graph maps one batch of images to one, without statistics over the batch."""
    nodes = list(graph_module.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    output = next(n for n in nodes if n.op == "output").args[0]
    qmir = torch.ops.qmir
    dynamic = (qmir.dls_qparams.default, qmir.dls_fake_quant.default)
    whole_batch = any(
        (n.target in dynamic and n.args[5])
        or (n.target is qmir.chain_quantize.default and ChainArgs(*n.args).statistics == "tensor")
        for n in nodes
    )
    fixed = any(n.target is check_input and n.args[2][0] is not None for n in nodes)
    return len(inputs) == 1 and isinstance(output, Node) and not whole_batch and not fixed


def _children(spec: Any) -> list[Any]:
    return list(spec.children() if hasattr(spec, "children") else spec.children_specs)


def plain_signature(graph: Graph) -> None:
    """Turn an exported graph that takes and returns plain tensors into an ordinary one.

    torch.export wraps inputs and outputs in pytree code, which a file could not hold. A graph with
    nested inputs or outputs keeps it.
    """
    codegen = graph._codegen
    info = getattr(codegen, "pytree_info", None)
    if info is None:
        return
    output = next(n for n in graph.nodes if n.op == "output")
    inputs = _children(info.in_spec)
    positional = _children(inputs[0]) if inputs else []
    plain_inputs = all(s.is_leaf() for s in positional) and not (
        len(inputs) > 1 and inputs[1].num_leaves
    )
    if not plain_inputs or not info.out_spec.is_leaf():
        return
    (results,) = output.args
    output.args = (results[0] if isinstance(results, tuple | list) else results,)
    graph.set_codegen(CodeGen())


def only_referenced(graph_module: GraphModule) -> GraphModule:
    """A copy of the graph that owns just the tensors and modules it reads.

    Float copies of quantized weights and the fake-quantizers are gone with the rest.
    """
    graph: Graph = graph_module.graph
    root: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            value = attribute(graph_module, str(node.target)).detach()
            flat = str(node.target).replace(".", "_")
            while flat in root and root[flat].data_ptr() != value.data_ptr():
                flat += "_"
            node.target = flat
            root[flat] = value
        elif node.op == "call_module":
            root[str(node.target)] = graph_module.get_submodule(str(node.target))
    kept = GraphModule(root, graph)
    for name, value in root.items():
        if isinstance(value, torch.Tensor):
            if name in kept._parameters:
                del kept._parameters[name]
            kept._buffers.pop(name, None)
            kept.__dict__.pop(name, None)
            kept.register_buffer(name, value)
    return kept
