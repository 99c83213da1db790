"""What a captured graph may be called with, checked in the graph itself with a readable message."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qmir_ao.errors import CaptureError, ConfigError


def check_input(x: Tensor, name: str, sizes: Sequence[int | None]) -> Tensor:
    """Return `x` if every fixed size agrees; the first call in each captured graph.

    Args:
        x: an input of the graph.
        name: its name, for the message.
        sizes: one entry per dimension; None where any size is allowed.

    Raises:
        ConfigError: another rank or another fixed size than the graph was captured with.
    """
    fits = x.dim() == len(sizes) and all(
        want is None or got == want for got, want in zip(x.shape, sizes, strict=True)
    )
    if not fits:
        allowed = "(" + ", ".join("any" if s is None else str(s) for s in sizes) + ")"
        raise ConfigError(
            f"input {name!r} has shape {tuple(x.shape)}, but the model was captured for {allowed}; "
            "capture it again with example_inputs (and dynamic_shapes) that cover this shape"
        )
    return x


def insert_input_checks(graph_module: GraphModule) -> None:
    """Replace torch.export's guard call by `check_input` on every tensor input."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            graph.erase_node(node)
            graph_module.delete_submodule(str(node.target))
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not node.users:
            continue
        sizes = [s if isinstance(s, int) else None for s in value.shape]
        with graph.inserting_after(node):
            checked = graph.call_function(check_input, (node, node.name, sizes))
        checked.meta = dict(node.meta)
        node.replace_all_uses_with(checked, delete_user_cb=lambda n, c=checked: n is not c)
    graph_module.recompile()


def check_devices(model: torch.nn.Module, example_inputs: Sequence[Any]) -> None:
    """Raise `CaptureError` where an example tensor is on another device than the parameters."""
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        return
    (device,) = devices
    for position, x in enumerate(example_inputs):
        if isinstance(x, Tensor) and x.device != device:
            raise CaptureError(
                f"example_inputs[{position}] is on {x.device}, but the model is on {device}; "
                f"move one of them, e.g. example_inputs[{position}].to({str(device)!r})"
            )
