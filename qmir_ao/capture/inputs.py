"""What a captured graph may be called with, checked in the graph itself with a readable message."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qmir_ao.errors import CaptureError, ConfigError


def check_input(
    x: Tensor, name: str, sizes: Sequence[int | None], largest: Sequence[int | None] = ()
) -> Tensor:
    """Return `x` if every fixed size agrees; the first call in each captured graph.

    Args:
        x: an input of the graph.
        name: its name, for the message.
        sizes: one entry per dimension; None where other sizes are allowed.
        largest: one entry per dimension, its largest size or None; or nothing for no limits.

    Raises:
        ConfigError: another rank or a size that the captured graph does not cover.
    """
    limits = largest or [None] * len(sizes)
    fits = x.dim() == len(sizes) and all(
        (want is None or got == want) and (most is None or got <= most)
        for got, want, most in zip(x.shape, sizes, limits, strict=True)
    )
    if not fits:
        words = [
            str(want) if want is not None else "any" if most is None else f"up to {most}"
            for want, most in zip(sizes, limits, strict=True)
        ]
        allowed = "(" + ", ".join(words) + ")"
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
            checked = graph.call_function(check_input, (node, node.name, sizes, *_limits(value)))
        checked.meta = dict(node.meta)
        node.replace_all_uses_with(checked, delete_user_cb=lambda n, c=checked: n is not c)
    graph_module.recompile()


def _limits(value: Tensor) -> tuple[list[int | None], ...]:
    """Largest sizes that torch.export found, as further arguments; nothing where it found none.

    An example within one attention window, say, gives a graph for one window.
    """
    found: list[int | None] = []
    for size in value.shape:
        limit = None
        if isinstance(size, torch.SymInt):
            upper = size.node.shape_env.bound_sympy(size.node.expr).upper
            limit = int(upper) if upper.is_Integer else None
        found.append(limit)
    return () if all(limit is None for limit in found) else (found,)


def check_devices(model: torch.nn.Module, example_inputs: Sequence[Any]) -> None:
    """Raise `CaptureError` where parameters and example tensors are on more than one device."""
    places: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        places.setdefault(parameter.device, name)
    if len(places) > 1:
        found = ", ".join(f"{name!r} on {device}" for device, name in places.items())
        raise CaptureError(
            f"the model mixes devices ({found}); move it to one, e.g. model.to('cpu')"
        )
    if not places:
        return
    (device,) = places
    for position, x in enumerate(example_inputs):
        if isinstance(x, Tensor) and x.device != device:
            raise CaptureError(
                f"example_inputs[{position}] is on {x.device}, but the model is on {device}; "
                f"move one of them, e.g. example_inputs[{position}].to({str(device)!r})"
            )
