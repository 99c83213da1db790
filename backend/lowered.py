"""A lowered model: a graph of integer operators with its report."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_unflatten

from qmir_ao.backend.report import LoweringReport
from qmir_ao.capture.inputs import check_input
from qmir_ao.capture.size_rules import check_sizes, names_dimension
from qmir_ao.errors import DeviceError, NonFiniteError
from qmir_ao.ops.chain_quantize import ChainArgs
from qmir_ao.passes.record import PassRecord
from qmir_ao.quant.constants import attribute


class LoweredModule(nn.Module):
    """What `convert_and_lower` returns; call it like the network it came from.

    Attributes:
        graph_module: the graph of integer and remaining float operators.
        report: what became of each operator.
        target: "cpu" or "cuda".
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
        # None: to be found out on the first batch.
        self._one_by_one = None if may_keep_samples_apart(graph_module) else False
        self.requires_grad_(False)
        self.eval()

    def forward(self, *args: Any) -> Any:
        """Run the graph without recording gradients, each image of a batch on its own.

        torch's float convolutions choose another algorithm, with other rounding, for another batch
        size; image by image, a result never depends on its batch mates. A network that mixes the
        images of a batch runs on the whole of it.

        Raises:
            DeviceError: an input on another device than the weights.
        """
        self._check_device(args)
        with torch.no_grad():
            x = args[0] if len(args) == 1 else None
            if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
                return self.graph_module(*args)
            if len(x) < 2 or not self._samples_apart(x):
                return self.graph_module(*args)
            return torch.cat([self._alone(x, i) for i in range(x.shape[0])])

    def _check_device(self, args: Sequence[Any]) -> None:
        here = next((b.device for b in self.graph_module.buffers()), None)
        for position, x in enumerate(args):
            if isinstance(x, Tensor) and here is not None and x.device != here:
                raise DeviceError(
                    f"input {position} is on {x.device}, the model (target={self.target!r}) on "
                    f"{here}; call it with x.to({str(here)!r})"
                )

    def _samples_apart(self, x: Tensor) -> bool:
        """Whether a result depends on its own image alone; tried out on the first batch."""
        if self._one_by_one is None:
            try:
                self._one_by_one = _ignores_mates(self.graph_module, x)
            except NonFiniteError:
                for index in range(x.shape[0]):
                    self._alone(x, index)  # names the image, where one alone is to blame
                raise
        return self._one_by_one

    def _alone(self, x: Tensor, index: int) -> Tensor:
        try:
            image: Tensor = self.graph_module(x[index : index + 1])
        except NonFiniteError as error:
            # The operator saw a batch of one, and calls every image its sample 0.
            raise NonFiniteError(f"image {index} of the batch, run alone: {error}") from error
        return image


def _ignores_mates(graph_module: GraphModule, x: Tensor) -> bool:
    """Whether the first result stays the same when the other images become something else."""
    others = torch.linspace(0.0, 1.0, x[1:].numel(), dtype=x.dtype, device=x.device)
    low, high = x.aminmax()
    changed = torch.cat([x[:1], (low + (high - low) * others).reshape(x[1:].shape)])
    results = [graph_module(x), graph_module(changed)]
    if any(y.dim() == 0 or y.shape[0] % x.shape[0] or y.numel() == 0 for y in results):
        return False
    first, second = (y[: y.shape[0] // x.shape[0]] for y in results)
    return torch.equal(first, second)


def may_keep_samples_apart(graph_module: GraphModule) -> bool:
    """Whether a graph could map each image of a batch on its own: one input, one result."""
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
    fixed |= any(
        names_dimension(rule, 0) for n in nodes if n.target is check_sizes for rule in n.args[2]
    )
    return len(inputs) == 1 and isinstance(output, Node) and not whole_batch and not fixed


def _children(spec: Any) -> list[Any]:
    return list(spec.children() if hasattr(spec, "children") else spec.children_specs)


def move(graph_module: GraphModule, device: torch.device) -> GraphModule:
    """Put a graph's tensors on a device, in place, and let it make new ones there."""
    elsewhere = False

    def placed(argument: Any) -> Any:
        nonlocal elsewhere
        if not isinstance(argument, torch.device) or argument == device:
            return argument
        elsewhere = True
        return device

    for node in graph_module.graph.nodes:
        node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), placed)
    if elsewhere:
        graph_module.recompile()
    return graph_module.to(device)


def plain_signature(graph: Graph) -> None:
    """Turn an exported graph that takes plain tensors into an ordinary one.

    torch.export wraps inputs and outputs in pytree code, which a file could not hold. A graph with
    nested inputs, or with outputs in anything but tuples, lists and dictionaries, keeps it.
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
    if not plain_inputs or not _is_plain(info.out_spec):
        return
    (results,) = output.args
    flat = list(results) if isinstance(results, tuple | list) else [results]
    output.args = (tree_unflatten(flat, info.out_spec),)
    graph.set_codegen(CodeGen())


def _is_plain(spec: Any) -> bool:
    """Whether results are a tensor, or tensors in tuples, lists and dictionaries by name."""
    if spec.is_leaf():
        return True
    named = spec.type is dict and all(isinstance(key, str) for key in spec.context)
    return (spec.type in (tuple, list) or named) and all(_is_plain(s) for s in _children(spec))


def only_referenced(graph_module: GraphModule) -> GraphModule:
    """A copy of the graph that owns just the tensors and modules it reads.

    Float copies of quantized weights and the fake-quantizers are gone with the rest.
    """
    graph: Graph = graph_module.graph
    root: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            # Another memory layout would come back from a file as this one, and round differently.
            value = attribute(graph_module, str(node.target)).detach().contiguous()
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
