"""Graphs that know training from evaluation, and what node an error came from."""

import linecache
import traceback
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph_module import _WrappedCall
from torch.nn import functional as F

from qmir_ao.errors import UnsupportedGraph
from qmir_ao.quant.patterns import module_path

aten = torch.ops.aten

_TRAINING_ARGUMENT: dict[Any, int] = {
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.batch_norm.default: 5,
    F.dropout: 2,
    F.dropout1d: 2,
    F.dropout2d: 2,
    F.dropout3d: 2,
    F.alpha_dropout: 2,
    F.feature_alpha_dropout: 2,
    F.batch_norm: 5,
}


class _NamingCall(_WrappedCall):
    """Calls a graph; an error of an operator of this package names the node and its module."""

    def __call__(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            if self.cls_call is not None:
                return self.cls_call(obj, *args, **kwargs)
            return super(self.cls, obj).__call__(*args, **kwargs)
        except RuntimeError as error:
            node = _culprit(obj, error) if str(error).startswith("qmir::") else None
            if node is None:
                raise
            raise UnsupportedGraph(
                f"{error}; at node {node.name} in module {module_path(node)!r}"
            ) from error


def _culprit(graph_module: GraphModule, error: BaseException) -> Node | None:
    """The node whose line of generated code raised an error."""
    lines = [
        linecache.getline(frame.f_code.co_filename, number)
        for frame, number in traceback.walk_tb(error.__traceback__)
        if frame.f_locals.get("self") is graph_module and frame.f_code.co_name == "forward"
    ]
    name = lines[-1].partition("=")[0].strip() if lines else ""
    return next((n for n in graph_module.graph.nodes if n.name == name), None)


class PreparedGraph(GraphModule):
    """A captured graph with working `train()` and `eval()`.

    torch.export takes them away, and a symbolic trace fixes `self.training` where a function takes
    it. A subclass, so that copies of the model have them too.
    """

    def recompile(self) -> Any:
        """Generate the code of the graph anew."""
        code = super().recompile()
        cls: Any = type(self)
        if type(cls._wrapped_call) is _WrappedCall:
            cls._wrapped_call = _NamingCall(cls, cls._wrapped_call.cls_call)
        return code

    def train(self, mode: bool = True) -> "PreparedGraph":
        """Switch dropout, batch norm and the quantizers to training (or evaluation)."""
        changed = False
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target in _TRAINING_ARGUMENT:
                _set_training(node, _TRAINING_ARGUMENT[node.target], mode)
                changed = True
        if changed:
            self.recompile()
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> "PreparedGraph":
        """Switch to evaluation."""
        return self.train(False)


def _set_training(node: Node, position: int, mode: bool) -> None:
    running_mean = {aten.batch_norm.default: 3, F.batch_norm: 1}.get(node.target)
    if running_mean is not None and node.args[running_mean : running_mean + 1] == (None,):
        return  # without running statistics it takes those of the batch in both modes
    if len(node.args) > position:
        node.update_arg(position, mode)
    else:
        node.update_kwarg("training", mode)


def with_modes(graph_module: GraphModule) -> PreparedGraph:
    """The same graph as a `PreparedGraph`, in training mode."""
    prepared = PreparedGraph(graph_module, graph_module.graph)
    prepared.meta.update(graph_module.meta)
    return prepared.train()
